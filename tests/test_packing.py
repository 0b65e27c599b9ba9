"""Packing: token files that are larger than memory or wrong, fillings that lose nothing, masks in three forms, and packed rows equal to their documents alone."""
import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from commands import ENV
from llm_course.hub import to_hf
from llm_course.model import ModelConfig, Transformer, attention, attention_slowly, document_mask
from llm_course.packing import (BACKENDS, FilledRows, FlexMask, TokenFile, TokenRows, VarlenMask, best_fit, choose_backend, crop_fit, cut_stream, document_ids,
                                document_offsets, document_starts, filling_report, pack_examples, packed_inputs, packed_logits, packed_loss, packed_targets, packing_mask,
                                pad_each, restarting_positions, split_fit, stack_rows, varlen_slowly, write_tokens)
from llm_course.reading import UserError
from llm_course.step import chunked_loss, compiled, recompute_activations
from llm_course.tasks import IGNORE, clm_loss, mlm_loss

EASY = settings(max_examples=40, deadline=None, derandomize=True)
V, ROOM = 50, 24
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def make(**change) -> Transformer:
    torch.manual_seed(1)
    return Transformer(ModelConfig(**dict(vocab_size=V, dim=32, n_layers=2, n_heads=4, max_seq_len=ROOM) | change)).eval()


def some_examples(lengths, seed=0) -> list[dict]:
    draw = random.Random(seed)
    examples = [{"input_ids": [draw.randrange(3, V) for _ in range(n)]} for n in lengths]
    return [e | {"labels": [t if draw.random() < 0.7 else IGNORE for t in e["input_ids"]]} for e in examples]


def packed_order(lengths, room=ROOM) -> list[int]:
    return [i for members in best_fit(lengths, room) for i in members]


def random_docs(B, T, seed, share=0.2) -> torch.Tensor:
    return (torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < share).cumsum(-1)


# ---- fillings

def best_fit_plainly(lengths, room):
    "The bins of `best_fit`, with a search of all open bins. Of equally full ones the bin that took an item last."
    bins, free, last = [], [], []
    for n, i in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        fitting = [b for b in range(len(bins)) if free[b] >= lengths[i]]
        b = min(fitting, key=lambda b: (free[b], -last[b]), default=len(bins))
        if b == len(bins):
            bins.append([]), free.append(room), last.append(n)
        bins[b].append(i)
        free[b], last[b] = free[b] - lengths[i], n
    return bins


def fewest_bins(lengths, room) -> int:
    "By trying everything: the smallest number of bins into which the items go."
    def fits(left, free):
        if not left:
            return True
        return any(fits(left[1:], free[:b] + [free[b] - left[0]] + free[b + 1:]) for b in range(len(free)) if free[b] >= left[0] and free[b] not in free[:b])
    items = sorted(lengths, reverse=True)
    return next(k for k in itertools.count() if fits(items, [room] * k))


@EASY
@given(st.integers(1, 60).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(0, room), max_size=60))))
def test_best_fit_is_the_plain_one(case):
    room, lengths = case
    bins = best_fit(lengths, room)
    assert bins == best_fit_plainly(lengths, room) == best_fit(np.array(lengths, dtype=np.int32), room)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= room for b in bins)
    assert len(bins) <= 11 / 9 * math.ceil(sum(lengths) / room) * 2 + 4        # a bound that needs no optimum: no two bins half empty


@EASY
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(12, 20))
def test_best_fit_is_near_the_optimum(lengths, room):
    assert fewest_bins(lengths, room) <= len(best_fit(lengths, room)) <= 11 / 9 * fewest_bins(lengths, room) + 6 / 9


def test_best_fit_of_many():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 100_000), 1, 4096).astype(int)
    bins = best_fit(lengths, 4096)
    assert lengths.sum() / (4096 * len(bins)) > 0.999
    with pytest.raises(UserError, match="example 7 has 4097 tokens"):
        best_fit([1] * 7 + [4097, 5000], 4096)


