"""Fine-tuning a run's base model: learning rate, epochs, number of conversations, kinds of loss, and what is forgotten of the pretraining text.

Each arm trains from the run's base model as the pipeline does (packed rows, batches of 8, cosine schedule) and is measured on questions about the
people of the validation split, on held-out conversations, and on the pretraining validation text. The settings are chosen there; two of them,
the pipeline's and the best, are then asked the run's test tasks. Finished arms are kept in `--cache` and not done again.

    python benchmarks/sft.py --run runs/lab --save
"""
import json
import random
import time
from functools import partial
from pathlib import Path

import torch
from record import arguments, save

from llm_course.evaluate import accuracy_by_kind, ask_tasks
from llm_course.hub import load_model, save_model
from llm_course.model import Transformer
from llm_course.packing import pack_examples, stack_rows
from llm_course.pretrain import bits_per_byte
from llm_course.reading import read_rows
from llm_course.sft import sft, sft_examples, sft_loss, wake_special_tokens
from llm_course.tokenizer import Tokenizer
from llm_course.trainer import TrainConfig, mean_loss
from llm_course.world import KINDS, make_tasks, make_village

ROOM = 128
RATES, SIZES, EPOCHS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), (300, 1000, 3000), (1, 3, 10)


class Material:
    "What all arms share: base model, conversations, held-out questions and texts of a run."

    def __init__(self, run: str, questions: int = 100, texts: int = 60):
        self.run, self.settings = Path(run), json.loads((Path(run) / "config.json").read_text())
        s, self.tokenizer = self.settings["settings"], Tokenizer.load(self.run / "base")
        chats = [row for _, row in read_rows(self.run / "corpus" / "conversations.jsonl")]
        examples, self.report = sft_examples(chats, self.tokenizer, ROOM)
        self.val, self.train = examples[:200], examples[200:]       # as in the pipeline
        self.tasks = make_tasks(make_village(s["seed"], s["data"]["people"]), "val", questions)
        self.test = [row for _, row in read_rows(self.run / "corpus" / "tasks.jsonl")]
        self.texts: dict[str, list[str]] = {}
        for _, row in read_rows(self.run / "corpus" / "val.jsonl"):
            if len(self.texts.setdefault(row["source"], [])) < texts:
                self.texts[row["source"]].append(row["text"])

    def about(self) -> dict:
        "The run in figures, for the record."
        made = json.loads((self.run / "base" / "metrics.json").read_text())["pretrain"]
        return {"command": self.settings["command"].replace(str(self.run.resolve()), str(self.run)), "pretraining_tokens": made["tokens"], "pretraining_val_loss": made["val_loss"],
                "parameters": made["parameters"], "conversations": len(self.train), "report": self.report, "held_out_conversations": len(self.val),
                "questions": len(self.tasks), "texts": {k: {"texts": len(v), "bytes": sum(len(t.encode()) for t in v)} for k, v in self.texts.items()}}

    def base(self, wake: bool = True) -> Transformer:
        model = load_model(self.run / "base")
        if wake:
            wake_special_tokens(model, self.tokenizer)
        return model

    def rows(self, examples: list[dict]) -> list[dict]:
        return pack_examples(examples, ROOM, self.tokenizer.pad_id)

    def measure(self, model: Transformer, tasks: list[dict] | None = None) -> dict:
        "Accuracy by kind on the validation people (or on `tasks`), and bits per byte of each source's held-out text."
        model.eval()
        answers = ask_tasks(model, self.tokenizer, tasks or self.tasks, max_new_tokens=40)
        found = {"accuracy": accuracy_by_kind(tasks or self.tasks, answers)}
        return found if tasks else found | {"bits_per_byte": {k: round(bits_per_byte(model, self.tokenizer, t), 4) for k, t in self.texts.items()}}


