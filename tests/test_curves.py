"""Curves: logs of any content, plots of any numbers, callbacks that change nothing, and TensorBoard's own reader"""
import io
import json
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.curves import (PEAK_TFLOPS, LivePlot, Progress, TensorBoardLog, TerminalPlot, TrackioLog, WandbLog, as_log, braille, gpu_peak,
                               plot_run, read_log, smooth, speeds, text_plot)
from llm_course.step import TrainConfig
from llm_course.trainer import Callback, Evaluate, Interrupted, Trainer, seed_all
from timing import assert_linear, cpu_seconds

numbers = st.floats(allow_nan=True, allow_infinity=True)
data = [(torch.tensor([i / 50]), torch.tensor([2 * i / 50 + 1])) for i in range(50)]


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.a * x + self.b


def squares(model, batch):
    return (model(batch["x"]) - batch["y"]).pow(2).sum(), len(batch["x"]), {}


def collate(examples):
    return {"x": torch.stack([x for x, _ in examples]), "y": torch.stack([y for _, y in examples])}


def run(folder=None, callbacks=(), steps=30):
    seed_all(0)
    trainer = Trainer(Line(), squares, data, TrainConfig(steps=steps, batch_size=5, lr=0.1, log_every=1, checkpoint_every=8), collate, folder,
                      [Evaluate(data[:10], 10), *callbacks])
    trainer.fit()
    return trainer


class StopAt(Callback):
    def __init__(self, step):
        self.stop = step

    def after_step(self, trainer, record):
        if trainer.n_steps == self.stop:
            raise Interrupted("stopped")


