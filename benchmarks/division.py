"""How much memory does each way of dividing a run need? Peaks of real steps on several processes beside `scale.estimate_memory`.

Each process is started as torchrun would start it, makes a Trainer, takes a step, and then reads from the operating system how large it grew
in the two steps after it (VmHWM), less its size before the model was made. A small run before that has loaded the libraries. glibc is told to give
memory back at once. What is printed and kept is the largest process of a run. Linux; ZeRO needs DeepSpeed.

    python benchmarks/division.py --save
"""
import json
import os
import socket
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from llm_course.counting import count_parameters
from llm_course.model import ModelConfig, Transformer
from llm_course.packing import packed_loss, stack_rows
from llm_course.scale import estimate_memory
from llm_course.step import TrainConfig
from llm_course.trainer import Trainer
from record import arguments, save

SHAPE = dict(vocab_size=4096, dim=512, n_layers=6, n_heads=8, max_seq_len=64)      # few tokens: weights, gradients and averages are nearly all
ON_CPU = {"ACCELERATE_USE_CPU": "yes"}
WAYS = {"single": ON_CPU, "ddp": ON_CPU, "fsdp": ON_CPU | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "LLM_COURSE_SHARD_ON_CPU": "1"},
        **{f"zero{stage}": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in (1, 2, 3)}}


def megabytes(key: str) -> float:
    "A line of this process's memory figures."
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def trainer(shape: dict, processes: int, precision: str) -> Trainer:
    "A run with two micro-batches of one row on each process."
    c = ModelConfig(**shape)
    ids = torch.randint(c.vocab_size, (64, c.max_seq_len), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": r, "labels": r, "doc_ids": torch.zeros_like(r)} for r in ids]
    torch.manual_seed(0)
    return Trainer(Transformer(c), packed_loss, rows, TrainConfig(steps=3, batch_size=2 * processes, micro_batch=1, lr=1e-3, precision=precision), stack_rows)


def measure(mode: str, processes: int, precision: str, folder: str) -> None:
    "Write this process's peak above its start, in MiB."
    torch.set_num_threads(1)
    trainer(SHAPE | {"dim": 32, "n_layers": 2}, processes, precision).fit()
    before, big = megabytes("VmRSS"), trainer(SHAPE, processes, precision)
    big.step()                                            # the whole model is there at first, whatever is divided later
    Path("/proc/self/clear_refs").write_text("5")
    big.step(), big.step()
    Path(folder, f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(megabytes("VmHWM") - before))


def run(mode: str, processes: int, precision: str) -> dict:
    "Estimate and measurement of one way, in MiB."
    with tempfile.TemporaryDirectory() as folder, socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
        s.close()
        env = os.environ | WAYS[mode] | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        where = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
        started = [subprocess.Popen([sys.executable, __file__, "--measure", mode, str(processes), precision, folder],
                                    env=env | where | ({"RANK": str(r), "LOCAL_RANK": str(r)} if where else {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(processes)]
        said = [p.communicate()[0] for p in started]
        assert not any(p.returncode for p in started), said[0][-3000:]
        peak = max(json.loads(Path(folder, f"{r}.json").read_text()) for r in range(processes))
    memory = estimate_memory(ModelConfig(**SHAPE), 1, mode=mode, processes=processes, bf16=precision == "bf16")
    found = {"mode": mode, "processes": processes, "precision": precision, "estimate": round(memory.total / 2**20, 1), "measured": round(peak, 1),
             "ratio": round(memory.total / 2**20 / peak, 3), "parts": {k: round(v / 2**20, 1) for k, v in vars(memory).items()}}
    print(found, flush=True)
    return found


if __name__ == "__main__":
    if "--measure" in sys.argv:
        at = sys.argv.index("--measure")
        measure(sys.argv[at + 1], int(sys.argv[at + 2]), *sys.argv[at + 3:])
        sys.exit()
    args = arguments(__doc__)
    modes = [m for m in WAYS if m != "single" and (not m.startswith("zero") or find_spec("deepspeed"))]
    rows = [run("single", 1, "no"), *[run(m, p, "no") for p in (2, 4) for m in modes]]
    figures = {"shape": SHAPE, "parameters": count_parameters(ModelConfig(**SHAPE))["total"], "rows": rows, "lowest_ratio": min(r["ratio"] for r in rows),
               "highest_ratio": max(r["ratio"] for r in rows)}
    if args.save:
        save("division", "Peak memory of a process in a training step, by how the run is divided, beside scale.estimate_memory, in MiB: one, two and four processes on a CPU, float32, "
             "two micro-batches of one row of 64 tokens on each.", figures, ("accelerate", "deepspeed"))
