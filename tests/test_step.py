"""The parts of one training step: equal to PyTorch's own, for shapes, types and settings drawn at random."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llm_course.model import KVCache, ModelConfig, Transformer
from llm_course.packing import packed_loss
from llm_course.reading import UserError
from llm_course.step import (PlainAdamW, Together, TrainConfig, autocast_of, chunked_loss, clip_gradients, compiled, decay_groups, learning_rate,
                             linear_cross_entropy, make_optimizer, recompute_activations)
from llm_course.tasks import IGNORE

EASY = settings(max_examples=40, deadline=None, derandomize=True)


def plain(hidden, weight, targets, bias=None):
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="sum")


def gradients(f, tensors, targets, **options):
    given = [t.detach().clone().requires_grad_() for t in tensors]
    loss = f(given[0], given[1], targets, *given[2:], **options)
    return [loss.detach(), *torch.autograd.grad(loss * 0.7, given)]


def make(**change) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**dict(vocab_size=40, dim=32, n_layers=2, n_heads=2, max_seq_len=32) | change))


def rows(B: int = 3, T: int = 20) -> dict:
    ids = torch.randint(0, 40, (B, T), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 5:] = IGNORE
    return {"input_ids": ids, "labels": labels, "doc_ids": (torch.arange(T) > 11).long().expand(B, -1)}


def whole(model, loss_fn=packed_loss, batch=None, **options):
    model.zero_grad()
    loss, count, _ = loss_fn(model, batch or rows(), **options)
    loss.backward()
    return loss.detach(), count, [p.grad.clone() for p in model.parameters()]


# ---- chunked linear cross-entropy

@EASY
@given(st.integers(0, 30), st.integers(1, 8), st.integers(1, 20), st.integers(1, 40), st.booleans(), st.floats(0.01, 50), st.integers(0, 99))
def test_equal_to_cross_entropy(n, dim, vocab, chunk, with_bias, scale, seed):
    g = torch.Generator().manual_seed(seed)
    tensors = [scale * torch.randn(s, generator=g, dtype=torch.float64) for s in ((n, dim), (vocab, dim), (vocab,))][:3 if with_bias else 2]
    targets = torch.randint(0, vocab, (n,), generator=g)
    targets[torch.rand(n, generator=g) < 0.2] = IGNORE
    for a, b in zip(gradients(linear_cross_entropy, tensors, targets, chunk=chunk), gradients(plain, tensors, targets)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-9 * scale)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_types_are_kept(dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    tensors, targets = [torch.randn(60, 16, generator=g), torch.randn(50, 16, generator=g)], torch.randint(0, 50, (60,), generator=g)
    exact = gradients(plain, [t.double() for t in tensors], targets)
    found = gradients(linear_cross_entropy, [t.to(dtype) for t in tensors], targets, chunk=7)
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
    for a, b in zip(found, exact):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_only_what_is_asked_for():
    hidden, weight, targets = torch.randn(5, 4), torch.randn(6, 4, requires_grad=True), torch.randint(0, 6, (5,))
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward()                                                        # a second time gives the same again
    torch.testing.assert_close(weight.grad, 2 * first)
    assert hidden.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad
    assert not linear_cross_entropy(hidden, weight.detach(), targets).requires_grad


def test_tied_in_one_tensor():
    "One tensor as hidden states and as weight, as with tied embeddings: both gradients arrive."
    a = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    t = torch.arange(6)
    ours, theirs = (torch.autograd.grad(f(a, a, t), a)[0] for f in (linear_cross_entropy, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_refusals():
    h, w, t = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4), torch.randint(0, 6, (5,))
    for wrong in ((h[0], w, t), (h, w.T, t), (h, w, t[:4]), (h, w[0], t)):
        with pytest.raises(UserError, match="do not fit"):
            linear_cross_entropy(*wrong)
    with pytest.raises(UserError, match="chunk"):
        linear_cross_entropy(h, w, t, chunk=0)
    with pytest.raises(RuntimeError):
        linear_cross_entropy(h, w, t + 6)                                  # no such token
    first = torch.autograd.grad(linear_cross_entropy(h, w, t) ** 2, h, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate"):
        first.sum().backward()


@pytest.mark.parametrize("change", [{}, {"tie_embeddings": False}, {"causal": False}, {"positions": "learned"}, {"positions": "sinusoidal"}], ids=str)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_chunked_loss_is_packed_loss(change, precision):
    model = make(**change)
    with autocast_of(TrainConfig(1, precision=precision)):
        (a, n, ga), (b, k, gb) = whole(model), whole(model, chunked_loss, chunk=9)
    assert n == k
    tolerance = 1e-5 if precision == "no" else 2e-2
    for x, y in zip([a, *ga], [b, *gb]):
        assert (x - y).norm() <= tolerance * (1e-3 + x.norm())


# ---- optimizer, schedule, clipping

@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.5)])
def test_plain_adamw_is_torchs(betas):
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((4, 3), (5,), ())]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = dict(lr=3e-2, betas=betas, weight_decay=0.2)
    a, b = PlainAdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(1000):
        for p, q in zip(ours, theirs):
            p.grad = q.grad = None if p.ndim == 0 and step % 3 else torch.randn_like(p) * 10 ** math.sin(step)
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)
    again = PlainAdamW(ours, **options)
    again.load_state_dict(a.state_dict())
    assert again.state[ours[0]]["step"] == 1000


@EASY
@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5), max_size=4), st.floats(0.01, 100))
def test_clipping_is_torchs(values, limit):
    def params():
        made = [nn.Parameter(torch.zeros(len(v))) for v in values] + [nn.Parameter(torch.zeros(2))]
        for p, v in zip(made, values):
            p.grad = torch.tensor(v)
        return made
    ours, theirs = params(), params()
    torch.testing.assert_close(clip_gradients(iter(ours), limit), nn.utils.clip_grad_norm_(theirs, limit), rtol=1e-5, atol=1e-6)
    for p, q in zip(ours[:-1], theirs):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


@EASY
@given(st.integers(1, 3000), st.sampled_from(["cosine", "wsd", "constant"]), st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1))
def test_schedule_stays_between_its_ends(steps, schedule, warmup, low, decay):
    c = TrainConfig(steps, schedule=schedule, warmup=warmup, min_lr=low, decay=decay)
    rates = [learning_rate(s, c) for s in range(0, steps, max(1, steps // 50))]
    assert all(0 <= r <= c.lr * (1 + 1e-12) for r in rates)
    warm = max(1, round(warmup * steps))
    after = [learning_rate(s, c) for s in range(warm - 1, steps)]
    assert all(a >= b - 1e-15 for a, b in zip(after, after[1:])) and min(after) >= c.lr * low - 1e-12
    assert math.isclose(learning_rate(warm - 1, c), c.lr)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_parameter_once(optimizer):
    model = make(tie_embeddings=False, norm="layernorm", bias=True)
    made = make_optimizer(model, TrainConfig(5, optimizer=optimizer))
    assert sorted(id(p) for g in made.param_groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    assert isinstance(made, Together) == (optimizer == "muon")
    assert all(p.ndim > 1 for g in made.param_groups for p in g["params"] if g["weight_decay"])
    model.embed_tokens.weight.requires_grad_(False)
    assert all(p is not model.embed_tokens.weight for g in decay_groups(model, TrainConfig(5)) for p in g["params"])


# ---- accumulation, recomputing, compiling

@pytest.mark.parametrize("size", [1, 2])
def test_accumulated_sums_are_the_large_batch(size):
    model, batch = make().double(), rows()
    loss, count, large = whole(model, batch=batch)
    parts = [whole(model, batch={k: v[i:i + size] for k, v in batch.items()}) for i in range(0, 3, size)]
    assert sum(p[1] for p in parts) == count
    torch.testing.assert_close(sum(p[0] for p in parts), loss)            # the loss itself is always summed in float32
    for i, g in enumerate(large):
        assert (sum(p[2][i] for p in parts) - g).norm() <= 1e-6 * (1 + g.norm())


@pytest.mark.parametrize("change", [{}, {"dropout": 0.2}, {"norm_position": "post"}, {"positions": "none"}], ids=str)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_recomputing_changes_nothing(change, precision):
    found = []
    for on in (False, True):
        model = recompute_activations(make(**change), on)
        torch.manual_seed(5)
        with autocast_of(TrainConfig(1, precision=precision)):
            found.append(whole(model))
    torch.testing.assert_close(found[0][2], found[1][2], rtol=0, atol=0)
    assert list(model.state_dict()) == list(make(**change).state_dict())


def test_compiled_layers():
    fast, batch = recompute_activations(compiled(make(), backend="aot_eager"), True), rows()
    for x, y in zip(whole(make(), batch=batch)[2], whole(fast, batch=batch)[2]):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    assert list(fast.state_dict()) == list(make().state_dict())
    for f in (compiled, recompute_activations):
        with pytest.raises(UserError, match="no Transformer"):
            f(nn.Linear(2, 2))
    torch.compiler.reset()


def test_generation_is_not_compiled():
    "Neither the plain call nor a copy of the model compiles anew when a cache is at work between two training steps."
    from torch._dynamo.testing import CompileCounter
    torch.compiler.reset()
    counter = CompileCounter()
    model, batch = compiled(make(n_layers=10), backend=counter), rows()
    whole(model, batch=batch)
    first = counter.frame_count
    assert 1 <= first <= 3                                                 # one for all ten layers
    with torch.no_grad():
        cache = KVCache(model.config, 1, 20)
        steps = torch.cat([model(batch["input_ids"][1:2, i:i + 1], cache=cache) for i in range(12)], 1)
    torch.testing.assert_close(steps, make(n_layers=10)(batch["input_ids"][1:2, :12]), rtol=1e-4, atol=1e-5)
    whole(model, batch=batch)
    assert counter.frame_count == first
    torch.testing.assert_close(whole(copy.deepcopy(model), batch=batch)[2], whole(make(n_layers=10), batch=batch)[2], rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_settings_are_checked():
    for wrong in ({"steps": 0}, {"lr": -1.0}, {"schedule": "linear"}, {"precision": "fp8"}, {"optimizer": "sgd"}, {"warmup": 100}, {"min_lr": -0.1}, {"micro_batch": -1}):
        with pytest.raises(UserError):
            TrainConfig(**{"steps": 5} | wrong)
    assert not TrainConfig(5).recompute and not TrainConfig(5).compile
