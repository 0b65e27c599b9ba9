"""A scaling law measured: small models of several sizes and token budgets, the law fitted to them, and one larger run that it must predict.

Corpus (documents of the village and of the installed Python packages), tokenizer and token file are made once in `--folder`; no run reads a token
twice. Each run is appended to `runs.jsonl` there as it ends, and a run that stands in it is not made again: the same command goes on.
`--stage sweep` compares learning rates at two sizes of the smallest level, `grid` trains the levels, `larger` predicts, writes the prediction down
with its time, and only then trains; `all` does the three. `--quick` is the same in small, in some two minutes.

    nice -n 5 python benchmarks/scaling.py --save
"""
import json
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from llm_course.corpus import hold_out
from llm_course.counting import count_parameters
from llm_course.dedup import text_digest
from llm_course.filtering import clean_documents
from llm_course.mixing import mix
from llm_course.model import Transformer
from llm_course.packing import TokenRows, packed_loss, stack_rows
from llm_course.pretrain import pretrain, tokenize_corpus
from llm_course.reading import UserError, write_json, write_jsonl
from llm_course.scaling import Law, SizedRun, bootstrap, compute_optimal, fit_law, interval, isoflop_minima, knob, power_law, predict
from llm_course.tokenizer import Tokenizer, train_tokenizer
from llm_course.trainer import mean_loss, seed_all
from llm_course.world import make_village, python_docs, village_documents

CONTEXT, VOCAB, SEEDS, HELD_OUT = 128, 1024, 2, 200
SHAPES = ((1, 16), (1, 24), (1, 32), (2, 24), (2, 32), (3, 32), (4, 32), (5, 32), (6, 32))     # layers, channels a layer
FULL = {"bytes": {"village": 24_000_000, "docs": 12_000_000}, "levels": {1.5e10: SHAPES[:4], 3e10: SHAPES[:5], 8e10: SHAPES[1:6], 2e11: SHAPES[3:5]}, "seeds_at": 3e10, "seeds_of": SHAPES[:1] + SHAPES[2:5], "larger": 4e11,
        "rates": (8e-3, 1.6e-2, 3.2e-2), "sweep": {3e10: (1, 32), 8e10: (2, 32)}, "check": {8e10: ((2, 24),)}, "adamw": (3e10, (1, 32), (4e-3, 8e-3, 1.6e-2, 3.2e-2), 8e-3), "min_steps": 180, "resamples": 200}
QUICK = FULL | {"bytes": {"village": 1_500_000, "docs": 500_000}, "levels": {1e10: SHAPES[:4], 2e10: SHAPES[:4], 4e10: SHAPES[1:5]}, "seeds_at": 0, "larger": 8e10,
                "rates": (2e-3, 8e-3), "sweep": {2e10: (2, 24)}, "check": {}, "adamw": None, "min_steps": 40, "resamples": 50}


