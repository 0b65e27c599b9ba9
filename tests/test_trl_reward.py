"""The committed values of TRL's RewardTrainer are what TRL gives; ours equal them. Needs trl."""
import json
import sys
from pathlib import Path

import pytest
import torch

from llm_course.reward import bradley_terry_loss
from llm_course.course import data_path

trl = pytest.importorskip("trl")
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))


@pytest.fixture(scope="module")
def made() -> dict:
    import trl_reward
    return trl_reward.fixture()


@pytest.mark.parametrize("case", ["plain", "margin", "centering", "both"])
def test_the_committed_file_is_what_trl_gives(made, case):
    kept = json.loads(data_path("trl_reward.json").read_text(encoding="utf-8"))
    for key, values in made["inputs"].items():
        assert kept["inputs"][key] == pytest.approx(values, abs=1e-12)
    a, b = kept["cases"][case], made["cases"][case]
    for key in ("loss", "grad_chosen", "grad_rejected", "logged"):
        assert a[key] == pytest.approx(b[key], abs=1e-12), key


@pytest.mark.parametrize("case", ["plain", "margin", "centering", "both"])
def test_our_loss_and_gradients_are_trls(made, case):
    x, c = ({k: torch.tensor(v, dtype=torch.float64) for k, v in made["inputs"].items()}, made["cases"][case])
    chosen, rejected = x["chosen"].requires_grad_(), x["rejected"].requires_grad_()
    loss = bradley_terry_loss(chosen, rejected, x["margin"] if c["with_margin"] else 0.0, c["centering"] or 0.0).mean()
    loss.backward()
    assert loss.item() == pytest.approx(c["loss"], abs=1e-12)
    assert chosen.grad.tolist() == pytest.approx(c["grad_chosen"], abs=1e-12)
    assert rejected.grad.tolist() == pytest.approx(c["grad_rejected"], abs=1e-12)
