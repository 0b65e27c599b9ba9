"""The committed fixtures are what TRL gives, where TRL is installed; and the chapter's losses equal them in value, gradient and metrics."""
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from llm_course.preference import METHODS, answer_logps, kto_kl, preference_loss, sft_term
from llm_course.tasks import IGNORE

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = json.loads((ROOT / "data" / "trl_preference.json").read_text())
X = {k: torch.tensor(v, dtype=torch.float64 if "logits" in k else torch.long) for k, v in FIXTURE["inputs"].items()}
S = FIXTURE["settings"]
SAME = {"dpo": {"kind": "dpo"}, "cdpo": {"kind": "dpo", "label_smoothing": 0.1}, "robust": {"kind": "robust", "label_smoothing": 0.1}, "hinge": {"kind": "hinge"},
        "ipo": {"kind": "ipo"}, "normed": {"kind": "normed"}, "cpo_smooth": {"kind": "cpo", "alpha": 0, "label_smoothing": 0.1},
        "simpo": {"kind": "simpo", "gamma": S["gamma"]}}
PLUS_SFT = {"orpo": ("orpo", True), "cpo": ("cpo", False), "simpo_default": ("simpo", False)}      # and whether the prompt counts


class Given:
    "A model that gives the fixture's logits."

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, input_ids, keep):
        return self.logits[keep]


def batch_of(ids="input_ids", ref="ref_logits") -> dict:
    labels = X[ids].masked_fill(X["completion_mask"] == 0, IGNORE)
    return {"input_ids": X[ids], "labels": labels, "attention_mask": X["attention_mask"], "counts": X["completion_mask"].sum(1),
            "ref_logps": answer_logps(Given(X[ref]), X[ids], labels)[0]}


def ours(name: str, logits: torch.Tensor) -> tuple[torch.Tensor, dict]:
    model, batch = Given(logits), batch_of()
    if name.startswith("kto"):
        a, b = ("kl_logits", "ref_kl_logits") if name == "kto" else ("ref_kl_logits", "kl_logits")
        kl = batch_of("kl_ids", b)
        estimate = type("Estimate", (), {"kl": float(kto_kl(answer_logps(Given(X[a]), kl["input_ids"], kl["labels"])[0], kl["ref_logps"])), "share": 0.5})()
        batch["desirable"] = torch.tensor(S["labels"])
        loss, n, metrics = preference_loss(model, batch, "kto", S["beta"], weights=tuple(S["weights"]), estimate=estimate)
    elif name in PLUS_SFT:
        kind, prompts = PLUS_SFT[name]
        loss, n, metrics = preference_loss(model, batch, kind, S["beta"], alpha=0)
        _, nll = sft_term(model, batch, prompts)          # TRL: the mean over all tokens of the batch, not over pairs of the mean over their tokens
        tokens = (X["attention_mask"] if prompts else X["completion_mask"]).sum(1)[:len(nll)] - int(prompts)
        loss = loss + n * (nll * tokens).sum() / tokens.sum()
    else:
        loss, n, metrics = preference_loss(model, batch, beta=S["beta"], **SAME[name])
    return loss / n, {k: float(v) / n for k, v in metrics.items()}


@pytest.mark.parametrize("name", list(FIXTURE["cases"]))
def test_losses_gradients_and_metrics(name):
    want, logits = FIXTURE["cases"][name], X["logits"].clone().requires_grad_()
    loss, metrics = ours(name, logits)
    loss.backward()
    eps = 1e-6 if name == "orpo" else 1e-9      # TRL's ORPO casts to float32
    assert abs(loss.item() - want["value"]) < eps
    assert float((logits.grad - torch.tensor(want["grad"], dtype=torch.float64)).abs().max()) < eps
    for key, value in want["metrics"].items():
        if not key.startswith(("logps", "nll")) or name in SAME and name not in ("simpo", "cpo_smooth") or name.startswith("kto"):
            assert abs(metrics[key] - value) < 1e-6, key


def test_the_fixtures_are_what_trl_gives():
    trl = pytest.importorskip("trl")
    if trl.__version__ != FIXTURE["versions"]["trl"]:
        pytest.skip(f"the fixtures are those of TRL {FIXTURE['versions']['trl']}, installed is {trl.__version__}")
    spec = importlib.util.spec_from_file_location("trl_preference", ROOT / "benchmarks" / "trl_preference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    again = module.fixtures()
    assert again["inputs"] == FIXTURE["inputs"] and again["settings"] == FIXTURE["settings"] and again["cases"].keys() == FIXTURE["cases"].keys()
    for name, want in FIXTURE["cases"].items():
        got = again["cases"][name]
        assert abs(got["value"] - want["value"]) < 1e-9, name
        assert float((torch.tensor(got["grad"], dtype=torch.float64) - torch.tensor(want["grad"], dtype=torch.float64)).abs().max()) < 1e-9, name
        assert all(abs(got["metrics"][k] - v) < 1e-9 for k, v in want["metrics"].items()), name


def test_the_lines_of_the_table():
    "The chapter's table of conventions names lines of TRL; each has the loss that it is said to have."
    trl = pytest.importorskip("trl")
    if trl.__version__ != FIXTURE["versions"]["trl"]:
        pytest.skip(f"TRL {trl.__version__} is here, the table names lines of {FIXTURE['versions']['trl']}")
    words = {"dpo": '"sigmoid"', "robust": '"robust"', "hinge": '"hinge"', "ipo": '"ipo"', "normed": '"sigmoid_norm"', "kto": "KL_logps", "orpo": "odds_ratio_loss",
             "cpo": '"sigmoid"', "simpo": '"simpo"'}
    assert words.keys() == METHODS.keys()
    for kind, method in METHODS.items():
        name, line = method.source.split(":")
        texts = [p.read_text(encoding="utf-8").splitlines() for p in Path(trl.__file__).parent.rglob(name)]
        assert any(words[kind] in text[int(line) - 1] for text in texts if len(text) >= int(line)), method.source
