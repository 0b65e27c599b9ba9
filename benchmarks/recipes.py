"""Recipes from 2017 to now on the same tokens with the same number of parameters: held-out loss, for several seeds.

Every recipe differs from the modern block in what its name says; the width of its feed-forward part makes up for the parameters that
this costs or saves. The learning rate of each is chosen from a grid on validation rows with a seed of its own; the figures are of other
seeds, on test rows that nothing was chosen on. Seed s has the same order of data in all recipes, so that differences can be paired."""
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from llm_course.corpus import hold_out
from llm_course.filtering import clean_documents
from llm_course.mixing import mix
from llm_course.counting import count_parameters
from llm_course.model import ModelConfig, Transformer
from llm_course.recipes import RECIPES, seed_difference, recipe_config
from llm_course.tokenizer import train_tokenizer
from llm_course.trainer import TrainConfig, Trainer, mean_loss, seed_all
from llm_course.world import make_village, python_code, python_docs, village_documents

SHAPE = {"dim": 96, "n_layers": 4, "n_heads": 4, "max_seq_len": 128}


def make_rows(n_train: int, n_held_out: int, vocab_size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    "Rows of 128 + 1 tokens from equal bytes of village, code and documentation: for training, validation and test (other documents)."
    docs = village_documents(make_village(), 1_500_000) + python_code(1_500_000) + python_docs(1_500_000)
    kept, _ = clean_documents(docs)
    train, held_out = hold_out(kept, 120)
    by_source = {s: [d for d in train if d["source"] == s] for s in ("village", "code", "docs")}
    mixed, _ = mix(by_source, dict.fromkeys(by_source, 1), 3_000_000, seed=seed)
    tokenizer = train_tokenizer([d["text"] for d in mixed], vocab_size)

    def rows(documents, n):
        ids = [i for d in documents for i in tokenizer.document(d["text"])]
        rows = torch.tensor(ids[:len(ids) // 129 * 129]).view(-1, 129)
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n]]

    return rows(mixed, n_train), rows(held_out[::2], n_held_out), rows(held_out[1::2], n_held_out), len(tokenizer)


def loss_fn(model, batch):
    ids = batch["ids"]
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"), torch.tensor(ids[:, 1:].numel()), {}


def collate(rows):
    return {"ids": torch.stack(list(rows))}


def one_run(config: ModelConfig, train, test, lr: float, seed: int, **settings) -> dict:
    "Train one model over the rows once (`settings` of `TrainConfig`): its loss on the test rows."
    start = time.perf_counter()
    seed_all(seed)
    model = Transformer(config)
    trainer = Trainer(model, loss_fn, train, TrainConfig(steps=len(train) // 16, batch_size=16, lr=lr, warmup=0.1, seed=seed, log_every=20, **settings), collate)
    trainer.fit()
    loss = mean_loss(model, loss_fn, test, collate, 32)
    return {"lr": lr, "seed": seed, "loss": round(loss, 4) if math.isfinite(loss) else None, "seconds": round(time.perf_counter() - start, 1)}


if __name__ == "__main__":
    from record import arguments, save
    args = arguments(__doc__, rows=4000, seeds=3, held_out=300, partial="recipes.partial.jsonl")
    torch.set_num_threads(1)
    train, val, test, vocab_size = make_rows(args.rows, args.held_out, 1024)
    everything, done, partial = {name: recipe_config(name, vocab_size, **SHAPE) for name in RECIPES}, {}, Path(args.partial)
    if partial.exists():      # go on where an earlier attempt stopped
        done = {(r["recipe"], r["what"], r["lr"], r["seed"]): r for r in map(json.loads, partial.read_text().splitlines())}

    def run(name: str, what: str, rows, lr: float, seed: int) -> dict:
        if (name, what, lr, seed) not in done:
            done[name, what, lr, seed] = r = {"recipe": name, "what": what} | one_run(everything[name], train, rows, lr, seed)
            with partial.open("a") as f:
                f.write(json.dumps(r) + "\n")
            print(r, flush=True)
        return done[name, what, lr, seed]

    table = {}
    for name in RECIPES:
        tried = [run(name, "val", val, lr, 100) for lr in (1e-3, 3e-3, 8e-3)]
        best = min(tried, key=lambda r: r["loss"] or math.inf)["lr"]
        losses = [run(name, "test", test, best, seed)["loss"] for seed in range(args.seeds)]
        table[name] = {"change": RECIPES[name], "ffn_dim": everything[name].ffn_dim, "parameters": count_parameters(everything[name])["total"],
                       "lr": best, "val_by_lr": {f"{r['lr']:g}": r["loss"] for r in tried}, "losses": losses, "mean": round(statistics.mean(losses), 4),
                       "sd": round(statistics.stdev(losses), 4)}
        difference, half_width = seed_difference(losses, table["modern (Llama)"]["losses"])
        table[name] |= {"difference": round(difference, 4), "half_width": round(half_width, 4)}
        print(name, table[name], flush=True)
    if args.save:
        save("recipes", "Loss (nats a token) on held-out rows of small models after the same tokens, with the same parameters, by recipe; three seeds",
             {"shape": SHAPE, "vocab_size": vocab_size, "train_tokens": len(train) * 128, "test_tokens": len(test) * 128, "table": table}, ("torch",))
    partial.unlink()
