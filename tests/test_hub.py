"""Folders of models: what transformers makes we read, what we make it reads, and no configuration is misread in silence."""
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_course.hub import HARMLESS, from_hf, from_hf_config, hf_config, hf_format, hf_tensors, read_weights, to_hf, weight_files, write_tensors
from llm_course.model import ModelConfig, Transformer
from llm_course.reading import UserError

FUZZ = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
IDS = torch.randint(0, 60, (2, 15), generator=torch.Generator().manual_seed(0))
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROPES = st.sampled_from([None, {"rope_type": "default"}, {"rope_type": "linear", "factor": 2.5}, LLAMA3])


def shaken(model, seed=0):
    "All parameters away from their initial values, so that a lost bias or gain shows."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return model.eval()


@st.composite
def foreign(draw):
    "Family and settings of a small model of transformers."
    kind = draw(st.sampled_from(["llama", "qwen2", "qwen3", "mistral", "eurobert", "gpt2"]))
    heads, per = draw(st.integers(1, 4)), draw(st.sampled_from([4, 6, 8]))
    base = {"vocab_size": 60, "tie_word_embeddings": draw(st.booleans()), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if kind == "gpt2":
        return kind, base | {"n_embd": heads * per, "n_head": heads, "n_layer": draw(st.integers(1, 2)), "n_positions": 32, "n_inner": draw(st.sampled_from([None, 20])),
                             "activation_function": draw(st.sampled_from(["gelu_new", "gelu", "relu", "gelu_pytorch_tanh"])), "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3]))}
    rope = draw(ROPES)
    out = base | {"hidden_size": heads * per, "num_attention_heads": heads, "num_hidden_layers": draw(st.integers(1, 2)), "intermediate_size": 20,
                  "num_key_value_heads": draw(st.sampled_from([d for d in range(1, heads + 1) if heads % d == 0])), "max_position_embeddings": 32,
                  "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])), "rope_parameters": rope and rope | {"rope_theta": draw(st.sampled_from([100.0, 10_000.0, 5e5]))}}
    if kind != "qwen2" and draw(st.booleans()) or kind == "qwen3":
        out["head_dim"] = draw(st.sampled_from([4, 8, 10]))
    if kind in ("llama", "qwen3", "eurobert"):
        out["attention_bias"] = draw(st.booleans())
    if kind == "llama":
        out["mlp_bias"] = draw(st.booleans())
    return kind, out | ({"sliding_window": None} if kind == "mistral" else {})


@settings(FUZZ, max_examples=50)
@given(foreign(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.sampled_from([300, 10**9]), st.sampled_from(["as is", "v4"]))
def test_what_transformers_saves_gives_equal_logits(tmp_path_factory, model, dtype, shard, dialect):
    tf = pytest.importorskip("transformers")
    tf.utils.logging.disable_progress_bar()
    folder, (kind, options) = tmp_path_factory.mktemp("hf"), model
    auto = tf.AutoModelForMaskedLM if kind == "eurobert" else tf.AutoModelForCausalLM
    shaken(auto.from_config(tf.AutoConfig.for_model(kind, **options), attn_implementation="sdpa")).to(dtype).save_pretrained(folder, max_shard_size=shard)
    theirs = auto.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
    if dialect == "v4":
        config = json.loads((folder / "config.json").read_text())
        if rope := config.pop("rope_parameters", None):
            config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if rope["rope_type"] == "default" else {("type" if k == "rope_type" else k): v for k, v in rope.items()}}
        (folder / "config.json").write_text(json.dumps(config))
    ours = from_hf(folder)
    with torch.no_grad():
        gap = (theirs(IDS).logits - ours(IDS)).abs().max().item()
    assert gap < 1e-5 if kind == "gpt2" else gap == 0, (kind, options, gap)
    assert len(weight_files(folder)) > 1 or shard > 300


@st.composite
def configurations(draw):
    heads = draw(st.integers(1, 4))
    pick = lambda *values: draw(st.sampled_from(values))
    old = draw(st.booleans())
    return ModelConfig(60, dim=heads * 8, n_layers=draw(st.integers(1, 2)), n_heads=heads, n_kv_heads=pick(0, 1), head_dim=pick(0, 0, 4, 10), ffn_dim=pick(0, 20), max_seq_len=32,
                       norm=pick("layernorm", "layernorm", "rmsnorm") if old else "rmsnorm", norm_position=pick("pre", "pre", "pre", "post"),
                       positions=pick("learned", "learned", "learned", "sinusoidal") if old else pick("rope", "rope", "rope", "none"),
                       activation=pick("gelu_tanh", "gelu", "relu") if old else pick("swiglu", "swiglu", "swiglu", "relu"), rope_theta=pick(100.0, 1e4),
                       rope_scaling=pick(None, None, LLAMA3, {"rope_type": "linear", "factor": 2.0}), norm_eps=pick(1e-6, 1e-4), tie_embeddings=draw(st.booleans()),
                       qk_norm=pick(False, False, True), bias=old or draw(st.booleans()), qkv_bias=pick(None, True), out_bias=pick(None, None, False),
                       mlp_bias=pick(None, None, False), causal=pick(True, True, False))


@settings(FUZZ, max_examples=80)
@given(configurations())
def test_our_model_is_refused_by_name_or_loads_with_equal_logits(tmp_path_factory, c):
    tf = pytest.importorskip("transformers")
    tf.utils.logging.disable_progress_bar()
    folder, model = tmp_path_factory.mktemp("ours"), shaken(Transformer(c))
    try:
        kind = hf_format(c)
    except UserError as e:
        assert any(f"{k}=" in str(e) for k in ModelConfig.__dataclass_fields__), str(e)
        with pytest.raises(UserError):
            to_hf(model, folder)
        assert not list(folder.iterdir())
        return
    to_hf(model, folder)
    auto = tf.AutoModelForMaskedLM if kind == "eurobert" else tf.AutoModelForCausalLM
    theirs, info = auto.from_pretrained(folder, attn_implementation="sdpa", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        gap = (theirs.eval()(IDS).logits - model(IDS)).abs().max().item()
        assert torch.equal(from_hf(folder)(IDS), model(IDS))
    assert gap < 1e-5 if kind == "gpt2" else gap == 0, (kind, gap)


KEYS = sorted(HARMLESS)[:5] + ["model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act",
                               "sliding_window", "use_sliding_window", "layer_types", "tie_word_embeddings", "attention_bias", "rms_norm_eps", "max_position_embeddings",
                               "architectures", "num_labels", "id2label", "partial_rotary_factor", "quantization_config", "n_embd", "n_inner", "activation_function", "anything"]
JSON = st.recursive(st.none() | st.booleans() | st.integers(-5, 100) | st.floats() | st.text(max_size=8) | st.sampled_from(["llama", "qwen2", "mistral", "gpt2", "linear", "llama3"]),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta", "0"]) | st.text(max_size=4), x, max_size=4), max_leaves=6)
BASES = [hf_config(ModelConfig(60, dim=16, n_layers=1, n_heads=2, **change)) for change in ({}, {"qkv_bias": True}, {"qk_norm": True}, {"causal": False})] + [
    hf_config(ModelConfig(60, dim=16, n_heads=2, norm="layernorm", positions="learned", activation="gelu", bias=True))]


@settings(FUZZ, max_examples=400)
@given(st.sampled_from(BASES), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4) | JSON)
def test_any_configuration_is_read_or_refused(base, change):
    h = base | change if isinstance(change, dict) else change
    try:
        assert isinstance(from_hf_config(h), ModelConfig)
    except UserError as e:
        assert str(e)


@settings(FUZZ, max_examples=100)
@given(st.binary(max_size=300), st.sampled_from(["config.json", "model.safetensors", "model.safetensors.index.json"]))
def test_any_bytes_in_a_folder_are_a_user_error(tmp_path_factory, data, name):
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_text(json.dumps(BASES[0]))
    if name != "model.safetensors.index.json":
        (folder / "model.safetensors").write_bytes(b"")
    (folder / name).write_bytes(data)
    with pytest.raises(UserError):
        from_hf(folder)


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_a_cut_file_is_a_user_error(tmp_path, cut):
    to_hf(Transformer(ModelConfig(60, dim=16, n_layers=1, n_heads=2)), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:cut])
    with pytest.raises(UserError, match="damaged"):
        from_hf(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)
    (tmp_path / "config.json").write_text(json.dumps(BASES[0]))
    torch.save(Trap(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles only"):
        from_hf(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_foreign_safetensors_beside_the_model_are_not_mixed_in(tmp_path):
    "Some repositories hold the same weights twice, under other names (consolidated.safetensors), or an adapter."
    model = shaken(Transformer(ModelConfig(60, dim=16, n_layers=1, n_heads=2)))
    to_hf(model, tmp_path)
    write_tensors({"x": torch.ones(3)}, tmp_path / "adapter_model.safetensors")
    assert set(read_weights(tmp_path)[1]) == set(hf_tensors(model))
    assert torch.equal(from_hf(tmp_path)(IDS), model(IDS))
