"""Losses, gradients and logged figures of TRL's RewardTrainer on small random tensors, for `data/trl_reward.json`.

TRL's method `compute_loss` is called as it is, in float64, with stand-ins for the trainer and for a model that returns given rewards."""
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

PATH = Path(__file__).resolve().parent.parent / "data" / "trl_reward.json"
CASES = {"plain": (False, None), "margin": (True, None), "centering": (False, 0.3), "both": (True, 0.01)}
PAIRS = 6


def inputs() -> dict[str, list[float]]:
    "Rewards of the chosen and of the rejected answers, and a margin for each pair."
    draw = torch.Generator().manual_seed(7)
    normal = lambda scale: (scale * torch.randn(PAIRS, generator=draw, dtype=torch.float64)).tolist()
    return {"chosen": normal(2.0), "rejected": normal(2.0), "margin": torch.rand(PAIRS, generator=draw, dtype=torch.float64).tolist()}


def trl_loss(x: dict[str, list[float]], with_margin: bool, centering: float | None) -> dict:
    "What TRL gives for these rewards: its loss, the gradients, and what it logs."
    from trl import RewardTrainer
    logits = torch.tensor([*x["chosen"], *x["rejected"]], dtype=torch.float64).requires_grad_()
    keep = SimpleNamespace(gather=lambda t: t, gather_for_metrics=lambda t: t)
    trainer = SimpleNamespace(model=SimpleNamespace(training=True), args=SimpleNamespace(center_rewards_coefficient=centering), accelerator=keep, _total_train_tokens=0,
                              _metrics={"train": {k: [] for k in ("num_tokens", "min_reward", "mean_reward", "max_reward", "accuracy", "margin")}})
    batch = {"input_ids": torch.ones(2 * PAIRS, 1, dtype=torch.long), "attention_mask": torch.ones(2 * PAIRS, 1, dtype=torch.long)}
    batch |= {"margin": torch.tensor(x["margin"], dtype=torch.float64)} if with_margin else {}
    loss = RewardTrainer.compute_loss(trainer, lambda **kw: SimpleNamespace(logits=logits[:, None]), batch)
    loss.backward()
    logged = {k: trainer._metrics["train"][k][0] for k in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward")}
    return {"loss": loss.item(), "grad_chosen": logits.grad[:PAIRS].tolist(), "grad_rejected": logits.grad[PAIRS:].tolist(), "logged": logged}


def fixture() -> dict:
    "The whole content of the file."
    x = inputs()
    cases = {name: {"with_margin": m, "centering": c} | trl_loss(x, m, c) for name, (m, c) in CASES.items()}
    return {"what": "RewardTrainer.compute_loss of TRL, unmodified, on random rewards of six pairs in float64", "command": "python benchmarks/trl_reward.py",
            "versions": {p: version(p) for p in ("trl", "torch")}, "inputs": x, "cases": cases}


if __name__ == "__main__":
    PATH.write_text(json.dumps(fixture(), indent=1) + "\n", encoding="utf-8")
    print(f"written: data/{PATH.name}", file=sys.stderr)
