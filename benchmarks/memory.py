"""Is the estimate of a training step's memory right? Peaks of real steps beside `scale.estimate_memory`, by shape and by switch.

Each figure comes from a process of its own (forked, Linux): the highest resident size (VmHWM) while it makes a small step and
one of two micro-batches with AdamW, less the resident size before the model was made. glibc is told to give memory back at once, so that the
figure is what was in use, not what was kept for later.

    python benchmarks/memory.py --save
"""
import multiprocessing
import os
import sys
from pathlib import Path

import torch

from llm_course.model import ModelConfig, Transformer
from llm_course.packing import packed_loss
from llm_course.scale import estimate_memory
from llm_course.step import TrainConfig, chunked_loss, make_optimizer, recompute_activations
from record import arguments, save

SHAPES = {     # vocabulary, settings of the model, rows of a micro-batch
    "many layers": (1024, dict(dim=128, n_layers=12, n_heads=4, max_seq_len=256), 8),
    "large vocabulary": (32_768, dict(dim=128, n_layers=2, n_heads=4, max_seq_len=256), 4),
    "wide": (4096, dict(dim=512, n_layers=4, n_heads=8, n_kv_heads=2, max_seq_len=128), 8),
    "long rows": (2048, dict(dim=192, n_layers=6, n_heads=6, max_seq_len=1024), 3),
    "laptop size": (2048, dict(dim=128, n_layers=4, n_heads=4, max_seq_len=128), 16),
}
WAYS = {"plain": {}, "recompute": {"recompute": True}, "chunked": {"chunk": 256}, "both": {"recompute": True, "chunk": 256}}


def megabytes(key: str) -> float:
    "A line of this process's memory figures (Linux)."
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def steps(model: Transformer, batch: dict, chunk: int) -> None:
    "A step on one row, after which the optimizer has its averages, and one on two micro-batches, the second of which finds gradients."
    optimizer = make_optimizer(model, TrainConfig(1))
    for parts in ([{k: v[:1] for k, v in batch.items()}], [batch, batch]):
        for part in parts:
            loss = (chunked_loss(model, part, chunk) if chunk else packed_loss(model, part))[0]
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make_batch(c: ModelConfig, rows: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(c.vocab_size, (rows, c.max_seq_len))
    return {"input_ids": ids, "labels": ids, "doc_ids": torch.zeros_like(ids)}


def measured(shape: str, way: str) -> float:
    "Peak of a step above the start, in MB."
    vocab, settings, rows = SHAPES[shape]
    for chunk in (0, 8):     # the libraries' own memory is there before we look
        small = ModelConfig(64, dim=16, n_layers=1, n_heads=2, max_seq_len=16)
        steps(recompute_activations(Transformer(small)), make_batch(small, 2), chunk)
    c = ModelConfig(vocab, **settings)
    batch, before = make_batch(c, rows), megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")     # the highest size so far is forgotten
    steps(recompute_activations(Transformer(c), "recompute" in WAYS[way]), batch, WAYS[way].get("chunk", 0))
    return megabytes("VmHWM") - before


def row(shape: str, way: str) -> dict:
    "Estimate and measurement of one case, in MB."
    vocab, settings, rows = SHAPES[shape]
    memory = estimate_memory(ModelConfig(vocab, **settings), rows, **WAYS[way])
    with multiprocessing.get_context("fork").Pool(1) as pool:
        peak = pool.apply(measured, (shape, way))
    estimate = memory.total / 2**20
    parts = {k: round(v / 2**20, 1) for k, v in vars(memory).items()}
    found = {"shape": shape, "way": way, "estimate": round(estimate, 1), "measured": round(peak, 1), "ratio": round(estimate / peak, 3), "parts": parts}
    print(f"{shape:18}{way:10} estimate {estimate:7.1f}  measured {peak:7.1f}  ratio {estimate / peak:.2f}  {parts}", flush=True)
    return found


if __name__ == "__main__":
    args = arguments(__doc__)
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:     # glibc reads it when a program starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"})
    torch.set_num_threads(1)
    rows = [row(shape, way) for shape in SHAPES for way in WAYS]
    ratios = [r["ratio"] for r in rows]
    figures = {"shapes": {k: {"vocab_size": v, **s, "rows": n} for k, (v, s, n) in SHAPES.items()}, "chunk": 256, "rows": rows,
               "lowest_ratio": min(ratios), "highest_ratio": max(ratios), "bf16": "not measured yet", "gpu": "not measured yet"}
    if args.save:
        save("memory", "Estimated memory of a training step (scale.estimate_memory) beside the measured peak of a process on a CPU, in MiB: five shapes, with activations kept "
             "or recomputed, loss whole or in chunks of 256 rows, float32.", figures)
