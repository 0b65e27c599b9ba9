"""Generation beyond the chapter's own cells: samplers against transformers, streams and stop strings on arbitrary text, speed in linear time."""
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.generate import (PackedModel, Sampling, choose, filter_logits, generate, generate_scored, generate_slowly, pack_linear,
                                 penalize_repetition, stop_at, stream_ids, stream_text)
from llm_course.model import ModelConfig, Transformer
from llm_course.reading import UserError
from llm_course.tokenizer import train_tokenizer
from timing import assert_linear, cpu_seconds

FUZZ = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tok():
    return train_tokenizer(["some plain text to learn merges from, and some more text"] * 3, 320)


def make(vocab_size=60, scale=3, **options):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size, **{"dim": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 40, "tie_embeddings": False} | options)).eval()
    for p in model.parameters():
        p.data *= scale if p.ndim > 1 else 1
    return model


# samplers against transformers

def logits_of_all_kinds():
    g = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, 1000):
        z = torch.randn(20, size, generator=g) * 4
        yield "plain", z
        yield "ties", z.round()
        yield "all equal", torch.zeros_like(z)
        cut = z.masked_fill(torch.rand(z.shape, generator=g) < 0.5, -torch.inf)
        cut[:, 0] = 0.0
        yield "cut", cut
        yield "huge", z * 1e4


@pytest.mark.parametrize("sampling, names", [
    (Sampling(0.3), []), (Sampling(2.5), []), (Sampling(1.0, top_k=1), [("TopKLogitsWarper", 1)]), (Sampling(0.7, top_k=50), [("TopKLogitsWarper", 50)]),
    (Sampling(0.7, top_p=0.01), [("TopPLogitsWarper", 0.01)]), (Sampling(1.3, top_p=0.9), [("TopPLogitsWarper", 0.9)]),
    (Sampling(0.7, min_p=0.05), [("MinPLogitsWarper", 0.05)]), (Sampling(0.7, min_p=1.0), [("MinPLogitsWarper", 1.0)]),
    (Sampling(0.8, 40, 0.9, 0.02), [("TopKLogitsWarper", 40), ("TopPLogitsWarper", 0.9), ("MinPLogitsWarper", 0.02)])], ids=str)
def test_filters_equal_transformers(sampling, names):
    transformers = pytest.importorskip("transformers")
    for kind, z in logits_of_all_kinds():
        want = transformers.TemperatureLogitsWarper(sampling.temperature)(None, z)
        for name, value in names:
            want = getattr(transformers, name)(value)(None, want)
        assert torch.equal(filter_logits(z, sampling), want), (kind, z.shape)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.2, 5.0])
def test_repetition_penalty_equals_transformers(penalty):
    transformers = pytest.importorskip("transformers")
    for kind, z in logits_of_all_kinds():
        text = torch.randint(0, z.shape[1], (20, 12), generator=torch.Generator().manual_seed(1))
        seen = torch.zeros(z.shape, dtype=torch.bool).scatter(1, text, True)
        assert torch.equal(penalize_repetition(z, seen, penalty), transformers.RepetitionPenaltyLogitsProcessor(penalty)(text, z)), kind


def test_whole_generation_equals_transformers(tmp_path):
    "Greedy, with a repetition penalty and without, from one prompt and from a padded batch."
    transformers = pytest.importorskip("transformers")
    from llm_course.hub import save_model
    model = make(n_kv_heads=2)
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for p in ([1, 2, 3], [7], [5] * 9):
        for penalty in (1.0, 1.3):
            x = torch.tensor([p])
            want = theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=15, do_sample=False, repetition_penalty=penalty, eos_token_id=59, pad_token_id=0)
            want = [t for t in want[0, len(p):].tolist() if t != 59]
            assert generate(model, [p, [4, 4]], 15, 59, 0, Sampling(repetition_penalty=penalty))[0] == want


# what is refused

@pytest.mark.parametrize("bad", [{"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": -0.1}, {"temperature": 1e-30}, {"top_k": -1},
                                 {"top_k": 1.5}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": float("nan")}, {"min_p": -0.1}, {"min_p": float("nan")},
                                 {"repetition_penalty": 0.0}, {"repetition_penalty": float("nan")}, {"repetition_penalty": float("inf")}, {"vocab_limit": -1}], ids=str)
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)


@FUZZ
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), st.floats(1e-6, 1e3), st.integers(0, 30), st.floats(1e-6, 1),
       st.floats(0, 1), st.floats(0, 1, exclude_max=True, width=32), st.integers(0, 30))
def test_a_choice_is_always_allowed(values, temperature, top_k, top_p, min_p, u, limit):
    z = torch.tensor([values])
    s = Sampling(temperature, top_k, top_p, min_p, vocab_limit=limit)
    kept = filter_logits(z, s)
    assert kept.isfinite().any() and not kept.isnan().any()
    for token in (choose(z, s, uniform=torch.tensor([u])), choose(z, s, torch.Generator().manual_seed(0))):
        assert kept[0, token].isfinite() and (not limit or token < limit)


def test_uniform_numbers_are_a_prefix_of_longer_ones():
    "Seeds give the same text whatever the limit of tokens."
    model, s = make(), Sampling(1.0)
    long = generate(model, [[1, 2]], 30, -1, 0, s, seeds=[3])[0]
    assert all(generate(model, [[1, 2]], n, -1, 0, s, seeds=[3])[0] == long[:n] for n in (1, 7, 20))


