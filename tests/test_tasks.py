"""Labels, masks and losses of the training tasks against `transformers`, and with arbitrary input."""
import html
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_course.hub import hf_config
from llm_course.model import ModelConfig
from llm_course.tasks import IGNORE, clm_loss, mask_tokens, mlm_loss, pad_batch, sft_labels, show_task, show_tokens, word_ids, word_tables
from llm_course.tokenizer import train_tokenizer
from llm_course.world import make_village, village_documents
from timing import assert_linear, cpu_seconds

FUZZ = settings(max_examples=60, deadline=None, derandomize=True)


def z(k1: int, n1: int, k2: int, n2: int) -> float:
    "How many standard errors two shares lie apart."
    p = (k1 + k2) / (n1 + n2)
    return abs(k1 / n1 - k2 / n2) / math.sqrt(p * (1 - p) * (1 / n1 + 1 / n2))


def toy(words: int):
    "A tokenizer of `transformers` with one id a number; 0 pads, 1 masks, 2 is another special token."
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(words)})), pad_token="0", mask_token="1", eos_token="2")


@pytest.mark.parametrize("p, replace", [(0.15, (0.8, 0.1)), (0.3, (1.0, 0.0)), (0.4, (0.5, 0.5))])
def test_masks_as_transformers_does(p, replace):
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 500, (300, 400), generator=torch.Generator().manual_seed(0))
    collate = transformers.DataCollatorForLanguageModeling(toy(500), mlm_probability=p, mask_replace_prob=replace[0], random_replace_prob=replace[1], seed=1)
    batch = collate([{"input_ids": row} for row in ids.tolist()])
    ours = mask_tokens(ids, 1, 500, [0, 1, 2], p, torch.Generator().manual_seed(2), replace=replace)
    counts = []
    for x, y in ((batch["input_ids"], batch["labels"]), ours):
        chosen = y != IGNORE
        assert torch.equal(y[chosen], ids[chosen]) and torch.equal(x[~chosen], ids[~chosen]) and not chosen[ids < 3].any()
        counts.append((int(chosen.sum()), int((chosen & (x == 1)).sum()), int((chosen & (x == ids)).sum())))
    a, b = counts
    n = int((ids > 2).sum())
    assert z(a[0], n, b[0], n) < 4
    for k in (1, 2):
        assert a[k] == a[0] or a[k] == 0 or z(a[k], a[0], b[k], b[0]) < 4
    swapped = ours[0][(ours[1] != IGNORE) & (ours[0] != 1) & (ours[0] != ids)]
    if len(swapped) > 5000:                                             # random tokens are spread over the whole vocabulary, as theirs are
        expected = len(swapped) / 499
        assert (torch.bincount(swapped, minlength=500)[[i for i in range(500) if i != 1]] - expected).square().sum() / expected < 499 + 4 * math.sqrt(2 * 499)


@pytest.fixture(scope="module")
def village():
    texts = [re.sub(r"[^A-Za-z ]+", "", d["text"].replace("\n", " ")) for d in village_documents(make_village(0, 20), 150_000)]
    return [re.sub(" +", " ", t).strip() for t in texts], train_tokenizer(texts, 500)


def with_offsets(tokenizer, trim: bool):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, processors
    fast = Tokenizer.from_str(tokenizer.fast.to_str())
    if trim:
        fast.post_processor = processors.ByteLevel(trim_offsets=True)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<|pad|>", mask_token="<|mask|>")


def test_whole_words_as_transformers_does(village):
    transformers = pytest.importorskip("transformers")
    texts, tokenizer = village
    tables = word_tables([tokenizer.decode([i], skip_special=False) for i in range(len(tokenizer))])
    fast = with_offsets(tokenizer, trim=True)
    rows = [r for t in texts if len((r := fast(t, return_offsets_mapping=True))["input_ids"]) > 20]
    with pytest.warns(UserWarning, match="not supported with whole word"):
        collate = transformers.DataCollatorForLanguageModeling(fast, whole_word_mask=True, mlm_probability=0.2, seed=0)
    theirs, ours, n_words, generator = 0, 0, 0, torch.Generator().manual_seed(1)
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        words = word_ids(ids, tables)
        batch = collate([{k: list(v) for k, v in row.items() if k != "token_type_ids"}])
        x, y = mask_tokens(ids, tokenizer.mask_id, len(tokenizer), tokenizer.special_ids, 0.2, generator, words, (1, 0))
        assert (x[y != IGNORE] == tokenizer.mask_id).all()
        found = []
        for labels in (batch["labels"][0], y):
            chosen = (labels != IGNORE)
            by_word = torch.zeros(int(words.max()) + 1).index_add(0, words, chosen.float()) / torch.bincount(words).clamp(min=1)
            assert set(by_word.unique().tolist()) <= {0.0, 1.0}         # a word of ours is hidden whole or not at all, by both
            found.append(int(by_word.sum()))
        theirs, ours, n_words = theirs + found[0], ours + found[1], n_words + len(words.unique())
    assert n_words > 10_000 and z(theirs, n_words, ours, n_words) < 4
    assert abs(ours / n_words - 0.2) < 4 * math.sqrt(0.16 / n_words)


