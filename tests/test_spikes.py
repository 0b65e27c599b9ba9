"""The spike guard in real processes that are killed, with a tiny regression in the place of a language model."""
import hashlib
import json
import math
import os
import signal
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import start_program
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_course.checkpoint import checkpoints
from llm_course.reading import UserError
from llm_course.model import ModelConfig, Transformer
from llm_course.packing import packed_logits
from llm_course.spikes import SpikeGuard, forget_after, influence, upper_limit
from llm_course.step import TrainConfig
from llm_course.trainer import Callback, Trainer, sample_index, seed_all

STEPS, BATCH = 80, 8


class Points:
    "x, y of a line with noise; in the samples of steps `first` + 1 to `last` y is `wild`."
    def __init__(self, first=45, last=53, wild=300.0, n=2000):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 6, generator=g)
        self.y = self.x @ torch.arange(1.0, 7.0) + 0.3 * torch.randn(n, generator=g)
        for k in range(first * BATCH, last * BATCH):
            self.y[sample_index(k, n, 0)] = wild

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "y": self.y[i]}


def square(model, batch):
    return F_mse(model(batch["x"])[:, 0], batch["y"]), len(batch["y"]), {}


def F_mse(a, b):
    return ((a - b) ** 2).sum()


def collate(rows):
    return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}


def make(folder=None, callbacks=None, data=None, **kw):
    seed_all(0)
    config = TrainConfig(**{"steps": STEPS, "batch_size": BATCH, "lr": 0.1, "log_every": 1, "checkpoint_every": 10} | kw)
    return Trainer(torch.nn.Linear(6, 1), square, data or Points(), config, collate, folder, callbacks if callbacks is not None else [guard()])


def guard(**kw):
    return SpikeGuard(**{"window": 30, "warmup": 15, "k": 8, "pass_over": 2} | kw)


def digest(trainer) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters())).hexdigest()


def log_of(folder) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Folder and trainer of the run that nobody kills."
    folder = tmp_path_factory.mktemp("whole")
    trainer = make(folder)
    trainer.fit()
    return folder, trainer


def test_caught_at_the_right_step_and_taken_back(whole):
    folder, trainer = whole
    events = [r for r in log_of(folder) if r.get("event") == "rolled back"]
    assert [n for n, _ in events[0]["refused"]] == [46, 47, 48] and events[0]["to_step"] == 40 and events[0]["from_step"] == 48
    assert len(events) == 2 and events[1]["to_step"] == 30      # two batches more were too few: refused again, and further back
    assert events[0]["samples"] == (48 + 2) * BATCH
    assert [r["step"] for r in log_of(folder) if "event" not in r or r["event"] == "skipped"] == list(range(1, STEPS + 1))
    clean = make(callbacks=[], data=Points(last=45))
    clean.fit()
    wild = make(callbacks=[])
    wild.fit()
    error = lambda t: float((t.model.weight.detach()[0] - torch.arange(1.0, 7.0)).norm())
    assert abs(error(trainer) / error(clean) - 1) < 0.05 < error(wild) / error(clean) - 1


# runs in a process of its own: killed by -9 after so many steps, counted also through those that are done again
CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_spikes import *
class Kill(Callback):
    n = 0
    def after_step(self, trainer, record):
        self.n += 1
        if self.n == int(sys.argv[2]): os.kill(os.getpid(), {how})
where = sys.argv[3]
if where == "save":                                # in the middle of the checkpoint that replaces the target
    import llm_course.checkpoint as c, llm_course.spikes as s
    whole = c.commit
    def torn(partial, final):
        if final.exists(): os.kill(os.getpid(), signal.SIGKILL)
        whole(partial, final)
    c.commit = torn
if where == "forget":                              # when the abandoned checkpoints are gone and the new one is not there
    import llm_course.spikes as s
    before = s.forget_after
    def cut(*a):
        before(*a); os.kill(os.getpid(), signal.SIGKILL)
    s.forget_after = cut
