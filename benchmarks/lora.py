"""LoRA against full fine-tuning of a run's base model: learning rates, ranks, target layers, what is forgotten; and what it saves.

Every arm learns from the same 1,000 conversations, twice, and is measured on the validation people and texts, as in `benchmarks/sft.py`, whose
sweep is the one of full fine-tuning. The learning rate of the adapters is chosen for rank 8; other ranks get the best of that and lower ones. Adapters are scaled by alpha / rank = 2 throughout. Memory
is the peak of a process of its own. Finished arms are kept in `--cache`, those of full fine-tuning in `--full`, and not done again.

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
from sft import EPOCHS, N, RATES, Cache, Material, score, sized

from llm_course.hub import save_model
from llm_course.lora import TARGETS, add_lora, lora_layers, merge_lora, save_lora
from llm_course.model import ModelConfig, Transformer
from llm_course.packing import pack_examples, stack_rows
from llm_course.sft import sft, sft_loss, wake_special_tokens
from llm_course.trainer import TrainConfig, Trainer, mean_loss

LORA_RATES, RANKS = (1e-3, 3e-3, 1e-2, 3e-2), (1, 64)
PARTS = {"queries and values": ("q_proj", "v_proj"), "feed-forward": TARGETS[4:]}


def arm(m: Material, lr: float, rank: int, targets: tuple[str, ...] = TARGETS, seed: int = 0, wake: bool = True, apart: float = 0.1) -> dict:
    "Train adapters once, and measure; the special tokens are woken with `apart`."
    examples = random.Random(seed).sample(m.train, N)
    model = m.base(wake=False)
    if wake:
        wake_special_tokens(model, m.tokenizer, apart)
    torch.manual_seed(seed)
    add_lora(model, rank, 2.0 * rank, targets)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = TrainConfig(steps=round(len(m.rows(examples)) * EPOCHS / 8), batch_size=8, lr=lr, weight_decay=0.0, seed=seed, precision="auto", log_every=10)
    start = time.perf_counter()
    sft(model, examples, config, m.tokenizer)
    seconds = time.perf_counter() - start
    merge_lora(model)
    loss = lambda part: round(mean_loss(model, sft_loss, m.rows(part), stack_rows), 4)
    return {"lr": lr, "rank": rank, "seed": seed, "trainable": trainable, "steps": config.steps, "seconds": round(seconds, 1), "train_loss": loss(examples[:200]),
            "val_loss": loss(m.val)} | m.measure(model)


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
    args = arguments(__doc__, run="runs/lab", cache="runs/lora-cache", full="runs/sft-cache", one=-1)
    torch.set_num_threads(1)
    if args.one >= 0:
        return print(json.dumps(one_process(args.one)))
    m, cache, whole = Material(args.run), Cache(args.cache), Cache(args.full)
    one = lambda name, lr, rank, **kw: cache(f"{name}-{lr:g}", lambda: arm(m, lr, rank, **kw))
    figures = {"run": m.about(), "conversations": N, "epochs": EPOCHS, "memory": cache("memory", memory), "rank 8": [one("r8", lr, 8) for lr in LORA_RATES]}
    best = max(figures["rank 8"], key=score)["lr"]
    figures["tried"] = {str(r): [one(f"r{r}", lr, r) for lr in LORA_RATES if lr <= best] for r in RANKS}
    figures["ranks"] = [max(arms, key=score) for arms in figures["tried"].values()]
    figures["not woken"] = one("r8-asleep", best, 8, wake=False)
    figures["one vector"] = one("r8-together", best, 8, apart=0.0)
    figures["targets"] = {name: one(f"r8-{'-'.join(t)}", best, 8, targets=t) for name, t in PARTS.items()}
    figures["repeated"] = [one(f"r8-seed{s}", best, 8, seed=s) for s in (1, 2)]
    figures["before"], figures["full"] = whole("before", lambda: m.measure(m.base())), [sized(whole, m, lr, N, EPOCHS) for lr in RATES]
    top = max(figures["full"], key=score)["lr"]
    figures["full repeated"] = [sized(whole, m, top, N, EPOCHS, s) for s in (1, 2)]
    figures["full not woken"] = sized(whole, m, top, N, EPOCHS, wake=False)
    if args.save:
        save("lora", "LoRA against full fine-tuning of a run's base model: learning rate, rank, target layers, forgetting, memory", figures)


if __name__ == "__main__":
    main()
