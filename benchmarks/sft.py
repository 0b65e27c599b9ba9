"""Fine-tuning a run's base model: learning rate, epochs, number of conversations, kinds of loss, and what is forgotten of the pretraining text.

Each arm trains from the run's base model as the pipeline does (packed rows, batches of 8, cosine schedule) and is measured on questions about the
people of the validation split, on held-out conversations, and on pretraining validation text. Settings are chosen there. Two models are asked
the run's test tasks at the end: the run's own, of its stage `sft`, and the best of those trained on all conversations. Finished arms are kept in `--cache` and not done again.

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
from llm_course.intervals import mean_interval, rate
from llm_course.generate import Sampling
from llm_course.hub import load_model, save_model
from llm_course.model import Transformer
from llm_course.packing import pack_examples, stack_rows
from llm_course.pretrain import bits_per_byte
from llm_course.reading import read_rows
from llm_course.sft import sft, sft_examples, sft_loss, wake_special_tokens
from llm_course.tokenizer import Tokenizer
from llm_course.trainer import TrainConfig, mean_loss
from llm_course.world import KINDS, grade, make_tasks, make_village

ROOM = 128
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
N, EPOCHS = 1000, 2                                                           # of the sweep over learning rates
GRID = ((300, 1), (300, 3), (300, 10), (1000, 1), (1000, 3), (1000, 10), (3000, 1))      # conversations and epochs
REPEATED = ((300, 3), (1000, 2))                                              # with two more seeds: other conversations in another order
WHOLE = ((3e-4, 1, "nll"), (3e-4, 2, "dft"))                                  # for all conversations, beside the run's own


class Material:
    "What all arms share: base model, conversations, held-out questions and texts of a run."

    def __init__(self, run: str, texts: int = 8, characters: int = 1500):
        self.run, self.settings = Path(run), json.loads((Path(run) / "config.json").read_text())
        s, self.tokenizer = self.settings["settings"], Tokenizer.load(self.run / "base")
        chats = [row for _, row in read_rows(self.run / "corpus" / "conversations.jsonl")]
        examples, self.report = sft_examples(chats, self.tokenizer, ROOM)
        self.val, self.train = examples[:200], examples[200:]       # as in the pipeline
        village = make_village(s["seed"], s["data"]["people"])
        self.tasks = make_tasks(village, "val", 100, kinds=KINDS[:2]) + make_tasks(village, "val", 40, kinds=KINDS[2:])
        self.test = [row for _, row in read_rows(self.run / "corpus" / "tasks.jsonl")]
        self.texts: dict[str, list[str]] = {}
        for _, row in read_rows(self.run / "corpus" / "val.jsonl"):
            if len(self.texts.setdefault(row["source"], [])) < texts:
                self.texts[row["source"]].append(row["text"][:characters])

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


def sized(cache: Cache, m: Material, lr: float, n: int, epochs: float, seed: int = 0, **options) -> dict:
    "An arm by its name."
    more = "".join(f"-{k}={v}" for k, v in options.items())
    return cache(f"n{n}-{epochs:g}-{lr:g}-{seed}{more}", partial(arm, m, lr, epochs, n, seed, **options))


def whole(cache: Cache, m: Material) -> list[dict]:
    "The run's own fine-tuned model, and others on all conversations; their models are kept."
    s, own = m.settings["settings"]["sft"], cache("run", lambda: m.measure(load_model(m.run / "sft")))
    seconds = json.loads((m.run / "sft" / "stage.json").read_text())["seconds"]
    out = [own | {"folder": str(m.run / "sft"), "lr": s["lr"], "epochs": s["epochs"], "kind": s.get("kind", "nll"), "n": len(m.train), "seconds": seconds}]
    for lr, epochs, kind in WHOLE:
        name = f"all-{epochs:g}-{lr:g}-{kind}"
        out.append(cache(name, lambda: arm(m, lr, epochs, keep=cache.folder / name, kind=kind)) | {"folder": str(cache.folder / name), "kind": kind})
    return out


def tested(cache: Cache, m: Material, result: dict) -> dict:
    "A kept model on the run's test tasks."
    return cache(f"test-{Path(result['folder']).name}", lambda: m.measure(load_model(result["folder"]), m.test))["accuracy"]


def variety(cache: Cache, m: Material, result: dict, samples: int = 8) -> dict:
    "How many different answers a kept model gives to the same question at temperature 1 (one in four of recall and form): mean with interval; how many are right."
    def work():
        tasks = [t for t in m.tasks if t["kind"] in KINDS[:2]][::4]
        answers = ask_tasks(load_model(result["folder"]), m.tokenizer, [t for t in tasks for _ in range(samples)], max_new_tokens=40, sampling=Sampling(1.0))
        groups = [answers[i:i + samples] for i in range(0, len(answers), samples)]
        right = sum(grade(t, a)["right"] for t, group in zip(tasks, groups) for a in group)
        return {"different": mean_interval([len(set(g)) for g in groups]), "right": rate(right, len(answers)), "samples": samples}
    return cache(f"variety-{Path(result['folder']).name}", work)


def main() -> None:
    args = arguments(__doc__, run="runs/lab", cache="runs/sft-cache")
    torch.set_num_threads(1)
    m, cache = Material(args.run), Cache(args.cache)
    figures = {"run": m.about(), "kinds": KINDS, "before": cache("before", lambda: m.measure(m.base()))}
    figures["rates"] = [sized(cache, m, lr, N, EPOCHS) for lr in RATES]
    figures["chosen_lr"] = best = max(figures["rates"], key=score)["lr"]
    figures["grid"] = [sized(cache, m, best, n, e) for n, e in GRID]
    variants = {"dft": {"kind": "dft"}, "example": {"by": "example"}, "not woken": {"wake": False}}
    figures["variants"] = {k: sized(cache, m, best, N, EPOCHS, **v) for k, v in variants.items()}
    figures["repeated"] = [sized(cache, m, best, n, e, s) for n, e in REPEATED for s in (1, 2)]
    candidates = whole(cache, m)
    top = max(candidates, key=score)
    figures["test"] = {"run": tested(cache, m, candidates[0]), "best": tested(cache, m, top), "best is": {k: top[k] for k in ("lr", "epochs", "kind")}}
    figures["all"] = [{k: v for k, v in r.items() if k != "folder"} | {"sampled": variety(cache, m, r)} for r in candidates]
    if args.save:
        save("sft", "supervised fine-tuning of a run's base model: learning rate, epochs, size of the set, loss, forgetting", figures)


if __name__ == "__main__":
    main()
