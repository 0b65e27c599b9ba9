"""The Unigram tokenizer: against brute force and the library, on arbitrary text, in linear time."""
import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from llm_course.reading import DataError, UserError
from llm_course.tokenizer import Tokenizer
from llm_course.unigram import (WORDS_WITH_MARKS, Lattice, count_words, em_step, expected_counts, forward, lattice_em_step, log_probability, path_scores,
                                pre_tokenizer, ratio_interval, removal_losses, seed_pieces, segmentations, text_sizes, train_unigram,
                                train_unigram_tokenizer, viterbi)
from timing import assert_linear, cpu_seconds

FEW = settings(max_examples=60, deadline=None, derandomize=True)
letters = st.text("abc", max_size=9)
vocabularies = st.dictionaries(st.text("abc", min_size=1, max_size=4), st.floats(-20, 0), max_size=15).map(
    lambda d: d | {c: -9.0 - i / 7 for i, c in enumerate("abc")})
corpora = st.dictionaries(st.text("abc", min_size=1, max_size=8), st.integers(1, 9), min_size=1, max_size=6)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
TEXTS = ["The cat sat on the mat, and the other cat sat there too.", "def f(x):\n    return x + 1\n", "Größe und Maß", "日本語の文", "हिन्दी में लिखा"] * 3


@pytest.fixture(scope="module", params=["", WORDS_WITH_MARKS], ids=["gpt2", "marks"])
def tokenizer(request) -> Tokenizer:
    return train_unigram_tokenizer(TEXTS, 400, request.param)


@FEW
@given(letters, vocabularies)
def test_one_walk_finds_what_enumeration_finds(word, scores):
    ways = segmentations(word, scores)
    values = [log_probability(s, scores) for s in ways]
    pieces, best = viterbi(word, scores)
    assert "".join(pieces) == word and math.isclose(best, max(values), abs_tol=1e-9)
    total = sum(math.exp(v - best) for v in values)
    assert math.isclose(forward(word, scores)[-1], best + math.log(total), abs_tol=1e-9)
    exact = Counter()
    for s, v in zip(ways, values):
        for p in s:
            exact[p] += math.exp(v - best) / total
    counts, log_p = expected_counts(word, scores)
    assert all(math.isclose(counts.get(p, 0), c, abs_tol=1e-9) for p, c in exact.items()) and counts.keys() <= exact.keys()


@FEW
@given(st.text("abc", max_size=30), vocabularies)
def test_viterbi_cuts_as_the_library(word, scores):
    fast = FastTokenizer(models.Unigram(list(scores.items())))
    mine, theirs = viterbi(word, scores)[0], fast.encode(word).tokens
    if mine != theirs:   # equal to the last bit of a float, or a different cut that is exactly as good
        assert math.isclose(log_probability(mine, scores), log_probability(theirs, scores), rel_tol=1e-12)


@FEW
@given(corpora, vocabularies)
def test_em_never_loses_likelihood_and_arrays_agree(words, scores):
    total = math.log(sum(map(math.exp, scores.values())))
    scores = {p: s - total for p, s in scores.items()}
    lattice, counts, values = Lattice.build(list(words), list(scores)), np.array(list(words.values()), float), np.array(list(scores.values()))
    last = -math.inf
    for _ in range(4):
        new, reached = em_step(words, scores)
        values, same = lattice_em_step(lattice, counts, values)
        assert math.isclose(reached, same, rel_tol=1e-9, abs_tol=1e-9) and np.allclose(np.exp(values), np.exp(list(new.values())), atol=1e-9)
        assert reached >= last - 1e-7
        assert math.isclose(sum(map(math.exp, new.values())), 1, abs_tol=1e-9)
        scores, last = new, reached


@FEW
@given(corpora, st.integers(3, 12))
def test_training(words, n_pieces):
    characters = {c for w in words for c in w}
    scores = train_unigram(words, n_pieces)
    assert characters <= scores.keys() and len(scores) <= max(n_pieces, len(characters))
    assert all(math.isfinite(s) and s <= 1e-9 for s in scores.values())
    assert all("".join(viterbi(w, scores)[0]) == w for w in words)
    assert scores == train_unigram(words, n_pieces)
    losses = removal_losses(scores)
    assert all((x == math.inf) == (len(p) == 1) for p, x in losses.items())


