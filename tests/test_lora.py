"""Adapters against peft and transformers, exact merges, a run that is killed, and two processes. Run as a program it is one of the processes: test_lora.py FOLDER."""
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llm_course.checkpoint import checkpoints
from llm_course.generate import generate
from llm_course.hub import to_hf
from llm_course.lora import LoRALinear, add_lora, load_lora, lora_layers, merge_lora, merged_lora, remove_lora, save_lora
from llm_course.model import ModelConfig, Transformer
from llm_course.packing import pack_examples, packed_loss, stack_rows
from llm_course.reading import UserError
from llm_course.sft import sft_loss
from llm_course.step import TrainConfig
from llm_course.trainer import Callback, Trainer

ROOT = Path(__file__).resolve().parent.parent


def small(**kw) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**{"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 24} | kw)).eval()


def adapted(seed: int = 1, model: Transformer | None = None, moved: bool = True, **kw) -> Transformer:
    "A small model with adapters that are not zero."
    model = model or small()
    torch.manual_seed(seed)
    add_lora(model, **{"rank": 4, "alpha": 8.0} | kw)
    for layer in lora_layers(model).values() if moved else ():
        nn.init.normal_(layer.lora_B, std=0.2)
    return model


IDS = torch.randint(0, 60, (3, 20), generator=torch.Generator().manual_seed(0))


def rows(n: int = 23) -> list[dict]:
    "Packed rows of random examples, the first half of each without labels."
    g, examples = torch.Generator().manual_seed(2), []
    for k in range(n):
        ids = torch.randint(3, 60, (4 + k % 7,), generator=g).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2:]})
    return pack_examples(examples, 24, 1)


# ---- merged and taken apart

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-4, 0.1, 1.0, 1e4]))
def test_unmerging_is_exact(dtype, seed, scale):
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(9, 7, dtype=dtype), 3, scale)
    nn.init.normal_(layer.lora_B)
    before, x = layer.base.weight.detach().clone(), torch.randn(2, 9, dtype=dtype)
    out = layer(x)
    layer.merge()
    assert scale < 1 or not torch.equal(layer.base.weight, before)      # a small update is lost in bf16 altogether
    torch.testing.assert_close(layer(x).float(), out.float(), rtol=0.05 if dtype == torch.bfloat16 else 1e-4, atol=0.1 * scale if dtype == torch.bfloat16 else 1e-3 * scale)
    layer.unmerge()
    assert torch.equal(layer.base.weight, before) and torch.equal(layer(x), out)


def test_a_base_under_several_adapters_is_the_base():
    model, state = small(), {k: v.clone() for k, v in small().state_dict().items()}
    for seed in range(3):
        adapted(seed, model)
        with merged_lora(model):
            model(IDS)
        remove_lora(model)
    assert model.state_dict().keys() == state.keys() and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_merged_model_writes_the_same_words():
    model = adapted()
    prompts = [r.tolist()[:6] for r in IDS]
    with_adapters = generate(model, prompts, 12, 2, 1)
    with merged_lora(model):
        assert generate(model, prompts, 12, 2, 1) == with_adapters
    assert generate(merge_lora(model), prompts, 12, 2, 1) == with_adapters


# ---- peft

def peft_of(base: Transformer, folder: Path, **options):
    "transformers' Llama with the weights of `base`, wrapped by peft."
    peft, transformers = pytest.importorskip("peft", reason="peft is not installed"), pytest.importorskip("transformers")
    to_hf(base, folder)
    llama = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    return peft.get_peft_model(llama, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]} | options))


def test_the_fixture_is_what_peft_gives():
    pytest.importorskip("peft", reason="peft is not installed")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import peft_lora
    kept, now = json.loads(peft_lora.PATH.read_text()), json.loads(json.dumps(peft_lora.fixture()))
    for name in ("lora", "rslora"):
        assert kept["tensors"] == now["tensors"] and all(torch.allclose(*(torch.tensor(x[name][k], dtype=torch.float64) for x in (kept, now)), rtol=0, atol=1e-12) for k in kept[name])


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"targets": ("q_proj", "o_proj")}], ids=["plain", "rslora", "two layers"])
@pytest.mark.parametrize("tied", [True, False])
def test_peft_loads_what_we_save(tmp_path, options, tied):
    peft, transformers = pytest.importorskip("peft", reason="peft is not installed"), pytest.importorskip("transformers")
    base = small(tie_embeddings=tied)
    to_hf(base, tmp_path / "base")
    model = adapted(model=base, **options)
    save_lora(model, tmp_path / "adapter", base="base")
    theirs = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="sdpa"), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=0, atol=1e-5)
        merged, theirs = merge_lora(model).state_dict(), theirs.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[k], theirs[f"model.{k}"], rtol=0, atol=1e-6) for k in merged if "lm_head" not in k)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": "all-linear"}, {"lora_dropout": 0.1}], ids=str)
def test_we_load_what_peft_saves(tmp_path, options):
    theirs = peft_of(small(), tmp_path / "base", **options)
    torch.manual_seed(3)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_lora(small(), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), theirs.eval()(IDS).logits, rtol=0, atol=1e-5)
    assert {layer.dropout.p for layer in lora_layers(model).values()} == {options.get("lora_dropout", 0.0)}