def arm(m: Material, lr: float = 3e-4, epochs: float = 2, n: int | None = None, seed: int = 0, wake: bool = True, keep: Path | None = None, **options) -> dict:
    "Train once and measure; `n` conversations drawn by `seed` (default: all), `options` of `sft`."
    examples = m.train if n is None else random.Random(seed).sample(m.train, n)
    rows, model = m.rows(examples), m.base(wake)
    config = TrainConfig(steps=max(1, round(len(rows) * epochs / 8)), batch_size=8, lr=lr, weight_decay=0.01, seed=seed, precision="auto", log_every=10)
    start = time.perf_counter()
    sft(model, examples, config, m.tokenizer, **options)
    seconds = time.perf_counter() - start
    loss = lambda part: round(mean_loss(model, sft_loss, m.rows(part), stack_rows), 4)
    if keep:
        save_model(model, keep, m.tokenizer)
    return {"lr": lr, "epochs": epochs, "n": len(examples), "seed": seed, "steps": config.steps, "seconds": round(seconds, 1), "train_loss": loss(examples[:200]),
            "val_loss": loss(m.val)} | m.measure(model)


def score(result: dict) -> float:
    "What the settings are chosen by: the mean of recall and form on the validation people."
    return (result["accuracy"]["recall"]["value"] + result["accuracy"]["form"]["value"]) / 2


class Cache:
    "Results by name, each computed once."

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, work) -> dict:
        path = self.folder / f"{name}.json"
        if not path.exists():
            result = work()
            path.write_text(json.dumps(result))
            short = {k: round(v["value"], 3) for k, v in result.get("accuracy", {}).items()}
            print(name, {k: v for k, v in result.items() if k in ("seconds", "train_loss", "val_loss", "bits_per_byte")}, short, flush=True)
        return json.loads(path.read_text())


def full(cache: Cache, m: Material, lr: float, epochs: float, seed: int) -> dict:
    "An arm with all conversations, whose model is kept for the test."
    name = f"full-{lr:g}-{epochs:g}-{seed}"
    return cache(name, lambda: arm(m, lr, epochs, seed=seed, keep=cache.folder / name))


def tested(cache: Cache, m: Material, lr: float, epochs: float, seeds: tuple[int, ...] = (0, 1, 2)) -> dict:
    "The run's test tasks, asked of one setting's models of all seeds."
    out = []
    for s in seeds:
        full(cache, m, lr, epochs, s)
        name = f"full-{lr:g}-{epochs:g}-{s}"
        out.append(cache(f"test-{name}", lambda: m.measure(load_model(cache.folder / name), m.test)))
    return {"lr": lr, "epochs": epochs, "seconds": [full(cache, m, lr, epochs, s)["seconds"] for s in seeds], "accuracy": [r["accuracy"] for r in out]}


def main() -> None:
    args = arguments(__doc__, run="runs/lab", cache="runs/sft-cache")
    torch.set_num_threads(1)
    m, cache = Material(args.run), Cache(args.cache)
    figures = {"run": m.about(), "kinds": KINDS, "before": cache("before", lambda: m.measure(m.base()))}
    figures["rates"] = [full(cache, m, lr, 2, 0) for lr in RATES]
    best = max(figures["rates"], key=score)["lr"]
    figures["chosen_lr"] = best
    figures["grid"] = [cache(f"n{n}-{best:g}-{e}-{s}", partial(arm, m, best, e, n, s)) for e in EPOCHS for n in SIZES for s in range(3)]
    figures["grid"] += [full(cache, m, best, e, s) for e, seeds in ((1, 3), (3, 3), (10, 1)) for s in range(seeds)]
    variants = {"token": {}, "example": {"by": "example"}, "dft": {"kind": "dft"}, "not woken": {"wake": False}}
    figures["variants"] = {k: full(cache, m, best, 2, 0) if not v else cache(f"variant-{k.replace(' ', '-')}-{best:g}", partial(arm, m, best, 2, **v)) for k, v in variants.items()}
    everything = figures["rates"] + [r for r in figures["grid"] if r["n"] == len(m.train)]
    top = max(everything, key=lambda r: (score(r), -r["epochs"]))
    figures["test"] = {"pipeline": tested(cache, m, 3e-4, 2), "best": tested(cache, m, top["lr"], top["epochs"])}
    if args.save:
        save("sft", "supervised fine-tuning of a run's base model: learning rate, epochs, size of the set, loss, forgetting", figures)


if __name__ == "__main__":
    main()
