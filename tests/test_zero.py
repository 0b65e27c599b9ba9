"""ZeRO on three processes, where pieces are uneven: what is refused, missing, measured or damaged must not show in the numbers."""
import json
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from commands import as_launched, wait_for
from llm_course.model import ModelConfig, Transformer
from llm_course.packing import packed_loss, stack_rows
from llm_course.reading import UserError
from llm_course.step import TrainConfig
from llm_course.trainer import Callback, Evaluate, Trainer

PROCESSES = 3


class Two(torch.nn.Module):
    "A Transformer and beside it a head of five numbers, which not every step uses. 32 and 5 are no multiples of three."
    def __init__(self, tied):
        super().__init__()
        self.body, self.side = Transformer(ModelConfig(51, dim=32, n_layers=2, n_heads=2, max_seq_len=16, tie_embeddings=tied)), torch.nn.Linear(1, 5, bias=False)
        self.config, self.use = self.body.config, 1.0

    def forward(self, *args, **kw):
        logits, side = self.body(*args, **kw), self.use if self.training else 1.0
        return logits if side is None else logits + side * self.side(torch.ones(1)).square().sum() * torch.arange(51) / 51


class Watch(Callback):
    "Refuses step 3; in steps 2 and 5 the head counts nothing, or with `missing` is left away."
    def __init__(self, missing):
        self.missing = missing

    def before_step(self, trainer):
        trainer.model.use = 1.0 if trainer.n_steps + 1 not in (2, 5) else None if self.missing else 0.0

    def allow_update(self, trainer, record):
        return record["step"] != 3


def trained(tied=False, missing=False, wild=None, **kw):
    "Seven steps; returns the trainer. `wild`: the loss of that step is not a number."
    torch.manual_seed(0)
    ids = torch.randint(51, (40, 16), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": r, "labels": torch.where(torch.arange(16) < i % 9, -100, r), "doc_ids": torch.zeros(16)} for i, r in enumerate(ids)]

    def loss_fn(model, batch):
        loss, count, metrics = packed_loss(model, batch)
        return loss * (math.nan if torch.is_grad_enabled() and trainer.n_steps + 1 == wild else 1.0), count, metrics

    config = TrainConfig(**{"steps": 7, "batch_size": 6, "micro_batch": 1, "lr": 0.01, "log_every": 1} | kw)
    trainer = Trainer(Two(tied), loss_fn, rows, config, stack_rows, None, [Watch(missing), Evaluate(rows[:7], 3, 2)])
    trainer.fit()
    return trainer


CASES = {"tied": {"tied": True}, "untied": {}, "missing": {"missing": True}, "not a number": {"wild": 4}, "bf16": {"precision": "bf16"}}


def told(case):
    trainer = trained(**CASES[case])
    weights = trainer.weights(everywhere=True)
    averages = trainer.engine.optimizer_state(True)
    return {"log": [{k: v for k, v in r.items() if k != "seconds"} for r in trainer.history], "weights": {k: v.double().flatten().tolist() for k, v in weights.items()},
            "averages": {k: v.double().flatten().tolist() for k, v in averages.items()}}, trainer


def refused_loads(trainer):
    "Checkpoints that do not fit, on every process alike; and the weights after them."
    weights, averages = trainer.weights(everywhere=True), trainer.engine.optimizer_state(True)
    name, said = "body.norm.weight", {}
    for what, (w, a) in {"shape": (weights | {name: weights[name][:1]}, averages), "name": ({k: v for k, v in weights.items() if k != name}, averages),
                         "state": (weights, averages | {f"{name}.exp_avg": torch.zeros(33)}), "stranger": (weights, averages | {"other.exp_avg": torch.zeros(3)}),
                         "steps": (weights, averages | {f"{name}.step": torch.tensor(99.0)})}.items():
        try:
            trainer.engine.load(w, a)
            said[what] = ""
        except UserError as e:
            said[what] = str(e)
    trainer.engine.load(weights, averages)
    after, state = trainer.weights(everywhere=True), trainer.engine.optimizer_state(True)
    said["kept"] = all(torch.equal(v, after[k]) for k, v in weights.items()) and all(torch.equal(v, state[k]) for k, v in averages.items())
    try:
        Trainer(trainer.model, packed_loss, trainer.data, trainer.config, stack_rows)
        said["again"] = ""
    except UserError as e:
        said["again"] = str(e)
    return said


def main(folder):
    torch.set_num_threads(1)
    done, rank = {}, os.environ["RANK"]
    for stage in (2, 3):
        settings = Path(folder, f"{stage}-{rank}.settings")
        settings.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(settings)
        for case in CASES:
            done[f"{stage} {case}"], trainer = told(case)
        done[f"{stage} loads"] = refused_loads(trainer)
    Path(folder, f"{rank}.json").write_text(json.dumps(done))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    if find_spec("deepspeed") is None or torch.cuda.is_available():
        pytest.skip("DeepSpeed is not installed here")
    folder = tmp_path_factory.mktemp("zero")
    wait_for(as_launched(PROCESSES, __file__, folder, ACCELERATE_USE_DEEPSPEED="true"), 300)
    return [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(PROCESSES)]


@pytest.fixture(scope="module")
def one():
    "The same cases on one process; a head that is left away counts as a gradient of zero, as in a flat vector."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {case: told(case)[0] for case in CASES if case != "missing"}
    torch.set_num_threads(before)
    return found | {"missing": found["untied"]}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_three_processes_end_where_one_ends(ran, one, stage, case):
    "Losses, norms, refusals, held-out losses, weights and averages."
    a, b = one[case], ran[0][f"{stage} {case}"]
    most = 1e-6 if case != "bf16" else 5e-3
    for x, y in zip(a["log"], b["log"], strict=True):
        assert x.keys() == y.keys() and x["step"] == y["step"] and x.get("skipped") == y.get("skipped")
        for key in x.keys() & {"loss", "val_loss", "grad_norm"}:
            assert math.isnan(x[key]) and math.isnan(y[key]) or abs(x[key] - y[key]) < (1 if key != "grad_norm" else 10) * most, (x["step"], key)
    assert [r["step"] for r in b["log"] if r.get("skipped")] == ([3, 4] if case == "not a number" else [3])
    for part in ("weights", "averages"):
        assert a[part].keys() == b[part].keys()
        for key, x in a[part].items():
            x, y = torch.tensor(x), torch.tensor(b[part][key])
            assert (x - y).abs().max() <= (1e-4 if case != "bf16" else 0.3) * x.abs().max(), (part, key)


@pytest.mark.parametrize("stage", [2, 3])
def test_all_processes_have_the_same(ran, stage):
    for case in CASES:
        for other in ran[1:]:
            assert other[f"{stage} {case}"]["weights"] == ran[0][f"{stage} {case}"]["weights"]
    for other in ran[1:]:
        assert other[f"{stage} loads"] == ran[0][f"{stage} loads"]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_that_does_not_fit_is_refused_whole(ran, stage):
    said = ran[0][f"{stage} loads"]
    assert all("do not agree on" in said[what] for what in ("shape", "name", "state", "stranger")), said
    assert "body.norm.weight" in said["shape"] and "other.exp_avg" in said["stranger"] and "different numbers of steps" in said["steps"]
    assert said["kept"] and "DeepSpeed's hands already" in said["again"]


if __name__ == "__main__":
    main(sys.argv[1])