@given(st.lists(numbers), st.floats(0, 0.999))
@settings(max_examples=100, deadline=None)
def test_smoothing_stays_within_what_it_has_seen(values, beta):
    seen = []
    for x, m in zip(values, smooth(values, beta), strict=True):
        seen += [x] if math.isfinite(x) else []
        small = [v for v in seen if abs(v) < 1e300]
        if seen and len(small) == len(seen):
            assert min(seen) - 1e-6 * (1 + abs(min(seen))) <= m <= max(seen) + 1e-6 * (1 + abs(max(seen)))
        elif not seen:
            assert math.isnan(m)


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_log(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    good = b'\n{"step": 3, "loss": 1.5}\n'
    path.write_bytes(content + good)
    log = read_log(path.parent)
    assert log["loss"][0][-1] == 3 and log["loss"][1][-1] == 1.5
    lines = [n for n, line in enumerate((content + good).splitlines(), 1) if line.strip()]
    assert set(log.left_out) <= set(lines) and lines[-1] not in log.left_out


@pytest.mark.parametrize("piece", ['{"step": 1, "loss": 2.0}\n', "{", "[", '"', "\n", "é", '{"step":'])
def test_logs_are_read_in_linear_time(tmp_path, piece):
    def seconds(size):
        (tmp_path / "log.jsonl").write_text(piece * (size // len(piece.encode())), encoding="utf-8")
        return cpu_seconds(read_log, tmp_path)
    assert_linear(seconds, 1_000_000)


@given(st.lists(st.fixed_dictionaries({"step": st.integers(1, 40)}, optional={"loss": numbers, "val_loss": numbers, "note": st.text(max_size=3)})))
@settings(max_examples=100, deadline=None)
def test_columns_always_rise(records):
    log = as_log(records)
    for steps, values in log.columns.values():
        assert len(steps) == len(values) and all(a < b for a, b in zip(steps, steps[1:]))
    n_numbers = sum(isinstance(v, float) for r in records for v in r.values())
    assert sum(len(s) for s, _ in log.columns.values()) + log.replaced == n_numbers


@given(st.lists(numbers, max_size=50), st.integers(1, 30), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_braille_always_fits(values, width, height):
    lines = braille(range(len(values)), [v if abs(v) < 1e150 else math.nan for v in values], width, height)
    assert len(lines) == height and all(len(line) == width and all(0x2800 <= ord(c) < 0x2900 for c in line) for line in lines)


@given(st.text(max_size=10), st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=30), st.integers(1, 100))
@settings(max_examples=50, deadline=None)
def test_text_plots_of_any_width(name, values, width):
    assert text_plot(name, range(len(values)), values, width).count("\u2524") >= 8


@pytest.mark.parametrize("name, tera", [
    ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989), ("NVIDIA H200 NVL", 835), ("NVIDIA H20", 148), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500),
    ("NVIDIA B300 SXM6 AC", 2250), ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-16GB", 112),
    ("NVIDIA RTX A6000", 155), ("NVIDIA RTX 6000 Ada Generation", 364), ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 3090 Ti", 80), ("NVIDIA GeForce RTX 4070 Ti SUPER", 88),
    ("NVIDIA GeForce RTX 5090", 209), ("AMD Instinct MI250X", 191.5), ("AMD Instinct MI300X", 1307), ("AMD Instinct MI325X", 1307)])
def test_device_names(name, tera):
    assert gpu_peak(name) == tera * 1e12


@pytest.mark.parametrize("name", ["", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A1000", "Quadro RTX 6000", "NVIDIA T400"])
def test_unknown_devices(name):
    assert gpu_peak(name) is None


def test_peaks_are_plausible():
    assert all(10 < v < 10_000 for v in PEAK_TFLOPS.values())


def test_instruments_change_nothing(tmp_path):
    screen = io.StringIO()
    screen.isatty = lambda: True
    plain = run(steps=12)
    watched = run(tmp_path / "a", [LivePlot(seconds=0), TerminalPlot(stream=screen, seconds=0), Progress(disable=True)], steps=12)
    same = lambda t: [{k: v for k, v in r.items() if k != "seconds"} for r in t.history]
    assert same(plain) == same(watched)
    assert (tmp_path / "a" / "curves.png").read_bytes()[:4] == b"\x89PNG" and "step 1 to 12; loss now" in screen.getvalue()
    assert len(speeds(as_log(watched.history))[0]) == 12


def test_a_figure_of_nothing_and_of_nan():
    for history in ([], [{"step": 1, "loss": math.nan, "lr": 0.1, "grad_norm": math.inf, "tokens": 5, "seconds": 0.0}], [{"step": 2, "val_loss": 1.0}]):
        plot_run(history).savefig(io.BytesIO())


def test_tensorboard_reads_a_stopped_run_as_one(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for stop in (11, 19, 0):
        try:
            run(tmp_path, [TensorBoardLog(), StopAt(stop)])
        except Interrupted:
            pass
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 31))
    assert [e.step for e in events.Scalars("val/loss")] == [10, 20, 30]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(read_log(tmp_path)["loss"][1], rel=1e-5)


class Service:
    "Stands in for wandb and trackio."
    def __init__(self):
        self.started, self.numbers, self.ended = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, numbers, step=None):
        self.numbers.append({"step": step} | numbers)

    def finish(self):
        self.ended += 1


@pytest.mark.parametrize("kind", [WandbLog, TrackioLog])
def test_services(tmp_path, monkeypatch, kind):
    service = Service()
    monkeypatch.setitem(sys.modules, kind.package, service)
    try:
        run(tmp_path / "toy", [kind("course"), StopAt(12)])
    except Interrupted:
        pass
    run(tmp_path / "toy", [kind("course")])
    assert [s["name"] for s in service.started] == ["toy", "toy"] and service.ended == 1
    assert service.started[0].get("id") == service.started[1].get("id")
    if kind is WandbLog:
        assert service.started[0]["mode"] == "offline" and service.started[0]["id"]
    assert {n["step"] for n in service.numbers} == set(range(1, 31)) and all("train/loss" in n or "val/loss" in n for n in service.numbers)
    json.dumps(service.numbers)


def test_a_missing_service_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Exception, match="pip install wandb"):
        run(callbacks=[WandbLog("course")], steps=1)


@pytest.mark.parametrize("disable, terminal, expected", [(None, False, "step 2 of 4"), (None, True, "4/4"), (True, True, None), (False, False, "4/4")])
def test_progress_is_shown_where_it_can_be_read(monkeypatch, disable, terminal, expected):
    screen = io.StringIO()
    screen.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", screen)
    run(callbacks=[Progress("toy", disable=disable, seconds=0)], steps=4)
    assert (expected in screen.getvalue() and "loss" in screen.getvalue() and "MFU" not in screen.getvalue()) if expected else not screen.getvalue()
