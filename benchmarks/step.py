"""What three switches of a training step save and cost: the chunked linear cross-entropy, recomputed activations, compiled layers.

Each row is measured in processes of its own (peak resident memory above that before the first run, when the inputs are there),
the ways of computing in turn, several rounds; times are the best of the rounds, one thread, forward and backward.

    python benchmarks/step.py --save
"""
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from llm_course.model import ModelConfig, Transformer
from llm_course.packing import packed_loss
from llm_course.step import compiled, linear_cross_entropy, recompute_activations
from record import arguments, save

ROWS, DIM, VOCAB = 2048, 256, 16_384
WAYS = ("plain", "1024", "256", "64")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now_mb() -> float:
    "Resident memory at this moment (Linux)."
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def measured(run, repeats: int = 3) -> dict:
    "Seconds (best) and peak memory above the start, in MB, of `run()`."
    before, times = now_mb(), []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {"seconds": min(times), "mb": peak_mb() - before}


def cross_entropy(way: str) -> dict:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, DIM, generator=g).mul_(0.1).requires_grad_() for n in (ROWS, VOCAB))
    targets = torch.randint(0, VOCAB, (ROWS,), generator=g)
    small = torch.randn(64, 64, requires_grad=True)
    F.cross_entropy(small @ small, targets[:64] % 64).backward()       # the libraries' own memory is there before we look

    def run():
        hidden.grad = weight.grad = None
        loss = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum") if way == "plain" else linear_cross_entropy(hidden, weight, targets, chunk=int(way))
        loss.backward()
    return measured(run)


def activations(way: str) -> dict:
    torch.manual_seed(0)
    model = recompute_activations(Transformer(ModelConfig(2048, dim=256, n_layers=8, n_heads=8, max_seq_len=256)), way == "recompute")
    model = compiled(model) if way == "compiled" else model
    ids = torch.randint(0, 2048, (8, 256))
    batch = {"input_ids": ids, "labels": ids, "doc_ids": torch.zeros_like(ids)}
    packed_loss(model, {k: v[:1] for k, v in batch.items()})[0].backward()   # gradients and the libraries' own memory are there

    def run():
        model.zero_grad(set_to_none=False)
        packed_loss(model, batch)[0].backward()
    return measured(run)


def table(kind: str, ways: tuple[str, ...], rounds: int) -> list[dict]:
    "Best time and smallest peak of each way, measured in turn."
    found: dict[str, list[dict]] = {w: [] for w in ways}
    for _ in range(rounds):
        for way in ways:
            out = subprocess.run([sys.executable, __file__, "--one", f"{kind}:{way}"], capture_output=True, text=True, check=True).stdout
            found[way].append(json.loads(out))
    return [{"way": w, **{k: round(min(r[k] for r in rs), 3) for k in ("seconds", "mb")}} for w, rs in found.items()]


if __name__ == "__main__":
    args = arguments(__doc__, one="", rounds=3)
    torch.set_num_threads(1)
    if args.one:
        kind, way = args.one.split(":")
        print(json.dumps({"cross_entropy": cross_entropy, "activations": activations}[kind](way)))
    else:
        figures = {"shape": {"rows": ROWS, "dim": DIM, "vocab": VOCAB}, "rounds": args.rounds, "cross_entropy": table("cross_entropy", WAYS, args.rounds),
                   "model": {"vocab_size": 2048, "dim": 256, "n_layers": 8, "batch": 8, "seq_len": 256}, "activations": table("activations", ("keep", "recompute"), args.rounds),
                   "compile": [{"way": r["way"], "seconds": r["seconds"]} for r in table("activations", ("keep", "compiled"), args.rounds)]}   # the compiler's own memory says nothing
        print(json.dumps(figures, indent=1))
        if args.save:
            save("step", "One thread, float32, forward and backward: peak memory above the inputs (MB) and best time (s) of the loss of the output layer, "
                 "plain and in chunks; of a model that keeps or recomputes its activations; and best time of the same model as it is and compiled.", figures)
