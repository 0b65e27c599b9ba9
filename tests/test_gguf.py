"""GGUF files: read back as they were written, damaged ones refused, and the real model where its file is at hand (LLM_COURSE_SMOLLM2)."""
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_course.model import ModelConfig, Transformer
from llm_course.reading import UserError
from llm_course.tokenizer import Tokenizer, train_tokenizer
from timing import assert_linear, cpu_seconds

gguf = pytest.importorskip("gguf")
from llm_course.gguf_io import KINDS, find_smollm2, from_gguf, gguf_config, gguf_tokenizer, half_split, interleave, pre_name, pre_tokenizer_of, read_gguf, to_gguf, tokenizer_fields  # noqa: E402

FUZZ = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = "The mill sold 12 sacks in 1969. It's a fine day, isn't it?\n\nZoë paid $2.50 — for 3 loaves; x = {'a': [1, 2]}\n" * 20
TOKENIZER = train_tokenizer([TEXT], 330)
FIELDS = tokenizer_fields(TOKENIZER, 336)
IDS = torch.randint(0, 336, (2, 12), generator=torch.Generator().manual_seed(0))
CHARACTERS = st.text(st.sampled_from("ab1 9\n\t'ſsS.,$<>|endofx{}éß²½日本🙂\u200b\u00a0\r") | st.characters(exclude_categories=["Cs"]), max_size=40)


def model(**change) -> Transformer:
    out = Transformer(ModelConfig(336, **{"dim": 32, "n_layers": 2, "n_heads": 4, "ffn_dim": 64, "max_seq_len": 64} | change)).eval()
    with torch.no_grad():
        for p in out.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return out


@settings(FUZZ, max_examples=40)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([0, 4, 10]), st.booleans(), st.sampled_from([{}, {"bias": True}, {"qkv_bias": True, "out_bias": True}, {"mlp_bias": True}]),
       st.sampled_from([None, {"rope_type": "linear", "factor": 2.5}]), st.sampled_from([100.0, 1e6]), st.sampled_from([1e-6, 1e-5, 3e-4]))
def test_float32_comes_back_bit_for_bit(tmp_path_factory, n_kv_heads, head_dim, tie, bias, scaling, theta, eps):
    ours = model(n_kv_heads=n_kv_heads, head_dim=head_dim, tie_embeddings=tie, rope_scaling=scaling, rope_theta=theta, norm_eps=eps, **bias)
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    assert set(to_gguf(ours, TOKENIZER, path, "F32")) == {"F32"}
    again, words = from_gguf(path)
    assert again.config == ours.config and [p.name for p in path.parent.iterdir()] == ["m.gguf"]
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in again.state_dict().items())
    assert torch.equal(again(IDS), ours(IDS)) and words.encode(TEXT) == TOKENIZER.encode(TEXT)


@pytest.mark.parametrize("kind", list(KINDS))
def test_types_and_their_errors(tmp_path, kind):
    ours = model()
    types = to_gguf(ours, TOKENIZER, tmp_path / "m.gguf", kind)
    again = from_gguf(tmp_path / "m.gguf")[0]
    errors = [(a - b).abs().max().item() / b.abs().max().item() for (_, a), (_, b) in zip(again.named_parameters(), ours.named_parameters())]
    assert sum(types.values()) == 20 and types[kind] >= 15
    assert max(errors) <= {"F32": 0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2, "Q5_1": 0.05, "Q5_0": 0.1, "Q4_1": 0.1, "Q4_0": 0.2}[kind]