def make_corpus(folder: Path, sizes: dict[str, int]) -> dict:
    "Clean documents without exact copies, a tokenizer, one token file for training and one a source held out; returns what is in them."
    if (folder / "corpus.json").exists():
        return json.loads((folder / "corpus.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    docs = village_documents(make_village(0, 80), sizes["village"]) + clean_documents(python_docs(sizes["docs"]))[0]      # the village is written clean
    unique = list({text_digest(d["text"]): d for d in docs}.values())
    train, val = hold_out(unique, 250)
    sources = {s: [d for d in train if d["source"] == s] for s in sizes}
    n_bytes = {s: sum(len(d["text"].encode()) for d in ds) for s, ds in sources.items()}
    mixed, _ = mix(sources, n_bytes, sum(n_bytes.values()))      # each document once, the sources evenly spread
    tokenizer = train_tokenizer([d["text"] for d in mixed[:len(mixed) // 4]], VOCAB)
    tokenizer.save(folder / "tokenizer")
    found = {"bytes": n_bytes, "vocab_size": len(tokenizer), "documents": {s: len(ds) for s, ds in sources.items()}, "duplicates_left_out": len(docs) - len(unique), "held_out": {}}
    for name in ("train", *sizes):
        ds = mixed if name == "train" else [d for d in val if d["source"] == name]
        write_jsonl(folder / f"{name}.jsonl", ({"text": d["text"]} for d in ds))
        meta = tokenize_corpus(folder / f"{name}.jsonl", tokenizer, folder / f"{name}.bin")
        found |= {"tokens": meta["tokens"]} if name == "train" else {"held_out": found["held_out"] | {name: meta["tokens"]}}
    found["held_out_seen"] = {s: seen_share([d["text"] for d in mixed], [d["text"] for d in val if d["source"] == s]) for s in sizes}
    write_json(folder / "corpus.json", found)
    return found


def seen_share(train: list[str], held_out: list[str], n: int = 13) -> float:
    "Share of the held-out runs of `n` words that stand in the training text too."
    grams = lambda text: (lambda w: {tuple(w[i:i + n]) for i in range(len(w) - n + 1)})(text.split())
    wanted = set().union(*map(grams, held_out))
    seen: set = set()
    for text in train:
        seen |= wanted & grams(text)
    return round(len(seen) / max(1, len(wanted)), 4)


def one_run(folder: Path, shape: tuple[int, int], level: float, lr: float = 0.0, seed: int = 0, optimizer: str = "muon") -> dict:
    "Train one model on `level` operations, 6 N D; returns its row."
    tokenizer, start, cpu = Tokenizer.load(folder / "tokenizer"), time.perf_counter(), time.process_time()
    began = datetime.now(timezone.utc).isoformat(timespec="seconds")
    plan = plan_of(shape, level, len(tokenizer), lr, seed, optimizer)
    rows = TokenRows(folder / "train.bin", CONTEXT, tokenizer.bos_id)
    assert plan.tokens <= len(rows) * CONTEXT, f"{plan.tokens} tokens are more than the corpus has: text would be read twice"
    seed_all(seed)
    model = Transformer(plan.model)
    trainer = pretrain(model, rows, plan.train)
    held = {s: held_out_rows(folder / f"{s}.bin", tokenizer.bos_id) for s in ("village", "docs")}
    by_source = {s: mean_loss(model, packed_loss, h, stack_rows) for s, h in held.items()}
    shares = json.loads((folder / "corpus.json").read_text())["bytes"]      # weights by bytes: not the mean over the tokens of the mixture
    c = count_parameters(plan.model)
    return {"depth": shape[0], "width": shape[1], "dim": plan.model.dim, "parameters": plan.parameters, "without_embedding": c["total"] - c["embedding"],
            "tokens": plan.tokens, "level": level, "flops": plan.flops, "lr": round(plan.train.lr, 6), "batch_rows": plan.train.batch_size, "steps": plan.train.steps, "seed": seed,
            "loss": round(sum(shares[s] * v for s, v in by_source.items()) / sum(shares.values()), 5), "by_source": {s: round(v, 5) for s, v in by_source.items()},
            "train_loss": round(statistics.mean(r["loss"] for r in trainer.history[-10:]), 4), "began": began, "seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}


def held_out_rows(path: Path, bos_id: int) -> list[dict]:
    "At most `HELD_OUT` rows of a held-out file, evenly spread."
    rows = TokenRows(path, CONTEXT, bos_id)
    return [rows[i * len(rows) // HELD_OUT] for i in range(HELD_OUT)] if len(rows) > HELD_OUT else list(rows)


def plan_of(shape: tuple[int, int], level: float, vocab_size: int, lr: float = 0.0, seed: int = 0, optimizer: str = "muon") -> SizedRun:
    "The knob on a level: as many tokens as its operations pay for."
    n = knob(shape[0], vocab_size, shape[1], CONTEXT, batch_factor=1.0).parameters
    return knob(shape[0], vocab_size, shape[1], CONTEXT, batch_factor=1.0, tokens=round(level / 6 / n), lr=lr, optimizer=optimizer, seed=seed)


def able(level: float, settings: dict, corpus: dict, shapes: tuple) -> list[tuple[int, int]]:
    "Those of the shapes that read no token twice on a level and take enough steps."
    plans, most = {}, corpus["tokens"] // CONTEXT * CONTEXT
    for shape in shapes:
        try:
            plans[shape] = plan_of(shape, level, corpus["vocab_size"])
        except UserError:       # hardly a step
            continue
    return [s for s, p in plans.items() if p.tokens <= most and p.train.steps >= settings["min_steps"]]


class Book:
    "The runs made so far, in a file that grows by a line a run."

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "runs.jsonl"
        self.rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def of(self, kind: str) -> list[dict]:
        return [r for r in self.rows if r["kind"] == kind]

    def run(self, kind: str, shape: tuple[int, int], level: float, lr: float = 0.0, seed: int = 0) -> dict:
        key = (kind, *shape, level, seed, lr)
        for r in self.rows:
            if (r["kind"], r["depth"], r["width"], r["level"], r["seed"], r["asked_lr"]) == key:
                return r
        row = {"kind": kind, "asked_lr": lr} | one_run(self.folder, shape, level, lr, seed, "adamw" if kind == "adamw" else "muon")
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print({k: row[k] for k in ("kind", "depth", "width", "parameters", "tokens", "level", "lr", "steps", "seed", "loss", "seconds", "cpu_seconds")}, flush=True)
        return row


def grid(book: Book, settings: dict, corpus: dict) -> None:
    "All levels, the small ones first; at one level with further seeds."
    for level, shapes in settings["levels"].items():
        for shape in able(level, settings, corpus, shapes):
            for seed in range(SEEDS if level == settings["seeds_at"] and shape in settings["seeds_of"] else 1):
                book.run("grid", shape, level, seed=seed)


def check_rates(book: Book, settings: dict, corpus: dict) -> None:
    "Was the rule for the learning rate right at a level where it was not chosen? Half and twice of what it says."
    for level, shapes in settings["check"].items():
        for shape in shapes:
            rate = plan_of(shape, level, corpus["vocab_size"]).train.lr
            for factor in (0.5, 2):
                book.run("check", shape, level, rate * factor)


def told(runs: list[dict], settings: dict, size: str = "parameters") -> tuple[Law, list[Law]]:
    return fit_law(runs, size), bootstrap(runs, settings["resamples"], size)


def larger(book: Book, settings: dict, corpus: dict) -> dict:
    "Predict the larger run, write it down, then make it."
    path, level, runs = book.folder / "prediction.json", settings["larger"], book.of("grid")
    if not path.exists():
        assert not book.of("larger"), "the larger run was made before it was predicted"
        law, resampled = told(runs, settings)
        best = compute_optimal(law, level)[0]
        shape = min(able(level, settings, corpus, SHAPES), key=lambda s: abs(plan_of(s, level, corpus["vocab_size"]).parameters / best - 1))
        plan = plan_of(shape, level, corpus["vocab_size"])
        plain = power_law([m["level"] for m in isoflop_minima(runs)], [m["loss"] for m in isoflop_minima(runs)])
        write_json(path, {"written": datetime.now(timezone.utc).isoformat(timespec="seconds"), "level": level, "optimal_parameters": best, "depth": shape[0], "width": shape[1],
                          "parameters": plan.parameters, "tokens": plan.tokens, "runs": len(runs), "law": vars(law), "from_line_of_minima": plain[0] * level ** plain[1]}
                   | predict(law, resampled, runs, plan.parameters, plan.tokens))
    prediction = json.loads(path.read_text())
    print("prediction", prediction, flush=True)
    return {"prediction": prediction, "outcome": book.run("larger", (prediction["depth"], prediction["width"]), level)}


if __name__ == "__main__":
    from record import arguments, save
    args = arguments(__doc__, folder="runs/scaling", stage="all", quick=0)
    torch.set_num_threads(1)
    settings, folder = (QUICK if args.quick else FULL), Path(args.folder)
    corpus = make_corpus(folder, settings["bytes"])
    print(corpus, flush=True)
    book = Book(folder)
    if args.stage in ("all", "sweep"):
        for lr in settings["rates"]:
            for level, shape in settings["sweep"].items():
                book.run("sweep", shape, level, lr)
        if settings["adamw"]:       # how the other optimizer does in so few steps: rates, and seeds at the best of them
            level, shape, rates, best = settings["adamw"]
            for lr, seed in [*((lr, 0) for lr in rates), (best, 1), (best, 2)]:
                book.run("adamw", shape, level, lr, seed)
    if args.stage in ("all", "grid"):
        grid(book, settings, corpus)
    if args.stage in ("all", "larger"):
        outcome = larger(book, settings, corpus)
        check_rates(book, settings, corpus)
        keep = lambda rows: [{k: v for k, v in r.items() if k not in ("began", "asked_lr", "kind")} for r in rows]
        figures = {"corpus": corpus, "context": CONTEXT, "held_out_rows": HELD_OUT, "settings": {k: v for k, v in settings.items() if k in ("seeds_at", "larger", "min_steps", "resamples")},
                   "sweep": keep(book.of("sweep")), "check": keep(book.of("check")), "adamw": keep(book.of("adamw")), "runs": keep(book.of("grid")), **outcome, "seconds": round(sum(r["seconds"] for r in book.rows)), "cpu_seconds": round(sum(r["cpu_seconds"] for r in book.rows))}
        print(json.dumps(outcome, indent=1))
        if args.save:
            save("scaling", "Held-out loss of small models of several sizes and token budgets; the law fitted to them predicts one larger run, which is then made", figures, ("torch",))