@pytest.mark.parametrize("fill", [pad_each, cut_stream, split_fit, crop_fit, lambda n, room: crop_fit(n, room, buffer=3)], ids=["pad", "cut", "split", "crop", "crop, small buffer"])
@EASY
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), room=st.integers(1, 20))
def test_laws_of_all_fillings(fill, lengths, room):
    rows = fill(lengths, room)
    assert all(0 < sum(e - s for _, s, e in row) <= room for row in rows)
    tokens = [(i, t) for row in rows for i, s, e in row for t in range(s, e)]
    everything = [(i, t) for i, n in enumerate(lengths) for t in range(n)]
    assert len(set(tokens)) == len(tokens) and set(tokens) <= set(everything)      # nothing twice, nothing invented
    report = filling_report(rows, lengths, room)
    assert report["lost"] == pytest.approx(1 - len(tokens) / len(everything)) and report["used"] == pytest.approx(len(tokens) / (room * len(rows)))
    seen = [t - s + 1 for row in rows for _, s, e in row for t in range(s, e)]
    assert report["context"] == pytest.approx(sum(seen) / len(seen)) and report["rows"] == len(rows)
    if fill is cut_stream:
        assert tokens == everything and all(sum(e - s for _, s, e in row) == room for row in rows[:-1])
    elif fill is split_fit:
        assert sorted(tokens) == everything and report["cut"] == pytest.approx(sum(n > room for n in lengths) / len(lengths))
    else:                                                                          # what is there begins with its document, or all of it is there
        assert all(s == 0 for row in rows for _, s, _ in row)
        assert {i for row in rows for i, _, _ in row} == set(range(len(lengths)))
        if fill is not pad_each:
            assert all(sum(e - s for _, s, e in row) == room for row in rows[:-1])


def test_cropping_as_in_nanochat():
    "Against the plain procedure: a list that is searched from one end to the other."
    draw = random.Random(0)
    for _ in range(50):
        lengths, room, size = [draw.randint(1, 30) for _ in range(60)], draw.randint(5, 25), draw.choice([1, 4, 100])
        coming, waiting, rows = list(enumerate(lengths)), [], []
        while coming or waiting:
            row, free = [], room
            while free:
                while coming and len(waiting) < size:
                    waiting.append(coming.pop(0))
                if not waiting:
                    break
                fitting = [d for d in waiting if d[1] <= free]
                doc = max(fitting, key=lambda d: d[1]) if fitting else min(waiting, key=lambda d: d[1])
                waiting.remove(doc)
                row.append((doc[0], 0, min(doc[1], free)))
                free -= min(doc[1], free)
            rows.append(row)
        found = crop_fit(lengths, room, size)
        assert [[(lengths[i], s, e) for i, s, e in row] for row in found] == [[(lengths[i], s, e) for i, s, e in row] for row in rows]


# ---- masks in three forms

