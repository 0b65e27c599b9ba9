"""The model: equal to PyTorch's and transformers' own parts, laws that hold for every recipe, and its length in lines."""
import ast
import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llm_course import model as module
from llm_course.model import (CHOICES, Attention, Block, KVCache, ModelConfig, RMSNorm, Transformer, attention, attention_slowly, document_mask,
                              rope_frequencies, rope_tables, rotate, sinusoids)
from llm_course.reading import UserError

V, T = 50, 12
OLD = dict(norm="layernorm", norm_position="post", positions="sinusoidal", activation="relu", bias=True, tie_embeddings=False)
GPT2 = dict(norm="layernorm", positions="learned", activation="gelu_tanh", bias=True)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS = {"modern": {}, "2017": OLD, "gpt2": GPT2, "layernorm": {"norm": "layernorm"}, "layernorm with bias": {"norm": "layernorm", "bias": True},
            "post-norm": {"norm_position": "post"}, "grouped": {"n_kv_heads": 2}, "multi-query": {"n_kv_heads": 1}, "learned": {"positions": "learned"},
            "sinusoidal": {"positions": "sinusoidal"}, "no positions": {"positions": "none"}, "gelu": {"activation": "gelu"}, "relu": {"activation": "relu"},
            "qk-norm": {"qk_norm": True}, "qwen2": {"qkv_bias": True, "n_kv_heads": 2}, "head size": {"head_dim": 12}, "untied": {"tie_embeddings": False},
            "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "llama3": {"rope_scaling": LLAMA3}, "encoder": {"causal": False},
            "everything": {"norm": "layernorm", "n_kv_heads": 2, "qk_norm": True, "bias": True, "tie_embeddings": False, "head_dim": 6}}


def make(change: dict, **more) -> Transformer:
    torch.manual_seed(1)
    return Transformer(ModelConfig(**dict(vocab_size=V, dim=32, n_layers=2, n_heads=4, max_seq_len=32) | change | more)).eval()


def tokens(rows: int, n: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (rows, n), generator=torch.Generator().manual_seed(seed))


def near(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def copy_attention(box: nn.MultiheadAttention, ours: Attention) -> None:
    for p, weight, bias in zip((ours.q_proj, ours.k_proj, ours.v_proj), box.in_proj_weight.chunk(3), box.in_proj_bias.chunk(3)):
        p.load_state_dict({"weight": weight, "bias": bias})
    ours.o_proj.load_state_dict(box.out_proj.state_dict())


# ---- equal to what others wrote

def test_rms_norm():
    x = torch.randn(3, 5, 64) * 7
    ours, theirs = RMSNorm(64, 1e-6), nn.RMSNorm(64, eps=1e-6)
    nn.init.normal_(ours.weight)
    theirs.load_state_dict(ours.state_dict())
    near(ours(x), theirs(x))
    assert torch.isfinite(RMSNorm(64).half()(x.half() * 1e3)).all()


@pytest.mark.parametrize("causal", [True, False])
def test_attention_and_its_gradients(causal):
    plain = [torch.randn(2, 4, T, 8, requires_grad=True) for _ in range(3)]
    fused = [t.detach().clone().requires_grad_() for t in plain]
    mask = torch.ones(T, T, dtype=torch.bool).tril() if causal else torch.ones(T, T, dtype=torch.bool)
    a, b = attention_slowly(*plain, mask), attention(*fused, causal=causal)
    near(a, b)
    weight = torch.randn_like(a)
    (a * weight).sum().backward(), (b * weight).sum().backward()
    for p, f in zip(plain, fused):
        near(p.grad, f.grad)
    near(attention(*fused, mask=mask), a)                                                          # as a boolean mask
    near(attention(*fused, mask=torch.zeros(T, T).masked_fill(~mask, -torch.inf)), a)              # and as numbers to add


@pytest.mark.parametrize("causal", [True, False])
def test_multihead_attention(causal):
    box, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, T, 16)
    nn.init.normal_(box.in_proj_bias), nn.init.normal_(box.out_proj.bias)
    ours = Attention(ModelConfig(V, dim=16, n_heads=4, bias=True, positions="none", causal=causal), 0)
    copy_attention(box, ours)
    near(ours(x), box(x, x, x, attn_mask=torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None)[0])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer_and_its_gradients(norm_first, activation):
    theirs = nn.TransformerEncoderLayer(16, 4, 40, dropout=0.0, activation=activation, norm_first=norm_first, batch_first=True)
    ours = Block(ModelConfig(V, dim=16, ffn_dim=40, norm="layernorm", norm_position="pre" if norm_first else "post", activation=activation,
                             positions="none", bias=True), 0)
    copy_attention(theirs.self_attn, ours.self_attn)
    for mine, yours in ((ours.mlp.up_proj, theirs.linear1), (ours.mlp.down_proj, theirs.linear2), (ours.input_layernorm, theirs.norm1),
                        (ours.post_attention_layernorm, theirs.norm2)):
        nn.init.normal_(yours.bias)
        mine.load_state_dict(yours.state_dict())
    x = torch.randn(2, T, 16)
    y, z = ours(x), theirs(x, src_mask=torch.ones(T, T, dtype=torch.bool).triu(1))
    near(y, z)
    weight = torch.randn_like(y)
    (y * weight).sum().backward(), (z * weight).sum().backward()
    near(ours.mlp.up_proj.weight.grad, theirs.linear1.weight.grad, 1e-4)
    near(ours.self_attn.q_proj.weight.grad, theirs.self_attn.in_proj_weight.grad[:16], 1e-4)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3 | {"original_max_position_embeddings": 8192}])
