"""Cosine, warm-up-stable-decay and constant learning rate over the same tokens, with AdamW and with Muon: held-out loss, for several seeds.

The peak of each schedule is chosen from a grid on validation rows with a seed of its own; the figures are of other seeds, on test rows
that nothing was chosen on. Seed s has the same weights at the start and the same order of data in all schedules, so that differences
can be paired."""
import json
import math
import statistics
from pathlib import Path

import torch

from llm_course.counting import count_parameters
from llm_course.recipes import seed_difference, recipe_config
from record import arguments, save
from recipes import make_rows, one_run

SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}
SCHEDULES = {"cosine": {"schedule": "cosine"}, "wsd": {"schedule": "wsd"}, "constant": {"schedule": "constant"}}
RATES = {"adamw": (2e-3, 4e-3, 8e-3, 16e-3), "muon": (5e-3, 1e-2, 2e-2, 4e-2)}

if __name__ == "__main__":
    args = arguments(__doc__, rows=4000, seeds=4, held_out=300, partial="schedules.partial.jsonl")
    torch.set_num_threads(1)
    train, val, test, vocab_size = make_rows(args.rows, args.held_out, 1024)
    config, partial, done, table = recipe_config("modern (Llama)", vocab_size, **SHAPE), Path(args.partial), {}, {}
    if partial.exists():      # go on where an earlier attempt stopped
        done = {(r["optimizer"], r["schedule"], r["what"], r["lr"], r["seed"]): r for r in map(json.loads, partial.read_text().splitlines())}

    def run(optimizer: str, name: str, what: str, rows, lr: float, seed: int) -> dict:
        key = (optimizer, name, what, lr, seed)
        if key not in done:
            done[key] = r = {"optimizer": optimizer, "schedule": name, "what": what} | one_run(config, train, rows, lr, seed, optimizer=optimizer, **SCHEDULES[name])
            with partial.open("a") as f:
                f.write(json.dumps(r) + "\n")
            print(r, flush=True)
        return done[key]

    for optimizer, rates in RATES.items():
        table[optimizer] = {}
        for name in SCHEDULES:
            tried = [run(optimizer, name, "val", val, lr, 100) for lr in rates]
            best = min(tried, key=lambda r: r["loss"] or math.inf)["lr"]
            losses = [run(optimizer, name, "test", test, best, seed)["loss"] for seed in range(args.seeds)]
            difference, half_width = seed_difference(losses, table[optimizer]["cosine"]["losses"] if table[optimizer] else losses)
            table[optimizer][name] = SCHEDULES[name] | {
                "lr": best, "val_by_lr": {f"{r['lr']:g}": r["loss"] for r in tried}, "losses": losses, "mean": round(statistics.mean(losses), 4),
                "sd": round(statistics.stdev(losses), 4), "difference": round(difference, 4), "half_width": round(half_width, 4)}
            print(optimizer, name, table[optimizer][name], flush=True)
    if args.save:
        save("schedules", "Loss (nats a token) on held-out rows after the same tokens, by learning-rate schedule, each with the peak that was best for it; several seeds",
             {"shape": SHAPE, "parameters": count_parameters(config)["total"], "vocab_size": vocab_size, "train_tokens": len(train) * 128, "test_tokens": len(test) * 128,
              "steps": len(train) // 16, "table": table}, ("torch",))
    partial.unlink()
