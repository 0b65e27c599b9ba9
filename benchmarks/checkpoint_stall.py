"""How long training stands still for a checkpoint: written in the foreground, in the background, and not at all.

One model, one thread, the three ways in turn, several rounds; steps are short, so that a save stands out. A step's time is that from
its beginning to the next one's, what is saved in between included. Two figures for each save: how long the call that saves blocks
the training, and what all steps of its period took beyond the same number of usual (median) ones.

    python benchmarks/checkpoint_stall.py --save
"""
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from llm_course.checkpoint import checkpoints, file_hash
from llm_course.hub import write_tensors
from llm_course.model import ModelConfig, Transformer
from llm_course.packing import packed_loss, stack_rows
from llm_course.step import TrainConfig
from llm_course.trainer import Callback, Trainer, seed_all
from record import arguments, save

MODEL = {"vocab_size": 8192, "dim": 384, "n_layers": 6, "n_heads": 6, "max_seq_len": 128}
WAYS, EVERY, SAVES, BATCH, T = ("none", "foreground", "background"), 24, 3, 1, 32
AT = [EVERY - 1 + i * EVERY for i in range(SAVES)]        # places of the saves among the steps that count


class Clock(Callback):
    def __init__(self):
        self.times = []

    def before_step(self, trainer):
        self.times.append(time.perf_counter())


class Timed(Trainer):
    def save_checkpoint(self):
        start = time.perf_counter()
        super().save_checkpoint()
        self.blocked = [*getattr(self, "blocked", []), time.perf_counter() - start]


def run(way: str) -> tuple[list[float], list[float], int]:
    "Seconds of each step after the first period (which warms up and saves, too), seconds that each save blocked, and the bytes of a checkpoint."
    seed_all(0)
    model, clock = Transformer(ModelConfig(**MODEL)), Clock()
    rows = [{"input_ids": ids, "labels": ids, "doc_ids": torch.zeros_like(ids)} for ids in torch.randint(0, MODEL["vocab_size"], (64, T))]
    steps = EVERY * (SAVES + 2) + 1
    config = TrainConfig(steps, batch_size=BATCH, checkpoint_every=steps + 1 if way == "none" else EVERY, log_every=steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(model, packed_loss, rows, config, stack_rows, folder, [clock])
        trainer.writer.background = way == "background"
        trainer.fit()
        size = sum(f.stat().st_size for f in checkpoints(folder)[-1].iterdir()) if checkpoints(folder) else 0
    return [b - a for a, b in zip(clock.times, clock.times[1:])][EVERY:], getattr(trainer, "blocked", [])[1:], size


def parts() -> dict[str, float]:
    "Seconds of the parts of a save, best of three: copy the tensors, write them (to the page cache), hash the file, and flush it to the disk."
    import os
    seed_all(0)
    state = {k: v.detach() for k, v in Transformer(ModelConfig(**MODEL)).state_dict().items()}
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        for _ in range(3):
            copy = {}

            def flush():
                with open(path, "rb+") as f:
                    os.fsync(f.fileno())
            for name, work in (("copy", lambda: copy.update({k: v.clone() for k, v in state.items()})), ("write", lambda: write_tensors(copy, path)),
                               ("hash", lambda: file_hash(path)), ("flush", flush)):
                start = time.perf_counter()
                work()
                best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
        size = path.stat().st_size
    return {"mb": round(size / 1e6, 1)} | {k: round(v, 4) for k, v in best.items()}


if __name__ == "__main__":
    args = arguments(__doc__, rounds=3)
    torch.set_num_threads(1)
    times: dict[str, list[list[float]]] = {w: [] for w in WAYS}
    blocked: dict[str, list[float]] = {w: [] for w in WAYS}
    size = 0
    for _ in range(args.rounds):
        for way in WAYS:
            seconds, waits, n = run(way)
            times[way].append(seconds)
            blocked[way] += waits
            size = max(size, n)
    stalls = {w: [] for w in WAYS}
    for way in stalls:
        for seconds in times[way]:
            usual = statistics.median(seconds)
            stalls[way] += [sum(seconds[i:i + EVERY]) - EVERY * usual for i in AT]
    round_all = lambda rows: [[round(s, 4) for s in row] for row in rows]
    figures = {"model": MODEL | {"parameters": sum(p.numel() for p in Transformer(ModelConfig(**MODEL)).parameters())}, "batch": BATCH, "checkpoint_every": EVERY,
               "rounds": args.rounds, "checkpoint_mb": round(size / 1e6, 1), "seconds": {w: round_all(r) for w, r in times.items()},
               "median_step": {w: round(statistics.median(s for r in rows for s in r), 4) for w, rows in times.items()},
               "saves_at": AT, "blocked": {w: round(statistics.median(s), 3) for w, s in blocked.items() if s}, "beyond_usual": {w: round(statistics.median(s), 3) for w, s in stalls.items()},
               "each": {"blocked": round_all(blocked.values()), "beyond_usual": round_all(stalls.values())}, "parts": parts()}
    print(json.dumps({k: v for k, v in figures.items() if k != "seconds"}, indent=1))
    if args.save:
        save("checkpoint_stall", "One thread, float32, wall-clock time on a machine that does other work, too: seconds of training steps around a checkpoint that is written in the foreground, in the background, and not at all; "
             "how long the call that saves blocks, and what the steps of its period took beyond usual ones (medians over saves); and the parts of a save for the weights alone.", figures)
