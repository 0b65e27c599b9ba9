"""SmolLM2-135M-Instruct, fine-tuned with LoRA on tasks of the village, before and after on held-out tasks of the same kinds.

The kinds are those that need no knowledge of the village's people: reading, string, counting, arithmetic. Needs the model file
(`llm_course.gguf_io.find_smollm2` says where it is looked for); without it the program says so and ends. Each finished part is kept in
`--cache`, and is not done again. The settings were not tuned.

    python benchmarks/lora_smollm.py --save
"""
import json
import random
import sys
import time
from pathlib import Path

import torch
from record import arguments, save

from llm_course.evaluate import accuracy_by_kind, ask_tasks
from llm_course.gguf_io import find_smollm2, from_gguf
from llm_course.lora import add_lora, load_lora, merge_lora, save_lora
from llm_course.packing import pack_examples, packed_loss, stack_rows
from llm_course.reading import UserError
from llm_course.sft import sft_examples
from llm_course.trainer import TrainConfig, Trainer, mean_loss
from llm_course.world import grade, make_tasks, make_village, sample_tasks, sft_answer

KINDS = ("reading", "string", "counting", "arithmetic")


def conversations(n: int, split: str, seed: int = 0) -> list[dict]:
    "Questions of `KINDS` with answers in the styles of the course's instruction data."
    rng = random.Random(f"smollm-{split}")
    tasks = sample_tasks(make_village(), split, n, seed, dict.fromkeys(KINDS, 1.0))
    return [{"messages": [{"role": "user", "content": t["prompt"]}, {"role": "assistant", "content": sft_answer(t, rng)}]} for t in tasks]


def asked(model, tokenizer, tasks: list[dict]) -> dict:
    "Exact and contained right answers by kind, how many ended by themselves, mean words."
    model.eval()
    start = time.perf_counter()
    answers = ask_tasks(model, tokenizer, tasks, max_new_tokens=24)
    contained = [grade(t, a)["contains"] for t, a in zip(tasks, answers)]
    return {"right": accuracy_by_kind(tasks, answers), "contains": {k: sum(c for t, c in zip(tasks, contained) if t["kind"] == k) for k in KINDS},
            "ended": sum(len(tokenizer.encode(a)) < 24 for a in answers), "n": len(tasks), "seconds": round(time.perf_counter() - start, 1)}


def train(model, tokenizer, args, adapter: Path) -> dict:
    "Train adapters and save them; held-out loss before and after, curve, time."
    pad = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.end_id
    (rows, val), reports = zip(*((pack_examples(e, 256, pad), r) for e, r in (sft_examples(conversations(n, s), tokenizer, 256) for n, s in ((600, "train"), (24, "val")))))
    add_lora(model, rank=8, alpha=16.0)
    loss = lambda: round(mean_loss(model, packed_loss, val, stack_rows, 2), 4)
    config = TrainConfig(steps=args.steps, batch_size=2, lr=args.lr, warmup=0.1, weight_decay=0.0, log_every=1)
    before, start = loss(), time.perf_counter()
    trainer = Trainer(model, packed_loss, rows, config, stack_rows)
    history = trainer.fit()
    seconds = time.perf_counter() - start
    save_lora(model, adapter)
    p = [(q.numel(), q.requires_grad) for q in model.parameters()]
    return {"rank": 8, "alpha": 16.0, "lr": args.lr, "steps": args.steps, "tokens": trainer.tokens, "seconds": round(seconds, 1), "val_loss": [before, loss()],
            "losses": [round(r["loss"], 4) for r in history], "examples": reports[0], "parameters": sum(n for n, _ in p), "trainable": sum(n for n, t in p if t),
            "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size}


def main() -> None:
    args = arguments(__doc__, steps=40, lr=1e-3, tasks=30, cache="runs/lora-smollm-cache")
    torch.set_num_threads(1)
    try:
        model, tokenizer = from_gguf(find_smollm2())
    except UserError as e:
        sys.exit(f"left out: {e}")
    cache, figures = Path(args.cache), {}
    cache.mkdir(parents=True, exist_ok=True)
    tasks = make_tasks(make_village(), "test", args.tasks, kinds=KINDS)
    for part, work in (("before", lambda: asked(model, tokenizer, tasks)), ("training", lambda: train(model, tokenizer, args, cache / "adapter")),
                       ("after", lambda: asked(merge_lora(load_lora(from_gguf(find_smollm2())[0], cache / "adapter")), tokenizer, tasks))):
        path = cache / f"{part}.json"
        if not path.exists():
            path.write_text(json.dumps(work()))
        figures[part] = json.loads(path.read_text())
        print(part, json.dumps({k: v for k, v in figures[part].items() if k != "losses"}), flush=True)
    if args.save:
        save("lora_smollm", "SmolLM2-135M-Instruct with LoRA on the village's instructions: held-out tasks before and after", figures)


if __name__ == "__main__":
    main()
