"""What TRL's SFTTrainer gives on small random tensors: values, gradients and metrics of `compute_loss`, written to data/trl_sft.json.

The method is TRL's own, unmodified; its trainer is not started, but given what the method reads of it. The stand-in for a model returns given
logits, and its loss by transformers' `fixed_cross_entropy`, which is what every causal model of transformers calls (after a cast to float32, left out
here so that more digits can be compared). Needs trl 1.12.0.

    python benchmarks/trl_sft.py
"""
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.modeling_outputs import CausalLMOutput
from trl import SFTTrainer
from trl.trainer.sft_trainer import dft_loss

PATH = Path(__file__).resolve().parent.parent / "data" / "trl_sft.json"
SHAPE, V = (3, 7), 9


def batches() -> list[dict]:
    "Two micro-batches of padded rows: logits `[B, T, V]`, labels and attention mask `[B, T]`; prompts of different lengths."
    g, out = torch.Generator().manual_seed(6), []
    for lengths, prompts in (((7, 5, 6), (3, 1, 4)), ((4, 7, 3), (1, 5, 1))):
        labels, mask = torch.full(SHAPE, -100), torch.zeros(SHAPE, dtype=torch.long)
        for row, (n, p) in enumerate(zip(lengths, prompts)):
            mask[row, :n] = 1
            labels[row, p:n] = torch.randint(V, (n - p,), generator=g)
        out.append({"logits": torch.randn(*SHAPE, V, generator=g, dtype=torch.float64).mul(2).mul(1e6).round().div(1e6), "labels": labels, "attention_mask": mask})
    return out


class Given(torch.nn.Module):
    "A model that returns given logits, and a loss as transformers' causal models do."

    def __init__(self, logits: torch.Tensor, own_loss: bool):
        super().__init__()
        self.logits, self.own_loss = logits, own_loss

    def forward(self, labels=None, num_items_in_batch=None, **_):
        if not self.own_loss:
            return CausalLMOutput(logits=self.logits)
        shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
        return CausalLMOutput(logits=self.logits, loss=fixed_cross_entropy(self.logits.flatten(0, 1), shifted.flatten(), num_items_in_batch))


def trainer(model: Given, kind: str) -> SFTTrainer:
    "An SFTTrainer that was never started, with what `compute_loss` reads."
    t = SFTTrainer.__new__(SFTTrainer)
    t.model, t.aux_loss_enabled, t.label_smoother, t.model_accepts_loss_kwargs, t.num_virtual_tokens = model, False, None, True, 0
    t.compute_loss_func = dft_loss if kind == "dft" else None
    t.args = SimpleNamespace(use_liger_kernel=False, loss_type=kind, average_tokens_across_devices=False, n_gpu=0)
    t.accelerator = SimpleNamespace(gather_for_metrics=lambda x: x, parallelism_config=None, num_processes=1)
    t._metrics, t._total_train_tokens = {"train": defaultdict(list), "eval": defaultdict(list)}, 0
    return t


def called(batch: dict, kind: str, items: int | None) -> tuple[float, list, dict]:
    "Value, gradient of the logits and metrics of TRL's `compute_loss` on one micro-batch."
    logits = batch["logits"].clone().requires_grad_()
    model = Given(logits, kind == "nll").train()
    t = trainer(model, kind)
    inputs = {"labels": batch["labels"].clone(), "attention_mask": batch["attention_mask"]}
    loss = t.compute_loss(model, inputs, num_items_in_batch=None if items is None else torch.tensor(items))
    loss.backward()
    return loss.item(), logits.grad, {k: v[0] for k, v in t._metrics["train"].items() if k != "num_tokens"}


def whole(kind: str) -> dict:
    "A step of two micro-batches, as transformers' Trainer adds them up: each divided by the labels of both."
    parts = batches()
    items = sum(int((b["labels"][:, 1:] != -100).sum()) for b in parts)
    found = [called(b, kind, items) for b in parts]
    return {"value": sum(v for v, _, _ in found), "gradients": [g.tolist() for _, g, _ in found], "metrics": [m for *_, m in found]}


def one_by_one() -> dict:
    "Each example by itself and without a count, averaged: what gradient accumulation over single examples did before transformers passed the count."
    rows = [{k: v[i:i + 1] for k, v in b.items()} for b in batches() for i in range(SHAPE[0])]
    found = [called(r, "nll", None) for r in rows]
    grads = torch.cat([g for _, g, _ in found]) / len(rows)
    return {"value": sum(v for v, _, _ in found) / len(rows), "gradients": [g.tolist() for g in grads.split(SHAPE[0])]}


def fixture() -> dict:
    inputs = [{k: v.tolist() for k, v in b.items()} for b in batches()]
    return {"command": "python benchmarks/trl_sft.py", "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]},
            "inputs": inputs, "nll": whole("nll"), "dft": whole("dft"), "nll one by one": one_by_one()}


if __name__ == "__main__":
    if trl.__version__ != "1.12.0":
        sys.exit(f"trl is {trl.__version__}; install 1.12.0")
    PATH.write_text(json.dumps(fixture(), separators=(",", ":")) + "\n")
    print(PATH.name, PATH.stat().st_size, "bytes")