# batches

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=39), min_size=1, max_size=6), st.integers(0, 20), st.integers(1, 6), st.booleans())
def test_batched_equals_alone(prompts, n, batch_size, packed):
    model = MODELS[packed]
    want = [generate_slowly(MODELS[False], p, n, stop_id=7) for p in prompts]
    assert generate(model, prompts, n, [7], 0, batch_size=batch_size) == want
    assert [list(stream_ids(model, p, n, 7)) for p in prompts] == want
    for g, w, p in zip(generate_scored(model, prompts, n, 7, 0), want, prompts):
        assert g.ids == w and len(g.logprobs) == len(w) and g.finish_reason == ("stop" if len(w) < min(n, 40 - len(p)) else "length")


MODELS = {False: make(n_kv_heads=2), True: PackedModel(make(n_kv_heads=2), rows=10**6)}


@pytest.mark.parametrize("rows, n_in, n_out, bias", [(1, 3, 5, True), (2, 64, 300, False), (1000, 64, 64, True), (10**6, 1, 1, False)])
def test_pack_linear(rows, n_in, n_out, bias):
    maps = [torch.nn.Linear(n_in, n, bias=bias) for n in (n_out, 2)]
    run = pack_linear(maps, rows)
    for shape in ((1, n_in), (5, 1, n_in), (2, 7, n_in), (0, 3, n_in)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(x), torch.cat([m(x) for m in maps], -1), rtol=1e-4, atol=1e-5)


# streams

@FUZZ
@given(st.text(), st.randoms())
def test_stream_of_text_is_the_text(tok, text, random):
    pieces = list(stream_text(tok, iter(tok.encode(text))))
    assert "".join(pieces) == text and all(pieces)
    assert all("\ufffd" in text or "\ufffd" not in p for p in pieces)


@FUZZ
@given(st.lists(st.integers(0, 319), max_size=60))
def test_stream_of_any_ids_is_what_decode_says(tok, ids):
    ids = [i for i in ids if i < len(tok)]
    assert "".join(stream_text(tok, iter(ids))) == tok.decode(ids)


@FUZZ
@given(st.binary(max_size=40))
def test_stream_of_any_bytes_is_what_decode_says(tok, data):
    alphabet = {b: tok.fast.token_to_id(c) for b, c in byte_letters().items()}
    ids = [alphabet[b] for b in data]
    assert "".join(stream_text(tok, iter(ids))) == tok.decode(ids) == data.decode(errors="replace")


def byte_letters():
    "The letters that stand for bytes in byte-level tokenizers."
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(other)}


def test_a_stream_is_early(tok):
    "Each character comes with the token that completes it."
    ids = tok.encode("a🙂b")
    given_out = [(len(list(stream_text(tok, iter(ids[:n]))))) for n in range(len(ids) + 1)]
    text = ["".join(stream_text(tok, iter(ids[:n]))).rstrip("\ufffd") for n in range(len(ids) + 1)]
    assert text[0] == "" and text[1] == "a" and text[-2] == "a🙂" and text[-1] == "a🙂b" and given_out[-1] == 3


def stopped(text, stops):
    "The definition: go on until a stop string is complete, then cut the longest one that is."
    for end in range(len(text) + 1):
        if found := [len(s) for s in stops if text[:end].endswith(s)]:
            return text[:end - max(found)], True
    return text, False


def run(stream):
    pieces = []
    try:
        while True:
            pieces.append(next(stream))
    except StopIteration as end:
        return pieces, end.value


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.text("ab\u00e9", max_size=4), max_size=8), st.lists(st.text("ab\u00e9", min_size=1, max_size=5), max_size=3))
def test_stop_at_equals_its_definition(pieces, stops):
    got, found = run(stop_at(iter(pieces), stops))
    assert ("".join(got), found) == stopped("".join(pieces), stops) and all(got)


@FUZZ
@given(st.text(), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_stop_at_any_text(text, stops):
    got, found = run(stop_at(iter(text), stops))
    assert ("".join(got), found) == stopped(text, stops)


def test_stop_at_holds_back_no_more_than_it_must():
    shown, stream = "", "xaab"
    for n in range(len(stream) + 1):
        shown = "".join(run(stop_at(iter(stream[:n]), ["aac"]))[0])
        assert shown == stream[:n]  # at the end of the text everything comes out
    it = stop_at(iter("xaabyaac"), ["aac"])
    assert [next(it), next(it), next(it)] == ["x", "aab", "y"] and run(it) == ([], True)


@pytest.mark.parametrize("unit", ["a", "ab", "\n", "é", "aab"])
def test_stop_at_takes_linear_time(unit):
    def work(text):
        assert "".join(stop_at((text[i:i + 4] for i in range(0, len(text), 4)), [unit * 20 + "#", "User:"])) == text
    assert_linear(lambda n: cpu_seconds(work, unit * (n // len(unit))), 200_000)


def test_stream_text_takes_linear_time(tok):
    alphabet = byte_letters()
    for unit in (tok.encode("a " * 100), [tok.fast.token_to_id(alphabet[0x80])], [tok.fast.token_to_id(alphabet[0xF0])], [tok.pad_id]):
        assert_linear(lambda n: cpu_seconds("".join, stream_text(tok, iter(unit * (n // len(unit))))), 40_000)