def test_what_cannot_be_written_is_refused_by_name(tmp_path):
    for change, message in [({"qk_norm": True}, "qwen3"), ({"causal": False}, "eurobert"), ({"norm_position": "post"}, "norm_position"),
                            ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 32}}, "rope_scaling")]:
        with pytest.raises(UserError, match=message):
            to_gguf(model(**change), TOKENIZER, tmp_path / "m.gguf")
    with pytest.raises(UserError, match="Q4_K"):
        to_gguf(model(), TOKENIZER, tmp_path / "m.gguf", "Q4_K")
    with pytest.raises(UserError, match=f"{len(TOKENIZER)} tokens for 200 rows"):
        to_gguf(Transformer(ModelConfig(200, dim=32)), TOKENIZER, tmp_path / "m.gguf")
    bad = model()
    bad.norm.weight.data[0] = math.nan
    with pytest.raises(UserError, match="NaN"):
        to_gguf(bad, TOKENIZER, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_left_over_and_missing_tensors_are_named(tmp_path):
    def written(change):
        ours, writer = model(), gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        to_gguf(ours, TOKENIZER, tmp_path / "base.gguf", "F32")
        fields, tensors = read_gguf(tmp_path / "base.gguf")
        for key, v in fields.items():
            if key != "general.architecture":
                {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[type(v)](key, v)
        for name, data in ({n: t.data.copy() for n, t in tensors.items()} | change).items():
            if data is not None:
                writer.add_tensor(name, data)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
            step()
        return tmp_path / "m.gguf"
    x = torch.ones(32).numpy()
    for change, message in [({"blk.0.attn_q_norm.weight": x}, "attn_q_norm.weight is left over"), ({"blk.1.ffn_up.weight": None}, "up_proj.weight is missing"),
                            ({"blk.0.attn_norm.weight": x[:8].copy()}, "is \\[8\\] instead of \\[32\\]"), ({"rope_freqs.weight": x}, "Llama 3.1")]:
        with pytest.raises(UserError, match=message):
            from_gguf(written(change))


@settings(FUZZ, max_examples=60)
@given(st.binary(max_size=200), st.integers(0, 4000), st.integers(0, 8))
def test_damaged_files_are_user_errors(tmp_path_factory, junk, at, mode):
    folder = tmp_path_factory.mktemp("damaged")
    to_gguf(model(n_layers=1), TOKENIZER, folder / "m.gguf", "Q8_0")
    whole = (folder / "m.gguf").read_bytes()
    (folder / "m.gguf").write_bytes(junk if mode == 0 else whole[:at * 7] if mode == 1 else whole[:at] + junk + whole[at + len(junk):])
    try:
        from_gguf(folder / "m.gguf")      # junk among the numbers or in a name cannot be noticed
    except UserError as e:
        assert str(e)


@settings(FUZZ, max_examples=200)
@given(CHARACTERS)
def test_ids_of_any_text_survive_the_file(text):
    again = gguf_tokenizer(FIELDS)
    assert again.encode(text) == TOKENIZER.encode(text)
    assert again.decode(again.encode(text), skip_special=False) == TOKENIZER.decode(TOKENIZER.encode(text), skip_special=False) == text


@settings(FUZZ, max_examples=150)
@given(st.dictionaries(st.sampled_from([k for k in FIELDS] + ["general.type", "llama.block_count", "llama.rope.freq_base", "llama.expert_count", "split.count", "new.key"]),
                       st.none() | st.booleans() | st.integers(-3, 400) | st.floats() | st.text(max_size=5) | st.lists(st.text(max_size=3) | st.integers(0, 9), max_size=4), max_size=3))
def test_any_settings_are_read_or_refused(change):
    sizes = {"general.architecture": "llama", "llama.embedding_length": 32, "llama.block_count": 1, "llama.attention.head_count": 4, "llama.feed_forward_length": 64,
             "llama.context_length": 64, "llama.attention.layer_norm_rms_epsilon": 1e-5}
    embedding = {"token_embd.weight": type("T", (), {"shape": [32, 336]})}
    for read in (lambda f: gguf_config(f, embedding), gguf_tokenizer):
        try:
            assert isinstance(read(FIELDS | sizes | change), (ModelConfig, Tokenizer))
        except UserError as e:
            assert str(e)


@settings(FUZZ, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 3))
def test_reordering_is_undone(heads, half, extra):
    w = torch.randn(heads * 2 * half, *([3] if extra else []))
    assert torch.equal(half_split(interleave(w, heads), heads), w)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "default"])
def test_cuts_lose_nothing_and_are_recognised(name):
    cut = pre_tokenizer_of(name)
    trained = train_tokenizer([TEXT], 330, pre_tokenizer=cut)
    assert pre_name(trained.fast) == name
    for text in (TEXT, "  a  \n\n b\t1234567 it's IT'S <|end|>", "", "日本 1½² 🙂"):
        assert trained.decode(trained.encode(text), skip_special=False) == text
    for unit in ("a ", "1", "'", "\n", "é", "(("):
        assert_linear(lambda n: cpu_seconds(cut.pre_tokenize_str, unit * (n // len(unit))), 200_000)


def test_cuts_agree_with_published_spellings():
    "As the tokenizer.json of SmolLM2, GPT-2, Llama 3 and Qwen2 spell theirs."
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    byte = lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    spellings = {"smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte(True)]), "gpt-2": byte(True),
                 "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern % "{1,3}"), "isolated"), byte(False)]),
                 "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern % ""), "isolated"), byte(False)])}
    for name, spelling in spellings.items():
        fast = Fast(models.BPE())
        fast.pre_tokenizer = spelling
        assert pre_name(fast) == name


@pytest.fixture(scope="module")
def real():
    "SmolLM2-135M-Instruct, where its file is at hand."
    try:
        return from_gguf(find_smollm2())
    except UserError as e:
        pytest.skip(str(e))


def test_smollm2_knows_the_capital_of_france(real):
    ours, words = real
    with torch.no_grad():
        p = ours(torch.tensor([words.encode("The capital of France is")]))[0, -1].softmax(-1)
    assert words.decode([p.argmax().item()]) == " Paris" and abs(p.max().item() - 0.77) < 0.01
    assert sum(q.numel() for q in ours.parameters()) == 134_515_008


def test_smollm2_has_the_recorded_perplexity(real, testdata):
    ours, words = real
    text = (testdata / "pretrain" / "wikitext-2" / "test.txt").read_text(encoding="utf-8")
    ids = torch.tensor(words.encode(text[:40_000])[:1024])
    with torch.no_grad():
        perplexity = F.cross_entropy(ours(ids[None])[0, :-1], ids[1:]).exp().item()
    record = json.loads((Path(__file__).parent.parent / "data" / "runs" / "smollm.json").read_text())["figures"]
    assert perplexity == pytest.approx(10.96, abs=0.01) and perplexity == pytest.approx(record["ours"]["perplexity"], rel=1e-4)


def test_smollm2_agrees_with_transformers_and_its_chat(real, tmp_path):
    transformers = pytest.importorskip("transformers")
    from llm_course.hub import to_hf
    ours, words = real
    to_hf(ours, tmp_path, words, dtype=torch.bfloat16)
    talk = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}, {"role": "user", "content": "And in 1969?"}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"] == words.chat(talk, add_generation_prompt=True)[0]
    again = Tokenizer.load(tmp_path)
    assert again.chat(talk)[0] == words.chat(talk)[0] and again.end_id == words.end_id