@EASY
@given(st.integers(1, 4), st.integers(1, 30), st.floats(0, 1), st.integers(0, 999))
def test_offsets(B, T, share, seed):
    docs = random_docs(B, T, seed, share)
    lengths = [len(list(g)) for row in docs.tolist() for _, g in itertools.groupby(row)]
    offsets = document_offsets(docs, max_docs=B * T)
    assert offsets.dtype == torch.int32 and len(offsets) == B * T + 1
    assert offsets.tolist() == ([0, *itertools.accumulate(lengths)] + [B * T] * (B * T))[:B * T + 1]
    assert document_starts(docs).flatten().nonzero().flatten().tolist() == sorted(set(offsets.tolist()) - {B * T})
    assert restarting_positions(docs).flatten().tolist() == [p for n in lengths for p in range(n)]
    if len(lengths) > 1:
        with pytest.raises(UserError, match=f"{len(lengths)} documents"):
            document_offsets(docs, max_docs=len(lengths) - 1)
    assert document_offsets(docs, max_docs=len(lengths)).tolist() == [0, *itertools.accumulate(lengths)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_forms_agree(kv_heads, causal, seed):
    "Dense matrix, offsets with a plain loop, flex: against the formula, gradients of the first two as well."
    B, T = 2, (5, 40, 150)[seed]                                 # less than one block of flex, and more
    docs = random_docs(B, T, seed)
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, h, T, 8, generator=g, dtype=torch.float64, requires_grad=True) for h in (4, kv_heads, kv_heads))
    wide = [t.repeat_interleave(4 // t.shape[1], 1) for t in (q, k, v)]
    right = attention_slowly(*wide, document_mask(docs, causal))
    weight = torch.randn(right.shape, generator=g, dtype=torch.float64)
    gradients = torch.autograd.grad((right * weight).sum(), (q, k, v))
    for mask in (packing_mask(docs, causal), VarlenMask(document_offsets(docs, 2 * T), T, causal, varlen_slowly)):
        ours = attention(q, k, v, mask)
        torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad((ours * weight).sum(), (q, k, v)), gradients, rtol=0, atol=1e-10)
    with torch.no_grad():
        flex = packing_mask(docs, causal, "flex")
        assert isinstance(flex, FlexMask)
        torch.testing.assert_close(attention(q.float(), k.float(), v.float(), flex), right.float(), rtol=0, atol=1e-5)


def test_refusals():
    docs, q = random_docs(1, 8, 0), torch.randn(1, 2, 8, 4)
    for backend, expected in (("varlen", "runs on CUDA"), ("flash", "sdpa, varlen, flex")):
        with pytest.raises(UserError, match=expected):
            packing_mask(docs, backend=backend)
        with pytest.raises(UserError, match=expected):
            packed_loss(make(), {"input_ids": docs, "labels": docs, "doc_ids": docs}, backend)
    varlen = VarlenMask(document_offsets(docs), 8)
    with pytest.raises(UserError, match="bf16 or fp16 on CUDA.*float32 on cpu.*sdpa"):
        attention(q, q, q, varlen)
    for mask in (varlen, packing_mask(docs, backend="flex")):
        with pytest.raises(UserError, match="dropout"):
            attention(q, q, q, mask, dropout=0.1)
    with pytest.raises(UserError, match="no backward pass on a CPU"):
        attention(q.requires_grad_(), q, q, packing_mask(docs, backend="flex"))
    assert {choose_backend(d, t) for d in ("cpu", "cuda") for t in (torch.float32, torch.bfloat16)} == {"sdpa"} and "sdpa" in BACKENDS
    assert torch.equal(packing_mask(docs), document_mask(docs)) and packing_mask(docs).dtype == torch.bool


class ByOffsets:
    "`packing_mask` with the plain loop in place of the kernel, so that the whole path of `varlen` runs on a CPU."
    def __call__(self, docs, causal=True, backend=None, max_docs=None):
        return VarlenMask(document_offsets(docs, docs.numel()), docs.shape[1], causal, varlen_slowly)


@pytest.mark.parametrize("change", [{}, {"n_kv_heads": 2}, {"positions": "learned"}, {"positions": "sinusoidal"}, {"causal": False}, {"qk_norm": True}], ids=str)
def test_a_model_by_offsets(change, monkeypatch):
    "Loss and gradients of the whole model, with recomputed activations too: as with the matrix."
    batch, found = stack_rows(pack_examples(some_examples([9, 5, 17, 3, 11, 24, 2]), ROOM, 1)), []
    for by_offsets in (False, True):
        if by_offsets:
            monkeypatch.setattr("llm_course.packing.packing_mask", ByOffsets())
        for loss_fn, again in ((packed_loss, False), (chunked_loss, False), (packed_loss, True)):
            model = recompute_activations(make(**change), again)
            loss, count, _ = loss_fn(model, batch)
            loss.backward()
            found.append([loss.detach(), count, *(p.grad for p in model.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_compiled_layers_take_every_form():
    "Compiled once: other documents in rows of the same shape are not compiled anew, whatever the form of the mask."
    def batch(seed):
        ids = torch.randint(3, V, (2, ROOM), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "labels": ids, "doc_ids": random_docs(2, ROOM, seed)}

    def by_offsets(model, b, max_docs=2 * ROOM):
        return model(b["input_ids"], mask=VarlenMask(document_offsets(b["doc_ids"], max_docs), ROOM, True, lambda q, k, v, o, *a, **kw: q + k.sum() + v + o.sum()))

    with torch.no_grad():
        for run in (lambda m, b: packed_logits(m, b, b["doc_ids"] >= 0), lambda m, b: packed_logits(m, b, b["doc_ids"] >= 0, "flex"), by_offsets):
            torch.compiler.reset()
            plain, fast = make(n_layers=1), compiled(make(n_layers=1), backend="aot_eager")
            torch.testing.assert_close(run(fast, batch(0)), run(plain, batch(0)), rtol=0, atol=1e-5)
            with torch.compiler.set_stance("fail_on_recompile"):
                for seed in (1, 2):
                    torch.testing.assert_close(run(fast, batch(seed)), run(plain, batch(seed)), rtol=0, atol=1e-5)
        with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
            by_offsets(fast, batch(0), 2 * ROOM + 1)                       # the control: another number of offsets is another program
    torch.compiler.reset()


@needs_cuda
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_the_kernels_on_cuda(backend, kv_heads, causal):
    "Forward and backward in bf16, against the matrix in float32."
    docs = random_docs(3, 256, 0, 0.03).cuda()
    q, k, v = (torch.randn(3, h, 256, 64, device="cuda", requires_grad=True) for h in (4, kv_heads, kv_heads))
    weight, found = torch.randn_like(q), []
    for b, dtype in (("sdpa", torch.float32), (backend, torch.bfloat16)):
        y = attention(*(t.to(dtype) for t in (q, k, v)), packing_mask(docs, causal, b))
        found.append([y.float(), *torch.autograd.grad((y.float() * weight).sum(), (q, k, v))])
    for a, b in zip(*found):
        assert (a - b).norm() < 0.02 * a.norm()


@needs_cuda
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_a_model_on_cuda(backend, compile):
    batch = {k: v.cuda() for k, v in stack_rows(pack_examples(some_examples([40, 100, 128, 17, 60, 30]), 128, 1)).items()}
    found = []
    for b in ("sdpa", backend):
        model = make(max_seq_len=128, dim=128, n_kv_heads=2).cuda()
        model = compiled(model) if compile else model
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss, n, _ = packed_loss(model, batch, b)
        loss.backward()
        found.append([loss.detach() / n, *(p.grad for p in model.parameters())])
    for a, b in zip(*found):
        assert (a - b).norm() < 0.03 * a.norm()


@needs_cuda
def test_no_waiting_for_the_gpu():
    "Offsets and mask are made, and used, without a question to the GPU."
    docs = random_docs(2, 128, 0).cuda()
    q = torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16)
    attention(q, q, q, packing_mask(docs, backend="varlen"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(q, q, q, packing_mask(docs, backend="varlen"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- packed is alone

LENGTHS = st.lists(st.integers(1, ROOM), min_size=1, max_size=9)
KINDS = [dict(positions=p, causal=c, n_kv_heads=h) for p in ("rope", "learned", "sinusoidal", "none") for c in (True, False) for h in (4, 2)]


@pytest.mark.parametrize("change", KINDS, ids=lambda c: "-".join(map(str, c.values())))
@settings(max_examples=8, deadline=None, derandomize=True)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
def test_logits_are_those_of_each_document_alone(change, lengths, seed):
    model, examples = make(**change), some_examples(lengths, seed)
    rows = stack_rows(pack_examples(examples, ROOM, 1))
    with torch.no_grad():
        together = packed_logits(model, rows, rows["doc_ids"] >= 0)
        alone = torch.cat([model(torch.tensor([examples[i]["input_ids"]]))[0] for i in packed_order(lengths)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", KINDS, ids=lambda c: "-".join(map(str, c.values())))
def test_loss_and_gradients_are_those_of_the_documents(change):
    model, examples = make(**change).double(), some_examples([9, 5, 17, 3, 11, 24, 1])
    loss, count, _ = packed_loss(model, stack_rows(pack_examples(examples, ROOM, 1)))
    together = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    one = clm_loss if change["causal"] else mlm_loss
    parts = [one(model(torch.tensor([e["input_ids"]])), torch.tensor([[IGNORE, *e["labels"][1:]]])) for e in examples]
    apart = torch.autograd.grad(sum(l for l, _ in parts), list(model.parameters()), allow_unused=True)
    assert count == sum(n for _, n in parts)
    torch.testing.assert_close(loss.double(), sum(l for l, _ in parts).double(), rtol=1e-5, atol=0)
    for a, b in zip(together, apart):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_rotary_positions_need_no_restart_and_absolute_ones_do():
    rows = stack_rows(pack_examples(some_examples([9, 8, 7]), ROOM, 1))
    for positions, same in (("rope", True), ("none", True), ("learned", False), ("sinusoidal", False)):
        model = make(positions=positions)
        assert (packed_inputs(model.config, rows)[1] is None) is same
        restarted, running = (model(rows["input_ids"], p, document_mask(rows["doc_ids"])) for p in (restarting_positions(rows["doc_ids"]), None))
        assert torch.allclose(restarted, running, atol=1e-5) is same


def test_transformers_is_the_referee(tmp_path):
    "Its Llama sees by itself that positions restart, but only without mask and cache; with a mask of ones, or a cache, it attends across documents."
    from transformers import LlamaForCausalLM
    model = make(n_kv_heads=2, tie_embeddings=False)
    to_hf(model, tmp_path / "llama")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama").eval()
    examples = some_examples([9, 8, 7])
    rows = stack_rows(pack_examples(examples, ROOM, 1))
    positions = restarting_positions(rows["doc_ids"])
    with torch.no_grad():
        ours = packed_logits(model, rows, rows["doc_ids"] >= 0)
        right = theirs(rows["input_ids"], position_ids=positions, attention_mask=None, use_cache=False).logits[0]
        wrong = [theirs(rows["input_ids"], position_ids=positions, attention_mask=mask, use_cache=cache).logits[0]
                 for mask, cache in ((torch.ones_like(positions), False), (None, True))]
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-5)
    assert all((ours - logits).abs().max() > 1e-3 for logits in wrong)


# ---- the border between documents

def test_cross_loss(tmp_path):
    docs = [[0, 5, 6, 7], [0, 8], [0, 9, 10, 11, 12, 13], [0, 14, 15, 16]]
    write_tokens(tmp_path / "t.bin", docs, V)
    for cross in (True, False):
        rows = TokenRows(tmp_path / "t.bin", 16, 0, cross_loss=cross)
        targets, keep = packed_targets(make().config, stack_rows([rows[0]]))
        flat = sum(docs, [])[:16]
        assert targets[0].tolist() == [t if cross or t != 0 else IGNORE for t in flat[1:]] + [IGNORE]
        assert keep.sum() == (15 if cross else 12)
    model = make()
    (with_it, n, _), (without, m, _) = (packed_loss(model, stack_rows([TokenRows(tmp_path / "t.bin", 16, 0, cross_loss=c)[0]])) for c in (True, False))
    alone = [model(torch.tensor([d]))[0] for d in docs]
    inside = sum(F.cross_entropy(l[:-1], torch.tensor(d[1:]), reduction="sum") for l, d in zip(alone, docs))
    borders = sum(F.cross_entropy(l[-1:], torch.tensor([0]), reduction="sum") for l in alone[:-1])      # from the end of a document, which sees that one only
    torch.testing.assert_close(without, inside, rtol=1e-5, atol=0)
    torch.testing.assert_close(with_it, inside + borders, rtol=1e-5, atol=0)
    assert n - m == 3


@EASY
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(2, 16), st.sampled_from([pad_each, cut_stream, split_fit, crop_fit]), st.booleans())
def test_filled_rows(tmp_path_factory, lengths, room, fill, cross):
    path = tmp_path_factory.mktemp("filled") / "t.bin"
    draw = random.Random(0)
    docs = [[0, *(draw.randrange(2, V) for _ in range(n - 1))] for n in lengths]
    write_tokens(path, docs, V)
    rows, plan = FilledRows(path, room, 0, 1, fill, cross_loss=cross, block=7), fill(lengths, room)
    assert rows.rows == plan and len(rows) == len(plan)
    for row, pieces in zip(rows, plan):
        texts = [docs[i][s:e] for i, s, e in pieces]
        pad = room - sum(map(len, texts))
        assert row["input_ids"].tolist() == sum(texts, []) + [1] * pad
        assert row["doc_ids"].tolist() == [n for n, t in enumerate(texts) for _ in t] + [-1] * pad
        ends = [e == lengths[i] for i, _, e in pieces]
        first = [t[0] if cross and n and ends[n - 1] and pieces[n][1] == 0 else IGNORE for n, t in enumerate(texts)]
        assert row["labels"].tolist() == sum(([f, *t[1:]] for f, t in zip(first, texts)), []) + [IGNORE] * pad


# ---- token files

def test_documents_come_one_at_a_time(tmp_path):
    "Of the documents of a stream no two are alive at once."
    import weakref

    class Ids(list):
        pass

    alive, most = [], 0

    def stream():
        nonlocal most
        for n in range(300):
            most = max(most, sum(r() is not None for r in alive[-3:]))
            doc = Ids([n % V] * 2000)
            alive.append(weakref.ref(doc))
            yield doc
            del doc

    assert write_tokens(tmp_path / "t.bin", stream(), V) == {"tokens": 600_000, "documents": 300, "dtype": "uint16", "vocab_size": V}
    assert most <= 1
    assert TokenFile(tmp_path / "t.bin")[2000 * 299:].tolist() == [299 % V] * 2000


@pytest.mark.parametrize("vocab, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_the_largest_id_is_kept(tmp_path, vocab, dtype):
    assert write_tokens(tmp_path / "t.bin", [[vocab - 1, 0]], vocab)["dtype"] == dtype
    assert TokenRows(tmp_path / "t.bin", 2, 0)[0]["input_ids"].tolist() == [vocab - 1, 0]
    for bad in (-1, vocab):
        with pytest.raises(UserError, match=f"document 1 has the token {bad}"):
            write_tokens(tmp_path / "bad.bin", [[0], [1, bad]], vocab)
        assert not (tmp_path / "bad.bin").exists()


@pytest.mark.parametrize("step", range(6))
def test_a_kill_while_an_older_file_is_replaced(tmp_path, monkeypatch, step):
    "Old and new are of one size, of two vocabularies. Whatever step is the last, a file that reads as good has its own notes, and one that stands there reads."
    path, left = tmp_path / "t.bin", step
    write_tokens(path, [[0, 40, 41, 42]], V)

    def dying(real):
        def call(*args, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(*args, **options)
        return call

    with monkeypatch.context() as m:
        m.setattr(os, "replace", dying(os.replace))
        m.setattr(Path, "unlink", dying(Path.unlink))
        m.setattr(Path, "write_text", dying(Path.write_text))
        try:
            write_tokens(path, [[0, 1, 2, 3]], 10)
        except KeyboardInterrupt:
            pass
    if path.exists():
        found = TokenFile(path)
        assert (found[:].tolist(), found.vocab_size) in (([0, 40, 41, 42], V), ([0, 1, 2, 3], 10))


def test_nothing_is_left_of_a_file_that_was_refused(tmp_path):
    with pytest.raises(UserError, match="token 100"):
        write_tokens(tmp_path / "t.bin", [[0, 1], [100]], 10)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="cannot write"):
        write_tokens(tmp_path / "missing" / "t.bin", [[0, 1]], 10)


def test_a_report_on_nothing():
    for rows, lengths in (([], []), ([], [3]), (pad_each([0, 0], 6), [0, 0])):
        with pytest.raises(UserError, match="nothing to report on"):
            filling_report(rows, lengths, 6)


def notes(path, **change):
    return lambda: Path(f"{path}.json").write_text(json.dumps(json.loads(Path(f"{path}.json").read_text()) | change))


@pytest.mark.parametrize("damage, expected", [
    (lambda p: p.unlink(), "does not exist"),
    (lambda p: Path(f"{p}.json").unlink(), r"t\.bin\.json is missing or does not say.*FileNotFound"),
    (lambda p: Path(f"{p}.json").write_text("{"), r"t\.bin\.json is missing or does not say.*JSONDecodeError"),
    (lambda p: Path(f"{p}.json").write_text("[1]"), r"t\.bin\.json is missing or does not say"),
    (lambda p: Path(f"{p}.json").write_bytes(b"\xff\xfe"), r"t\.bin\.json is missing or does not say"),
    (lambda p: notes(p, dtype="object")(), r"t\.bin\.json.*KeyError.*object"),
    (lambda p: notes(p, dtype=["uint16"])(), r"t\.bin\.json"),
    (lambda p: notes(p, tokens=19)(), r"40 bytes.*19 tokens of 2 bytes"),
    (lambda p: notes(p, dtype="uint32")(), r"40 bytes.*20 tokens of 4 bytes"),
    (lambda p: os.truncate(p, 39), r"39 bytes.*20 tokens.*cut off"),
    (lambda p: os.truncate(p, 0), r"0 bytes.*20 tokens"),
    (lambda p: (os.truncate(p, 0), notes(p, tokens=0)()), "holds 0 tokens, less than one row of 5"),
    (lambda p: notes(p, vocab_size=60)(), "vocabulary of 60 ids, 50 are expected"),
    (lambda p: notes(p, vocab_size=9)(), r"t\.bin: token 9 is 9, the vocabulary has the ids 0 to 8"),
], ids=range(14))
def test_a_wrong_file_is_named(tmp_path, damage, expected):
    path = tmp_path / "t.bin"
    write_tokens(path, [list(range(20))], V)
    damage(path)
    with pytest.raises(UserError, match=expected):
        rows = TokenRows(path, 5, 0, vocab_size=50)
        [rows[i] for i in range(len(rows))]


def test_files_of_older_versions(tmp_path):
    "Their notes do not tell the vocabulary."
    path = tmp_path / "t.bin"
    write_tokens(path, [list(range(20))], V)
    Path(f"{path}.json").write_text(json.dumps({"tokens": 20, "documents": 1, "dtype": "uint16"}))
    assert TokenRows(path, 5, 0)[3]["input_ids"].tolist() == [15, 16, 17, 18, 19]
    with pytest.raises(UserError, match="token 10 is 10"):
        TokenRows(path, 5, 0, vocab_size=10)[2]


CHILD = """
import random, resource, sys
import numpy as np
from llm_course.packing import TokenRows, stack_rows
TokenRows(sys.argv[2], 5, 0)[0]                                      # everything is imported and used once
data = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data + 200_000_000, data + 200_000_000))
rows, draw = TokenRows(sys.argv[1], 2048, 1), random.Random(0)
for _ in range(40):
    assert stack_rows([rows[draw.randrange(len(rows))] for _ in range(16)])["input_ids"].shape == (16, 2048)
assert rows[len(rows) - 1]["input_ids"][-1] == 7
try:
    np.fromfile(sys.argv[1], dtype=np.uint16)
    print("the limit does not hold")
except MemoryError:
    print("fine")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's limits of memory")
def test_a_file_larger_than_memory(tmp_path):
    "1.6 GB of tokens, read by a process that may not have more than 200 MB: rows come, and the whole file would not."
    big, small, n = tmp_path / "big.bin", tmp_path / "small.bin", 800_000_000 // 2048 * 2048
    write_tokens(small, [[1, 2, 3, 4, 5]], V)
    write_tokens(big, [[1]], V)
    with open(big, "r+b") as f:
        f.seek(2 * n - 2)                                   # a hole: it takes no place on the disk
        f.write(np.uint16(7).tobytes())
    notes(big, tokens=n)()
    done = subprocess.run([sys.executable, "-c", CHILD, str(big), str(small)], env=ENV | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "fine", done.stdout + done.stderr[-2000:]


def test_real_documents_fill_rows(testdata, tmp_path):
    "Python files of strangers: every token in its place, whatever the filling."
    from llm_course.tokenizer import train_tokenizer
    texts = [json.loads(line)["text"] for line in (testdata / "code" / "thealgorithms.jsonl").open(encoding="utf-8")][:150]
    tok = train_tokenizer(texts, 1024)
    docs = [[tok.bos_id, *ids] for ids in tok.encode_batch(texts)]
    write_tokens(tmp_path / "t.bin", docs, len(tok))
    rows = FilledRows(tmp_path / "t.bin", 512, tok.bos_id, tok.pad_id)
    pieces = {}
    for row, plan in zip(rows, rows.rows):
        for n, (i, s, e) in enumerate(plan):
            pieces.setdefault(i, []).append((s, row["input_ids"][row["doc_ids"] == n].tolist()))
    assert [sum((ids for _, ids in sorted(pieces[i])), []) for i in range(len(docs))] == docs
    assert filling_report(rows.rows, rows.lengths.tolist(), 512)["used"] > 0.95