def test_rotary_positions_are_those_of_transformers(scaling):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=131072 if scaling else 2048,
                                      rope_parameters={"rope_type": "default", "rope_theta": 500_000.0} | (scaling or {}))
    x, (cos, sin) = torch.randn(1, 4, 300, 64), rope_tables(64, 300, 500_000.0, scaling)
    their_cos, their_sin = LlamaRotaryEmbedding(config)(x, torch.arange(300)[None])
    near(cos, their_cos[0], 1e-6)
    assert torch.equal(rotate(x, cos, sin), apply_rotary_pos_emb(x, x, cos[None], sin[None])[0])


@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 400), st.sampled_from([None, {"rope_type": "linear", "factor": 3.0}, LLAMA3]))
@settings(max_examples=30, deadline=None)
def test_rotary_scores_depend_on_the_distance_only(m, n, shift, scaling):
    cos, sin = (t.double() for t in rope_tables(16, 801, scaling=scaling))
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    score = lambda a, b: rotate(q, cos[a], sin[a]) @ rotate(k, cos[b], sin[b])
    near(score(m, n), score(m + shift, n + shift), 1e-3)


def test_sinusoids_as_the_paper_writes_them():
    p = sinusoids(40, 16)
    for place in (0, 1, 39):
        for i in range(8):
            angle = place / 10_000 ** (2 * i / 16)
            assert abs(p[place, 2 * i] - math.sin(angle)) < 1e-5 and abs(p[place, 2 * i + 1] - math.cos(angle)) < 1e-5