make(Path(sys.argv[1]), [guard(), Kill()]).fit()
"""


def child(folder, n, where="step", how="signal.SIGKILL") -> tuple[int, str]:
    "Exit status, and what it said."
    with tempfile.TemporaryDirectory() as place:
        program = Path(place, "child.py")
        program.write_text("from pathlib import Path\n" + CHILD.format(tests=os.path.dirname(__file__), how=how))
        process = start_program(program, folder, n, where)
        said, _ = process.communicate(timeout=120)
    return process.returncode, said


@pytest.mark.parametrize("n, where", [(47, "step"), (48, "step"), (49, "step"), (60, "step"), (10**9, "save"), (10**9, "forget")])
def test_killed_in_the_spike_ends_bit_for_bit_the_same(whole, tmp_path, n, where):
    status, said = child(tmp_path, n, where)
    assert status == -signal.SIGKILL, said[-2000:]
    again = make(tmp_path)
    again.fit()
    assert digest(again) == digest(whole[1]) and log_of(tmp_path) == log_of(whole[0])


@pytest.mark.parametrize("n", [42, 46, 47])
def test_a_checkpoint_forced_by_sigterm_is_no_target(whole, tmp_path, n):
    "SIGTERM just before and in the spike: a checkpoint between the regular ones, and yet the same way back."
    _, said = child(tmp_path, n, how="signal.SIGTERM")
    assert "stopped at step" in said, said[-2000:]
    again = make(tmp_path)
    again.fit()
    assert digest(again) == digest(whole[1]) and log_of(tmp_path) == log_of(whole[0])


def test_the_disk_holds_at_most_two_more_checkpoints(tmp_path):
    counts = []

    class Count(Callback):
        def before_step(self, trainer):
            counts.append(len(checkpoints(tmp_path)))

    make(tmp_path, [guard(), Count()]).fit()
    assert max(counts) <= 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_neither_weights_nor_optimizer(tmp_path, value):
    "Without the guard the trainer passes over single ones; with it, a run of eight leads back, and the run ends well."
    for folder, callbacks, data in ((None, [], Points(45, 46, value)), (tmp_path, [guard()], Points(wild=value))):
        trainer = make(folder, callbacks, data)
        trainer.fit()
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
        assert all(torch.isfinite(v).all() for s in trainer.optimizer.state_dict()["state"].values() for v in s.values() if torch.is_tensor(v))
    assert any(r.get("event") == "rolled back" for r in trainer.history)
    with pytest.raises(UserError, match="three times in a row"):
        make(None, [], Points(wild=value)).fit()


def test_too_many_ways_back_end_with_an_error(tmp_path):
    with pytest.raises(UserError, match="2 times the run was taken back.*lower the learning rate"):
        make(tmp_path, [guard(max_rollbacks=2, pass_over=0)], Points(45, 79)).fit()


def test_without_a_folder_it_refuses_says_so_and_gives_up_in_the_end():
    with pytest.warns(UserWarning, match="no way back: the trainer has no folder"):
        trainer = make()
        trainer.fit()
    assert [r["step"] for r in trainer.history if r.get("event") == "skipped"] == list(range(46, 54))
    with warnings.catch_warnings(), pytest.raises(UserError, match="12 updates in a row were refused"):
        warnings.simplefilter("ignore")
        make(data=Points(45, 80), callbacks=[guard(give_up=12)]).fit()


def test_guard_in_the_second_place_is_asked_first(whole, tmp_path):
    "A callback that takes the step from the trainer must be told the step after the way back."
    class Told(Callback):
        def before_step(self, trainer):
            self.step = trainer.n_steps

        def after_step(self, trainer, record):
            assert self.step == record["step"] - 1

    trainer = make(tmp_path, [Told(), guard()])
    trainer.fit()
    assert digest(trainer) == digest(whole[1])


def test_another_run_s_checkpoint_gives_an_empty_memory(tmp_path):
    make(tmp_path, [], steps=20).fit()
    trainer = make(tmp_path, [g := guard()])
    trainer.fit()
    assert len(g.state["loss"]) > 0 and g.state["good"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=64), st.floats(0.1, 20))
def test_the_limit_is_finite_and_not_below_the_median(values, k):
    limit = upper_limit(values, k)
    assert math.isfinite(limit) and limit >= np.median(values)
    assert upper_limit(values[::-1], k) == limit


def test_forgetting_keeps_what_was_before(whole, tmp_path):
    trainer = make(tmp_path, [])
    trainer.fit()
    forget_after(trainer, 25)
    assert [r["step"] for r in log_of(tmp_path)] == list(range(1, 26)) and all(c.name <= "step_00000025" for c in checkpoints(tmp_path))


@pytest.mark.parametrize("causal", [True, False])
def test_influence_shows_the_mask_of_the_library_s_own_packing(causal):
    "Of an untrained model too: its own document only, and nothing later if it is causal."
    seed_all(0)
    model = Transformer(ModelConfig(50, dim=32, n_layers=2, n_heads=2, causal=causal)).eval()
    ids, docs = torch.randint(0, 50, (20,)), torch.tensor([0] * 8 + [1] * 12)

    def logits_of(x):
        batch = {"input_ids": x, "doc_ids": docs.expand(len(x), -1)}
        return packed_logits(model, batch, torch.ones_like(x, dtype=torch.bool)).view(*x.shape, -1)

    may = docs[:, None] == docs
    assert torch.equal(influence(logits_of, ids, 1e-6), may.tril() if causal else may)
    with pytest.raises(UserError, match="two different tokens"):
        influence(logits_of, torch.zeros(20, dtype=torch.long))
