"""LoRA against full fine-tuning of a run's base model: learning rates, ranks, target layers, what is forgotten; and what it saves.

Every arm learns from the same 3,000 conversations, three times, as in `benchmarks/sft.py`, and is measured there; each rank at the best of its
learning rates. The two best are asked the run's test tasks, with three seeds. Adapters are scaled by alpha / rank = 2 throughout. Memory is
the peak of a process of its own. Finished arms are kept in `--cache` and not done again.

    python benchmarks/lora.py --run runs/lab --save
"""
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from record import arguments, save
from sft import Cache, Material, score

from llm_course.hub import save_model
from llm_course.lora import TARGETS, add_lora, lora_layers, merge_lora, save_lora
from llm_course.model import ModelConfig, Transformer
from llm_course.packing import pack_examples, stack_rows
from llm_course.sft import sft, sft_loss
from llm_course.trainer import TrainConfig, Trainer, mean_loss

N, EPOCHS = 3000, 3
FULL_RATES, LORA_RATES, RANKS = (1e-4, 3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (1, 4, 16, 64)
WIDE_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)      # of rank 8
PARTS = {"queries and values": ("q_proj", "v_proj"), "attention": TARGETS[:4], "feed-forward": TARGETS[4:]}


def arm(m: Material, lr: float, rank: int = 0, targets: tuple[str, ...] = TARGETS, seed: int = 0, wake: bool = True, test: bool = False) -> dict:
    "Train once, fully (rank 0) or with adapters, and measure; with `test` also on the run's test tasks."
    examples = random.Random(0).sample(m.train, N)
    model = m.base(wake)
    if rank:
        torch.manual_seed(seed)
        add_lora(model, rank, 2.0 * rank, targets)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = round(len(m.rows(examples)) * EPOCHS / 8)
    config = TrainConfig(steps=steps, batch_size=8, lr=lr, weight_decay=0.0 if rank else 0.01, seed=seed, precision="auto")
    start = time.perf_counter()
    sft(model, examples, config, m.tokenizer)
    seconds = time.perf_counter() - start
    merge_lora(model)
    loss = lambda part: round(mean_loss(model, sft_loss, m.rows(part), stack_rows), 4)
    out = {"lr": lr, "rank": rank, "seed": seed, "trainable": trainable, "steps": steps, "seconds": round(seconds, 1), "train_loss": loss(examples[:200]), "val_loss": loss(m.val)}
    return out | m.measure(model) | ({"test": m.measure(model, m.test)["accuracy"]} if test else {})


def one_process(rank: int) -> dict:
    "Peak memory above the model's own of a few training steps, optimizer bytes and bytes to store, in this process."
    torch.manual_seed(0)
    model = Transformer(ModelConfig(2048, dim=512, n_layers=8, n_heads=8, max_seq_len=64))
    if rank:
        add_lora(model, rank)
    ids = torch.randint(0, 2048, (64,)).tolist()
    rows = pack_examples([{"input_ids": ids, "labels": ids}], 64, 1)
    trainer = Trainer(model, sft_loss, rows, TrainConfig(steps=3, batch_size=1, lr=1e-4), stack_rows)
    now = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
    trainer.fit()
    state = sum(v.numel() * v.element_size() for s in trainer.optimizer.state.values() for v in s.values() if torch.is_tensor(v))
    with tempfile.TemporaryDirectory() as folder:
        save_lora(model, f"{folder}/out") if rank else save_model(model, f"{folder}/out")
        stored = sum(f.stat().st_size for f in Path(f"{folder}/out").glob("*.safetensors"))
    p = [(q.numel(), q.requires_grad) for q in model.parameters()]
    return {"rank": rank, "parameters": sum(n for n, _ in p), "trainable": sum(n for n, t in p if t), "optimizer_mb": round(state / 2**20, 2), "stored_mb": round(stored / 2**20, 2),
            "peak_above_model_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - now, 1), "layers": len(lora_layers(model))}


def memory() -> dict:
    "`one_process` for full fine-tuning and for ranks 8 and 64, the smallest peak of three processes each."
    out = []
    for rank in (0, 8, 64):
        found = [json.loads(subprocess.run([sys.executable, __file__, "--one", str(rank)], capture_output=True, text=True, check=True).stdout) for _ in range(3)]
        out.append(min(found, key=lambda r: r["peak_above_model_mb"]))
    return {"model": {"vocab_size": 2048, "dim": 512, "n_layers": 8, "tokens a step": 64}, "ways": out}


def main() -> None:
    args = arguments(__doc__, run="runs/lab", cache="runs/lora-cache", one=-1)
    torch.set_num_threads(1)
    if args.one >= 0:
        return print(json.dumps(one_process(args.one)))
    m, cache = Material(args.run), Cache(args.cache)
    one = lambda name, lr, rank=0, **kw: cache(f"{name}-{lr:g}", lambda: arm(m, lr, rank, **kw))
    figures = {"run": m.about(), "conversations": N, "epochs": EPOCHS, "before": cache("before", lambda: m.measure(m.base())),
               "full": [one("full", lr) for lr in FULL_RATES], "rank 8": [one("r8", lr, 8) for lr in WIDE_RATES]}
    best_full, best8 = (max(figures[k], key=score)["lr"] for k in ("full", "rank 8"))
    figures["ranks"] = [max((one(f"r{r}", lr, r) for lr in LORA_RATES), key=score) for r in RANKS]
    figures["targets"] = {name: one(f"r8-{'-'.join(t)}", best8, 8, targets=t) for name, t in PARTS.items()}
    figures["not woken"] = {"full": one("full-asleep", best_full, wake=False), "rank 8": one("r8-asleep", best8, 8, wake=False)}
    figures["test"] = {name: [one(f"test-{name.replace(' ', '')}-{s}", lr, rank, seed=s, test=True) for s in range(3)] for name, lr, rank in (("full", best_full, 0), ("rank 8", best8, 8))}
    figures["memory"] = cache("memory", memory)
    if args.save:
        save("lora", "LoRA against full fine-tuning of a run's base model: learning rate, rank, target layers, forgetting, memory", figures)


if __name__ == "__main__":
    main()