def test_grouped_heads_are_repeated_heads():
    for n_kv in (1, 2):
        grouped, full = make({"n_kv_heads": n_kv}), make({})
        repeat = lambda w: w.view(n_kv, 8, -1).repeat_interleave(4 // n_kv, 0).reshape(32, 32)
        full.load_state_dict({n: repeat(w) if "k_proj" in n or "v_proj" in n else w for n, w in grouped.state_dict().items()})
        near(grouped(tokens(2)), full(tokens(2)))
    same = make({"n_kv_heads": 4})
    assert torch.equal(same(tokens(2)), make({})(tokens(2)))


# ---- laws

@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def m(request):
    return make(request.param)


def test_causality_to_the_bit(m):
    a = tokens(1)
    for place in (0, 7, T - 1):
        b = a.clone()
        b[0, place] = (b[0, place] + 1) % V
        if m.config.causal:
            assert torch.equal(m(a)[:, :place], m(b)[:, :place])
        else:
            assert place == 0 or not torch.equal(m(a)[:, :place], m(b)[:, :place])
        assert not torch.allclose(m(a)[:, place:], m(b)[:, place:])


def test_every_parameter_learns(m):
    m.double()                                                                # so that zero can be told from small
    F.cross_entropy(m(tokens(2)).transpose(1, 2), tokens(2, seed=1)).backward()
    useless = () if m.config.positions == "rope" else ("k_proj.bias",)       # a softmax does not notice a constant
    for name, p in m.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all()
        assert p.grad.abs().max() > 1e-12 or name.endswith(useless), name


def test_packed_is_separate(m):
    a, b = tokens(1, 7), tokens(1, 9, seed=1)
    positions = torch.cat((torch.arange(7), torch.arange(9)))[None]
    packed = m(torch.cat((a, b), 1), positions=positions, mask=document_mask(torch.tensor([[0] * 7 + [1] * 9]), m.config.causal))
    near(packed, torch.cat((m(a), m(b)), 1))


def test_cached_is_uncached_in_any_pieces(m):
    if not m.config.causal:
        pytest.skip("an encoder sees both sides")
    a, whole = tokens(3), m(tokens(3))
    for cuts in ((0, 12), (0, *range(1, 13)), (0, 5, 6, 7, 10, 12), (0, 1, 12)):
        cache = KVCache(m.config, 3, T)
        near(torch.cat([m(a[:, s:e], cache=cache) for s, e in zip(cuts, cuts[1:])], 1), whole)
        assert cache.length == T
    with pytest.raises(UserError, match="13 tokens do not fit"):
        m(a[:, :1], cache=cache)
    cache = KVCache(m.config, 3, T)
    m(a[:, :8], cache=cache)
    cache.keep(torch.tensor([True, False, True]))
    near(m(a[[0, 2], 8:], cache=cache), whole[[0, 2], 8:])


def test_rows_do_not_know_each_other(m):
    near(m(tokens(3)), torch.cat([m(row) for row in tokens(3)[:, None]]))


def test_first_loss_is_ln_V(m):
    wide = make({f.name: getattr(m.config, f.name) for f in dataclasses.fields(m.config)} | {"vocab_size": 500})
    ids = torch.randint(0, 500, (8, 33))
    loss = F.cross_entropy(wide(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss - math.log(500)) < 0.3


def test_bfloat16_is_near(m):
    ids, whole = tokens(2), m(tokens(2))
    scale = whole.std()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (m(ids).float() - whole).std() < 0.03 * scale
    assert (m.bfloat16()(ids).float() - whole).std() < 0.05 * scale


def test_dropout_is_for_training_only(m):
    config = dataclasses.replace(m.config, dropout=0.3)
    dropping = Transformer(config)
    dropping.load_state_dict(m.state_dict())
    assert torch.equal(dropping.eval()(tokens(2)), m(tokens(2)))
    assert not torch.equal(dropping.train()(tokens(2)), dropping(tokens(2)))
    assert torch.equal(m.train()(tokens(2)), m.eval()(tokens(2)))             # a share of 0 changes nothing
    assert (dropping.embed(tokens(1), torch.arange(T)) == 0).float().mean() > 0.1


def test_state_dict_round_trip_and_meta_device(m):
    state = {k: v.clone() for k, v in m.state_dict().items()}
    other = Transformer(m.config).eval()
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(tokens(2)), m(tokens(2)))
    with torch.device("meta"):
        empty = Transformer(m.config).eval()
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(state, assign=True)
    empty.fill_tables()
    assert torch.equal(empty(tokens(2)), m(tokens(2)))
    assert set(state) == {n for n, _ in m.named_parameters()}                  # tables are computed, never saved


def test_keep_and_too_long(m):
    keep = torch.rand(2, T) > 0.5
    near(m(tokens(2), keep=keep), m(tokens(2))[keep])
    with pytest.raises(UserError, match="33 tokens do not fit into max_seq_len=32"):
        m(tokens(1, 33))


def test_without_positions_an_encoder_sees_a_set():
    for change in ({}, {"n_kv_heads": 1}, {"qk_norm": True}, OLD):
        m, shuffle = make(change, positions="none", causal=False), torch.randperm(T, generator=torch.Generator().manual_seed(0))
        near(m(tokens(2))[:, shuffle], m(tokens(2)[:, shuffle]))


def test_biases_on_keys_matter_only_where_they_are_turned():
    for positions, matters in (("none", False), ("learned", False), ("rope", True)):
        m = make({"bias": True, "positions": positions, "norm": "layernorm"})
        before = m(tokens(1))
        for layer in m.layers:
            nn.init.normal_(layer.self_attn.k_proj.bias)
        assert ((m(tokens(1)) - before).abs().max() > 1e-4) == matters


@given(st.fixed_dictionaries({k: st.sampled_from(v) for k, v in CHOICES.items()} | {k: st.booleans() for k in ("qk_norm", "bias", "tie_embeddings")}
                             | {"n_kv_heads": st.sampled_from([1, 2, 4]), "n_layers": st.integers(1, 3), "head_dim": st.sampled_from([0, 2, 10])}))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_laws_for_any_recipe(change):
    m, a = make(change), tokens(2)
    whole = m(a)
    assert torch.equal(whole[:, :5], m(torch.cat((a[:, :5], tokens(2, 7, seed=9)), 1))[:, :5])
    cache = KVCache(m.config, 2, T)
    near(torch.cat([m(a[:, s:e], cache=cache) for s, e in ((0, 4), (4, 5), (5, 12))], 1), whole)
    m(a).square().mean().backward()
    assert all(p.grad is not None for p in m.parameters())


@pytest.mark.parametrize("change, expected", [
    ({"norm": "batchnorm"}, "batchnorm"), ({"activation": "tanh"}, "swiglu"), ({"positions": "alibi"}, "sinusoidal"), ({"norm_position": "both"}, "pre"),
    ({"n_heads": 5}, "multiple"), ({"n_kv_heads": 3}, "n_kv_heads=3"), ({"head_dim": 7}, "odd"), ({"dim": 33, "n_heads": 3, "positions": "sinusoidal"}, "odd"),
    ({"n_layers": 0}, "n_layers=0"), ({"vocab_size": 0}, "vocab_size=0"), ({"max_seq_len": -1}, "max_seq_len"), ({"dropout": 1.0}, "dropout"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"), ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor")])
def test_impossible_settings_are_refused_by_name(change, expected):
    with pytest.raises(UserError, match=expected):
        make(change)


def test_frequencies():
    plain = rope_frequencies(128, 500_000.0)
    scaled = rope_frequencies(128, 500_000.0, LLAMA3 | {"original_max_position_embeddings": 8192})
    ratio = plain / scaled
    assert ratio.min() == 1 and abs(ratio.max() - 8) < 1e-4 and (ratio.diff() >= -1e-4).all()


@pytest.mark.parametrize("change", [{"n_kv_heads": 2, "qk_norm": True}, OLD], ids=["modern", "2017"])
def test_compiled_is_the_same(change):
    "torch.compile sees the model as one graph, without a break, forward and backward. (No C++ is generated: compilers differ too much.)"
    m, ids = make(change, n_layers=1), tokens(2)
    compiled = torch.compile(m, fullgraph=True, dynamic=False, backend="aot_eager")
    gradients = []
    for f in (m, compiled):
        m.zero_grad()
        F.cross_entropy(f(ids).transpose(1, 2), tokens(2, seed=1)).backward()
        gradients.append([p.grad.clone() for p in m.parameters()])
    near(compiled(ids), m(ids))
    for a, b in zip(*gradients):
        near(a, b)


def test_the_model_is_short():
    "All of it, without blank lines, comments and docstrings, in some 250 lines; no function is long."
    source = Path(module.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source)
    docs = {line for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
            for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    code = [line for n, line in enumerate(source.splitlines(), 1) if n not in docs and line.strip() and not line.strip().startswith("#")]
    lengths = [node.end_lineno - node.lineno + 1 for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert len(code) <= 250, f"{len(code)} lines"
    assert max(lengths) <= 30 and sorted(lengths)[len(lengths) // 2] <= 15