def test_gradients_are_those_of_peft(tmp_path):
    model, theirs = adapted(targets=("q_proj", "v_proj", "down_proj")), peft_of(small(), tmp_path / "base")
    own = {f"base_model.model.model.{name}.lora_{k}.default.weight": getattr(m, f"lora_{k}") for name, m in lora_layers(model).items() for k in "AB"}
    trained = {k: p for k, p in theirs.named_parameters() if p.requires_grad}
    assert trained.keys() == own.keys()
    for k, p in trained.items():
        p.data.copy_(own[k])
    labels = IDS.masked_fill(torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.5, -100)
    theirs(IDS, labels=labels).loss.backward()
    loss, n, _ = packed_loss(model, {"input_ids": IDS, "labels": labels, "doc_ids": torch.zeros_like(IDS)})
    (loss / n).backward()
    for k, p in trained.items():
        torch.testing.assert_close(own[k].grad, p.grad, rtol=0, atol=1e-6)
    assert all(p.grad is None for n, p in model.named_parameters() if "lora" not in n)


@pytest.mark.parametrize("options, named", [({"use_dora": True}, "use_dora"), ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern")])
def test_what_is_no_plain_lora_is_refused(tmp_path, options, named):
    peft_of(small(), tmp_path / "base", **options).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=named):
        load_lora(small(), tmp_path / "adapter")


def test_adapters_of_some_layers_only_are_refused(tmp_path):
    peft_of(small(), tmp_path / "base", layers_to_transform=[0]).save_pretrained(tmp_path / "adapter")
    model = small()
    with pytest.raises(UserError, match="do not fit"):
        load_lora(model, tmp_path / "adapter")
    assert not lora_layers(model)


# ---- training

class Kill(Callback):
    def __init__(self, step: int):
        self.step = step

    def after_step(self, trainer, record):
        if record["step"] == self.step:
            raise KeyError("killed")


def trainer_of(folder=None, callbacks=(), loss=sft_loss, **kw) -> Trainer:
    config = TrainConfig(**{"steps": 6, "batch_size": 4, "micro_batch": 2, "lr": 0.02, "log_every": 1, "checkpoint_every": 2, "seed": 5} | kw)
    return Trainer(adapted(dropout=0.2, moved=False), loss, rows(), config, stack_rows, folder, callbacks)


def by_example(model, batch):
    return sft_loss(model, batch, by="example")


@pytest.mark.parametrize("killed", [3, 5])
def test_a_killed_run_ends_in_the_same_bits(tmp_path, killed):
    "With dropout, and with everything but the adapters frozen."
    whole = trainer_of(tmp_path / "whole")
    whole.fit()
    with pytest.raises(KeyError):
        trainer_of(tmp_path / "killed", [Kill(killed)]).fit()
    resumed = trainer_of(tmp_path / "killed")
    resumed.fit()
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(v, a[k.replace("_proj.", "_proj.base.")]) for k, v in small().state_dict().items())      # the frozen part is the base still
    assert checkpoints(tmp_path / "killed") and [r["loss"] for r in whole.history] == [r["loss"] for r in resumed.history]


@pytest.mark.parametrize("loss", [sft_loss, by_example])
def test_pieces_of_a_step_add_up(loss):
    "One batch, or micro-batches: the same weights. The mean by example is one over the whole step, too."
    found = []
    for micro in (0, 1, 3):
        t = Trainer(adapted(moved=False), loss, rows(), TrainConfig(steps=3, batch_size=4, micro_batch=micro, lr=0.02, log_every=1), stack_rows)
        t.fit()
        found.append([r["loss"] for r in t.history])
    assert max(abs(a - b) for other in found[1:] for a, b in zip(found[0], other)) < 1e-5


def told(folder: Path) -> None:
    "What this process learned: losses of two runs, a digest of all weights, which weights moved. The main one writes it down."
    torch.set_num_threads(1)
    out = {}
    for name, loss in (("token", sft_loss), ("example", by_example)):
        t = Trainer(adapted(moved=False), loss, rows(), TrainConfig(steps=5, batch_size=5, micro_batch=2, lr=0.02, eps=1e-6, log_every=1), stack_rows, folder / name)
        t.fit()
        state, base = t.weights(everywhere=True), small().state_dict()
        moved = [k for k, v in base.items() if not torch.equal(v, state[k.replace("_proj.", "_proj.base.")])]
        out[name] = {"losses": [r["loss"] for r in t.history if "loss" in r], "moved": moved, "digest": hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest(),
                     "accuracy": [r["mean_token_accuracy"] for r in t.history if "loss" in r]}
    (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(out))


def test_two_processes_learn_what_one_does(tmp_path):
    from commands import as_launched
    found = {}
    for n in (1, 2):
        folder = tmp_path / str(n)
        folder.mkdir()
        processes = as_launched(n, Path(__file__).resolve(), folder, ACCELERATE_USE_CPU="yes")
        said = [p.communicate(timeout=240)[0] for p in processes]
        assert [p.returncode for p in processes] == [0] * n, said[0][-3000:]
        found[n] = [json.loads((folder / f"{r}.json").read_text()) for r in range(n)]
    for name in ("token", "example"):
        one, (a, b) = found[1][0][name], (f[name] for f in found[2])
        assert a["digest"] == b["digest"] and one["moved"] == a["moved"] == b["moved"] == []
        for key in ("losses", "accuracy"):
            assert max(abs(x - y) for x, y in zip(one[key], a[key], strict=True)) < 1e-5
    assert found[1][0]["token"]["losses"] != found[1][0]["example"]["losses"]


if __name__ == "__main__":
    told(Path(sys.argv[1]))