def test_seeds_against_their_definition():
    words = {"banana": 3, "bandana": 2, "cabana": 1, "an": 5}
    counts = Counter()
    for w, n in words.items():
        for s, e in itertools.combinations(range(len(w) + 1), 2):
            counts[w[s:e]] += n
    assert seed_pieces(words, 999) == {p: n for p, n in counts.items() if len(p) > 1 and n > 1}
    some = seed_pieces(words, 10)
    assert len(some) == 10 and min(n * len(p) for p, n in some.items()) >= max(n * len(p) for p, n in counts.items() if len(p) > 1 and n > 1 and p not in some)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=any_text)
def test_round_trip_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and not set(ids) & set(tokenizer.special_ids)


@pytest.mark.parametrize("text", ["<|end|>", "a<|endoftext|><|pad|>", "<|mask|>" * 3, " <|assistant|>"])
def test_user_text_makes_no_special_tokens(tokenizer, text):
    assert not set(tokenizer.encode(text)) & set(tokenizer.special_ids)
    assert set(tokenizer.encode(text, allow_special=True)) & set(tokenizer.special_ids)


def test_saves_and_loads(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert [again.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [theirs(t, add_special_tokens=False)["input_ids"] for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]


def test_frequent_words_become_tokens():
    "The flaw of the library's trainer: a word that begins no longer word was never a candidate."
    found = train_unigram_tokenizer(["my village, your village. The village"] * 20, 300)
    assert found.fast.token_to_id("Ġvillage") is not None


@pytest.mark.parametrize("call", [lambda: train_unigram_tokenizer(["a"], 100), lambda: train_unigram_tokenizer([""], 400), lambda: train_unigram({"abc": 1}, 2),
                                  lambda: text_sizes(["a"], "line"), lambda: ratio_interval([1], [0]), lambda: ratio_interval([1, 2], [1])])
def test_errors_a_user_can_mend(call):
    with pytest.raises(UserError):
        call()


@FEW
@given(any_text)
def test_unknown_characters_are_told(text):
    for f in (viterbi, expected_counts):
        if set(text) <= {"a"}:
            f(text, {"a": -1.0})
        else:
            with pytest.raises(DataError, match="piece of its own"):
                f(text, {"a": -1.0})
    assert len(forward(text, {"a": -1.0})) == len(text) + 1


@FEW
@given(st.lists(any_text, max_size=4))
def test_words_are_the_text_again(texts):
    for pattern in ("", WORDS_WITH_MARKS):
        cut = pre_tokenizer(pattern)
        counts = count_words(texts, cut)
        assert sum(len(w) * n for w, n in counts.items()) == sum(len(t.encode()) for t in texts) and max(map(len, counts), default=0) <= 64
    for unit in ("byte", "character", "word"):
        assert text_sizes(texts, unit).shape == (len(texts),)


@pytest.mark.parametrize("unit", ["a ", "<", "\\", "((", "{", "\n", "é", "<a ", "1", "हि"])
def test_training_and_encoding_take_linear_time(unit):
    "A quarter of a megabyte here, to be quick."
    tokenizer = train_unigram_tokenizer(TEXTS, 300)

    def seconds(n):
        text = unit * (n // len(unit.encode()))
        return cpu_seconds(lambda: (train_unigram_tokenizer([text], 300), tokenizer.encode(text)))
    assert_linear(seconds, 250_000)


def test_long_words_do_not_underflow():
    scores = {"a": -30.0, "b": -0.1}
    word = "ab" * 2000
    lattice = Lattice.build([word], list(scores))
    assert math.isclose(path_scores(lattice, np.array(list(scores.values())))[0, -1], -30.1 * 2000, rel_tol=1e-9)
    assert math.isclose(forward(word, scores)[-1], -30.1 * 2000, rel_tol=1e-9)
    assert math.isclose(expected_counts(word, scores)[0]["a"], 2000, rel_tol=1e-6)


def test_compresses_real_text_about_as_well_as_bpe(testdata):
    "On held-back paragraphs of WikiText's validation part, at 2,048 tokens; the intervals of the two overlap widely."
    from llm_course.tokenizer import bytes_per_token, train_tokenizer
    lines = (testdata / "pretrain" / "wikitext-2" / "valid.txt").read_text(encoding="utf-8").splitlines()
    lines = [t for t in lines if len(t) >= 200]
    learn, back = lines[:400], lines[900:1050]
    assert bytes_per_token(train_unigram_tokenizer(learn, 2048), back) > 0.95 * bytes_per_token(train_tokenizer(learn, 2048), back)