def test_without_trimmed_offsets_transformers_sees_one_word(village):
    "The pitfall of the chapter: no gap between the offsets, no border between words."
    transformers = pytest.importorskip("transformers")
    texts, tokenizer = village
    fast = with_offsets(tokenizer, trim=False)
    with pytest.warns(UserWarning):
        collate = transformers.DataCollatorForLanguageModeling(fast, whole_word_mask=True, mlm_probability=1.0, seed=0)
    words, _ = collate._calc_word_ids_and_prob_mask(torch.tensor([fast(texts[0], return_offsets_mapping=True)["offset_mapping"]]).numpy(), torch.zeros(1, len(fast(texts[0])["input_ids"])).numpy())
    assert set(words.flatten().tolist()) == {1}


@FUZZ
@given(st.lists(st.lists(st.tuples(st.integers(3, 49), st.booleans()), min_size=1, max_size=20), min_size=1, max_size=6), st.integers(1, 9))
def test_batches_as_transformers_makes_them(examples, multiple):
    transformers = pytest.importorskip("transformers")
    rows = [{"input_ids": [i for i, _ in e], "labels": sft_labels([i for i, _ in e], [int(m) for _, m in e])} for e in examples]
    theirs = transformers.DataCollatorForSeq2Seq(toy(50), pad_to_multiple_of=multiple, return_tensors="pt")([dict(r) for r in rows])
    ours = pad_batch(rows, 0, multiple)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_losses_as_transformers_computes_them():
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(3, 60, (3, 17), generator=torch.Generator().manual_seed(0))
    for causal, loss_fn in ((True, clm_loss), (False, mlm_loss)):
        config = hf_config(ModelConfig(60, dim=32, n_layers=1, n_heads=2, max_seq_len=32, causal=causal))
        torch.manual_seed(0)
        model = (transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)) if causal
                 else transformers.EuroBertForMaskedLM(transformers.EuroBertConfig(**config))).eval()
        x, labels = (ids, ids) if causal else mask_tokens(ids, 1, 60, p=0.3, generator=torch.Generator().manual_seed(0))
        out = model(input_ids=x, labels=labels)
        loss, n = loss_fn(out.logits, labels)
        torch.testing.assert_close(out.loss, loss / n, rtol=1e-6, atol=1e-6)


@FUZZ
@given(st.lists(st.integers(0, 30), max_size=40), st.floats(0, 1), st.integers(0, 2**32), st.lists(st.integers(0, 30), max_size=4))
def test_any_mask(ids, p, seed, special):
    ids = torch.tensor(ids, dtype=torch.long)
    words = torch.tensor([i // 3 for i in range(len(ids))], dtype=torch.long)
    for w in (None, words):
        x, y = mask_tokens(ids, 1, 31, special, p, torch.Generator().manual_seed(seed), w)
        chosen = y != IGNORE
        assert torch.equal(y[chosen], ids[chosen]) and torch.equal(x[~chosen], ids[~chosen]) and not torch.isin(ids[chosen], torch.tensor(special)).any()
        again = mask_tokens(ids, 1, 31, special, p, torch.Generator().manual_seed(seed), w)
        assert torch.equal(x, again[0]) and torch.equal(y, again[1])


@FUZZ
@given(st.lists(st.text(max_size=12), max_size=20), st.data())
def test_any_text_can_be_shown(pieces, data):
    weights = data.draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces)))
    view = show_tokens(pieces, weights, {"label": [p[:1] for p in pieces], "<script>": pieces})
    assert repr(view).count("\n") == 2 and repr(view).startswith("input")
    page = view._repr_html_()
    assert "<script>" not in page and page.count("<tr>") == 3
    shown = [html.unescape(t) for t in re.findall(r"<span[^>]*>(.*?)</span>", page.split("</tr>")[0], re.S)]
    assert shown == [t.replace("\n", "⏎") for t in view.pieces if t]


@FUZZ
@given(st.lists(st.text(max_size=5), min_size=1, max_size=20), st.lists(st.integers(0, 19), max_size=30))
def test_word_ids_of_any_vocabulary(texts, ids):
    ids = torch.tensor([i % len(texts) for i in ids], dtype=torch.long)
    words = word_ids(ids, word_tables(texts))
    assert words.shape == ids.shape and (len(ids) < 2 or set(words.diff().tolist()) <= {0, 1})
    for t, (a, b) in enumerate(zip(words.tolist(), words.tolist()[1:])):
        if texts[int(ids[t + 1])].startswith(" "):
            assert b == a + 1                                           # a token that begins with a space starts a word


@pytest.mark.parametrize("piece", ["a ", "<", "\\", "((", "{", "\n", "é", "<a "])
def test_linear_time(piece):
    def seconds(n):
        pieces = [piece] * n
        return cpu_seconds(lambda: (show_tokens(pieces, [1] * n, {"label": pieces})._repr_html_(), repr(show_tokens(pieces, [1] * n, {"label": pieces})), word_tables(pieces)))
    assert_linear(seconds, 10_000)


def test_a_million_tokens():
    tables = word_tables(["<|x|>", "a", " b", "c", ".", " d", "é", "\n", "ing"])

    def seconds(n):
        ids = torch.randint(0, 9, (n,), generator=torch.Generator().manual_seed(0))
        return cpu_seconds(lambda: mask_tokens(ids, 0, 9, [0], words=word_ids(ids, tables)))
    assert_linear(seconds, 1_000_000)


def test_a_task_of_special_values():
    view = show_task([1, 2], [IGNORE, IGNORE], str)
    assert view.rows == {"label": ["", ""], "predicts": ["", ""]} and view.weights == [0, 0]
    assert show_task([], [], str).pieces == []
