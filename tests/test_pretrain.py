"""Pretraining: tokenizing in a stream, levels by counting, samples that change nothing, one call for both kinds of model"""
import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.model import ModelConfig, Transformer
from llm_course.packing import TokenRows
from llm_course.pretrain import MaskedRows, SampleTexts, _batches, bits_per_byte, counting_levels, pretrain, tokenize_corpus
from llm_course.reading import DataError, UserError
from llm_course.step import TrainConfig
from llm_course.tokenizer import train_tokenizer
from llm_course.trainer import seed_all

TEXTS = [f"The {c} of {n} is {w}." for c in ("coat", "boat", "house") for n in ("Ada", "Ben", "Eva") for w in ("red", "blue", "green")] * 8


@pytest.fixture(scope="module")
def tok():
    return train_tokenizer(iter(TEXTS), 320)


def corpus(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def row(*ids):
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids), "doc_ids": torch.zeros(len(ids), dtype=torch.long)}


@given(st.lists(st.text(max_size=40), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_token_files_hold_the_texts(tok, tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("tokens")
    counts = tokenize_corpus(corpus(folder / "a.jsonl", texts), tok, folder / "a.bin")
    ids = [i for t in texts for i in (tok.bos_id, *tok.encode(t))]
    assert counts["documents"] == len(texts) and counts["tokens"] == len(ids)
    assert TokenRows(folder / "a.bin", len(ids), tok.bos_id)[0]["input_ids"].tolist() == ids


def test_batches_end_at_documents_or_characters(tmp_path):
    path = corpus(tmp_path / "a.jsonl", ["aaaa"] * 10 + ["b" * 50] * 2)
    found = list(_batches(path, documents=4, characters=40))
    assert [len(b) for b in found] == [4, 4, 3, 1] and sum(found, []) == ["aaaa"] * 10 + ["b" * 50] * 2


@pytest.mark.parametrize("bad", [{"txt": "a"}, {"text": None}, {"text": 3}, {}])
def test_a_row_without_text_is_named(tok, tmp_path, bad):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(bad) + "\n")
    with pytest.raises(DataError, match="2.*needs a text"):
        tokenize_corpus(tmp_path / "a.jsonl", tok, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()


@given(st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=1, max_size=6), st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_levels_equal_their_definition(train, test):
    found = counting_levels([row(*r) for r in train], [row(*r) for r in test], 5)
    pairs = [(a, b) for r in train for a, b in zip(r, r[1:])]
    n, joint, first = Counter(b for _, b in pairs), Counter(pairs), Counter(a for a, _ in pairs)
    kinds = Counter(a for a, _ in joint)
    unigram = lambda t: (n[t] + 1) / (len(pairs) + 5)
    bigram = lambda s, t: (joint[s, t] + kinds[s] * unigram(t)) / (first[s] + kinds[s]) if first[s] else unigram(t)
    targets = [(a, b) for r in test for a, b in zip(r, r[1:])]
    mean = lambda f: -sum(math.log(f(s, t)) for s, t in targets) / len(targets)
    assert found["unigram"] == pytest.approx(mean(lambda s, t: unigram(t))) and found["bigram"] == pytest.approx(mean(bigram))
    for s in range(5):
        assert sum(bigram(s, t) for t in range(5)) == pytest.approx(1)


def test_levels_find_what_a_chain_is_made_of():
    draw = torch.Generator().manual_seed(0)
    def chain(n):
        ids = [0]
        for _ in range(n):
            ids.append((3 * ids[-1] + int(torch.randint(0, 2, (1,), generator=draw))) % 16)      # two followers, equally likely
        return row(*ids)
    levels = counting_levels([chain(20_000)], [chain(4_000)], 16)
    assert levels["bigram"] == pytest.approx(math.log(2), abs=0.02) and levels["uniform"] == math.log(16)


def test_levels_of_too_little():
    with pytest.raises(UserError, match="two tokens"):
        counting_levels([row(1)], [row(1, 2)], 5)
    with pytest.raises(UserError, match="two tokens"):
        counting_levels([row(1, 2)], [], 5)


@pytest.mark.parametrize("causal", [True, False])
def test_one_call_trains_both_and_resumes_exactly(tok, tmp_path, causal):
    tokenize_corpus(corpus(tmp_path / "a.jsonl", TEXTS), tok, tmp_path / "a.bin")
    plain = TokenRows(tmp_path / "a.bin", 32, tok.bos_id)

    def run(folder, steps_seen):
        seed_all(0)
        rows = plain if causal else MaskedRows(plain, tok)
        model = Transformer(ModelConfig(len(tok), dim=16, n_layers=1, n_heads=2, max_seq_len=32, causal=causal))
        extra = [SampleTexts(tok, ["The"], 2, 4, show=lambda *a: steps_seen.append(a[0]))] if causal else []
        return pretrain(model, rows, TrainConfig(steps=8, batch_size=4, checkpoint_every=3), folder, plain if causal else MaskedRows(plain, tok), 4, extra)

    seen = []
    whole = run(tmp_path / "whole", seen)
    again = run(tmp_path / "whole", [])         # goes on from step 6
    assert all(torch.equal(whole.model.state_dict()[k], v) for k, v in again.model.state_dict().items())
    assert seen == ([2, 4, 6, 8] if causal else [])
    if causal:
        assert 0 < bits_per_byte(whole.model, tok, TEXTS[:5]) < 8
