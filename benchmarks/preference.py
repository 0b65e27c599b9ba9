"""All preference methods on the same pairs and budget of one run: gold win rate against SFT, KL, length, accuracy; β sweep; wrong labels; online.

Learning rate and β of each method are chosen on validation people with one seed; test people are asked once for each seed. Finished arms
are kept in a folder beside the run (--cache), so that a stopped benchmark goes on where it was; --finished 1 takes only those."""
import copy
import hashlib
import json
import time
from pathlib import Path

import torch
from record import arguments, command_of, rounded, save
from safetensors.torch import load_file, save_file

from llm_course.hub import load_model
from llm_course.preference import KINDS, add_mismatched, add_reference, preference_batch, preference_loss, train_preference
from llm_course.preference_study import flip_labels, fresh_pairs, measure_policy
from llm_course.reading import read_rows, write_json
from llm_course.reward import pair_examples
from llm_course.step import TrainConfig
from llm_course.tasks import IGNORE
from llm_course.tokenizer import Tokenizer
from llm_course.world import gold_reward, make_village, sample_tasks

BATCH = 16
GRID = {"dpo": [{"beta": b} for b in (0.1, 0.3)], "hinge": [{"beta": b} for b in (0.1, 0.3)], "ipo": [{"beta": b} for b in (0.3, 1.0)],
        "ipo sum": [{"beta": b} for b in (0.03, 0.1)], "normed": [{"beta": b} for b in (2.0, 5.0)], "kto": [{"beta": b} for b in (0.1, 0.3)],
        "orpo": [{"beta": b} for b in (0.5, 1.0)], "cpo": [{"beta": b} for b in (0.1, 0.3)],
        "simpo": [{"beta": b, "gamma_ratio": 0.5} for b in (2.0, 5.0)]}
RATES = (2e-4, 5e-4)
LIKE_DPO = {"cdpo": {"kind": "dpo", "label_smoothing": 0.1}, "rdpo": {"kind": "robust", "label_smoothing": 0.1}}     # take DPO's choice
SWEEP = (0.02, 0.1, 0.3, 1.0)
NOISY = ("dpo", "cdpo", "rdpo", "ipo", "kto", "simpo")


class Study:
    "A run's SFT model, pairs and tasks, and the arms that are finished."

    def __init__(self, folder: Path, cache: Path, pairs: int, finished: bool = False):
        self.config, self.cache, self.finished, self.folder = json.loads((folder / "config.json").read_text()), cache, finished, folder
        self.tokenizer, self.sft = Tokenizer.load(folder / "tokenizer"), load_model(folder / "sft")
        cache.mkdir(parents=True, exist_ok=True)
        self.n, self.known = pairs, {}
        settings = self.config["settings"]
        self.seed, village = settings["seed"], make_village(settings["seed"], settings["data"]["people"])
        self.village = village
        self.tasks = {"val": sample_tasks(village, "val", 200, self.seed + 2), "test": sample_tasks(village, "test", 400, self.seed + 2)}

    def pairs(self, n: int | None) -> list[dict]:
        "The run's first pairs, with the log-probabilities of the SFT model."
        if n not in self.known:
            rows = [row for _, row in zip(range(n or 10**9), (row for _, row in read_rows(self.folder / "corpus" / "pairs.jsonl")))]
            examples, _ = pair_examples(rows, self.tokenizer, self.sft.config.max_seq_len)
            if n:
                examples = add_mismatched(examples, self.sft.config.max_seq_len)      # for KTO
            self.known[n] = add_reference(self.sft, examples, self.tokenizer.pad_id)
        return self.known[n]

    def start(self, split: str, seed: int) -> tuple[dict, list[float]]:
        "What the SFT model's own answers to a split's tasks are like, and their rewards."
        path = self.cache / f"sft-{split}-{seed}.json"
        if not path.exists():
            write_json(path, measure_policy(self.sft, self.sft, self.tokenizer, self.tasks[split], seed=seed))
        return json.loads(path.read_text())

    def path(self, arm: dict, end: str) -> Path:
        return self.cache / f"{hashlib.sha256(json.dumps(arm, sort_keys=True).encode()).hexdigest()[:16]}{end}"

    def model(self, arm: dict):
        "The policy of an arm, trained or from the cache."
        policy, path = copy.deepcopy(self.sft), self.path(arm, ".safetensors")
        if path.exists():
            policy.load_state_dict(load_file(path))
            return policy
        start = time.perf_counter()
        pairs = self.pairs(None if arm.get("all") else self.n)
        if arm.get("flip"):
            pairs = flip_labels(pairs, arm["flip"], arm["seed"])
        options = {k: arm[k] for k in ("beta", "gamma_ratio", "label_smoothing", "average", "alpha", "prompt_loss") if k in arm}
        config = TrainConfig(steps=arm["steps"], batch_size=BATCH, lr=arm["lr"], weight_decay=0.0, warmup=0.05, seed=arm["seed"], log_every=max(1, arm["steps"] // 20))
        trainer = train_preference(policy, pairs, config, self.tokenizer, kind=arm["kind"], **options)
        curve = [{k: round(v, 5) for k, v in r.items() if k in ("step", "loss", "kl") or k.startswith(("logps", "rewards/m", "rewards/a"))} for r in trainer.history]
        write_json(self.path(arm, ".train.json"), {"arm": arm, "seconds": round(time.perf_counter() - start, 1), "curve": curve})
        save_file({k: v.contiguous() for k, v in policy.state_dict().items() if k != "lm_head.weight"}, path)
        return policy

    def measured(self, arm: dict, split: str) -> dict | None:
        "What the arm's answers to a split's tasks are like."
        path = self.path(arm, f".{split}.json")
        if not path.exists():
            if self.finished:
                return None
            policy, start = self.model(arm), time.perf_counter()
            found, _ = measure_policy(policy, self.sft, self.tokenizer, self.tasks[split], self.start(split, arm["seed"])[1], seed=arm["seed"])
            write_json(path, arm | found)
            name = arm.get("name", arm["kind"])
            print(f"{split:4} {name:8} {({k: v for k, v in arm.items() if k not in ('name', 'kind', 'steps')})} win {found['win_rate']['value']:.3f} gold {found['gold']['value']:.2f} "
                  f"kl {found['kl']['value']:.2f} ends {found['ends']['value']:.2f} length {found['length']['value']:.1f} ({time.perf_counter() - start:.0f} s)", flush=True)
        return json.loads(path.read_text())

    def trained(self, arm: dict, part: str) -> dict:
        "Time of an arm, and for some its curve."
        found = json.loads(self.path(arm, ".train.json").read_text())
        return {k: found[k] for k in ("arm", "seconds", "curve") if k != "curve" or part in ("compared 0", "rates")}


def arm_of(name: str, lr: float, steps: int, seed: int, **options) -> dict:
    kind = {"kind": name} if name in KINDS else {"kind": "ipo", "average": False} if name == "ipo sum" else LIKE_DPO[name]
    return kind | {"name": name, "lr": lr, "steps": steps, "seed": seed} | options


def choose(study: Study, steps: int) -> tuple[dict, dict]:
    "Each method's learning rate and options, by gold reward on validation people; and the whole grid."
    chosen, grid, gold = {}, {}, lambda r: r["gold"]["value"]
    for name, options in GRID.items():
        measure = lambda lr, o: study.measured(arm_of(name, lr, steps, study.seed, **o), "val")
        first = [measure(lr, options[0]) for lr in RATES]                     # the learning rate first, then β at the better one
        grid[name] = first + [measure(max(first, key=gold)["lr"], o) for o in options[1:]]
        best = max(grid[name], key=gold)
        chosen[name] = {k: best[k] for k in ("lr", "beta", "gamma_ratio") if k in best}
    for name in LIKE_DPO:
        chosen[name] = dict(chosen["dpo"])
    return chosen, grid


def brief(row: dict) -> dict:
    "A row without accuracies, and with intervals for win rate and KL only."
    return {k: v["value"] if k in ("gold", "length", "ends") else v for k, v in row.items() if k != "right"}


def online(study: Study, lr: float, beta: float, rounds: int, steps: int, seed: int) -> dict:
    "DPO on the present policy's own answers, judged by the gold reward: in each round new pairs; the reference stays the SFT model."
    path, start = study.cache / f"online-{lr}-{beta}-{rounds}-{steps}-{seed}.json", time.perf_counter()
    if path.exists() or study.finished:
        return json.loads(path.read_text()) if path.exists() else None
    policy, used = copy.deepcopy(study.sft), 0
    for r in range(rounds):
        tasks = sample_tasks(study.village, "train", steps * BATCH, 1000 * seed + r)
        pairs = fresh_pairs(policy, study.tokenizer, tasks, gold_reward, seed=r)
        used += len(pairs)
        config = TrainConfig(steps=steps, batch_size=BATCH, lr=lr, weight_decay=0.0, schedule="constant", seed=seed, log_every=steps)
        train_preference(policy, pairs, config, study.tokenizer, reference=study.sft, beta=beta)
    seconds = time.perf_counter() - start
    base = study.start("test", seed)[1]
    found = measure_policy(policy, study.sft, study.tokenizer, study.tasks["test"], base, seed=seed)[0] | {"pairs": used, "seconds": round(seconds, 1), "seed": seed}
    write_json(path, found)
    print("online", seed, found["win_rate"]["value"], found["kl"]["value"], f"{seconds:.0f} s", flush=True)
    return found


def plan(study: Study, chosen: dict, steps: int, seeds: list[int]) -> dict[str, list[dict]]:
    "The arms of each part, all measured on test people but those of `default`."
    final = lambda name, seed, **more: arm_of(name, **(chosen[name] | {"steps": steps, "seed": seed} | more))
    wrong = lambda name, share: {"flip": share} | ({"label_smoothing": max(0.1, share)} if name in LIKE_DPO else {}) if share else {}
    compared = {f"compared {n}": [final(name, seed) for name in chosen] for n, seed in enumerate(seeds)}
    noise = {f"noise {n}": [final(name, seed, **wrong(name, f)) for f in NOISE[::2] for name in NOISY] for n, seed in enumerate(seeds)}
    sweep = {f"sweep {n}": [final("dpo", seed, beta=b) for b in SWEEP] for n, seed in enumerate(seeds)}
    first = {"compared 0": compared["compared 0"], "sweep 0": sweep["sweep 0"], "rates": [final("dpo", seeds[0], lr=lr) for lr in LADDER],
             "default": [arm_of("dpo", lr, n, seeds[0], beta=b, all=True) for b, lr, n in DEFAULTS], "noise 0": noise["noise 0"]}
    first["extras"] = [final("orpo", seeds[0], prompt_loss=True), final("simpo", seeds[0], alpha=1.0), final("dpo", seeds[0], alpha=0.2)]
    parts = first | compared | noise | sweep
    return parts | {"noise between": [final(name, seeds[0], **wrong(name, f)) for f in NOISE[1::2] for name in NOISY]}


def packing(study: Study, rounds: int = 4) -> dict:
    "Places and seconds of forward and backward pass on batches of 32 pairs, padded and packed; and how many tokens are prompts computed twice."
    model, found = copy.deepcopy(study.sft), {}
    pairs = study.pairs(study.n)
    for name, room in {"padded": 0, "packed": model.config.max_seq_len}.items():
        seconds, places, tokens = [], 0, 0
        for i in range(rounds):
            batch = preference_batch(pairs[32 * i:32 * i + 32], study.tokenizer.pad_id, room)
            start = time.process_time()
            preference_loss(model, batch)[0].backward()
            seconds.append(time.process_time() - start)
            places += batch["input_ids"].numel()
            tokens += sum(len(e[f"{s}_ids"]) for e in pairs[32 * i:32 * i + 32] for s in ("chosen", "rejected"))
        found[name] = {"used": tokens / places, "seconds": min(seconds)}
    twice = sum(t == IGNORE for e in pairs for t in e["chosen_labels"])
    return found | {"prompts_twice": twice / sum(len(e[f"{s}_ids"]) for e in pairs for s in ("chosen", "rejected"))}


def about(folder: Path) -> dict:
    "On which model this was measured."
    read = lambda stage: json.loads((folder / stage / "metrics.json").read_text())
    return {"command": command_of(folder), "pretrain": {k: read("base")["pretrain"][k] for k in ("parameters", "tokens", "val_loss")}, "sft": {"val_loss": read("sft")["sft"]["val_loss"]}}


def main():
    options = arguments(__doc__, run="runs/laptop", cache="runs/preference-cache", pairs=1024, steps=64, seeds=3, finished=0, stop="noise between")
    torch.set_num_threads(1)
    study = Study(Path(options.run), Path(options.cache), options.pairs, bool(options.finished))
    seeds = [study.seed + s for s in range(options.seeds)]
    chosen, grid = choose(study, options.steps)
    figures = {"run": about(Path(options.run)), "pairs": options.pairs, "steps": options.steps, "batch": BATCH, "chosen": chosen, "grid": {k: [brief(r) for r in v] for k, v in grid.items()}, "parts": {}, "trained": {}}
    figures["sft"] = [study.start("test", s)[0] for s in seeds]
    for part, arms in plan(study, chosen, options.steps, seeds).items():
        split = "val" if part == "default" else "test"
        rows = [r for arm in arms if (r := study.measured(arm, split))]
        figures["parts"][part] = rows if part.startswith(("compared", "extras")) else [brief(r) for r in rows]
        figures["trained"][part] = [study.trained(arm, part) for arm in arms if study.path(arm, ".train.json").exists()]
        if part == options.stop:
            break
    figures["online"] = [r for s in seeds[:2] if (r := online(study, chosen["dpo"]["lr"], chosen["dpo"]["beta"], 4, options.steps // 4, s))]
    good = max(figures["parts"]["default"], key=lambda r: r["gold"], default=None)
    if good:
        arm = {k: good[k] for k in ("kind", "name", "lr", "steps", "beta", "all", "seed")}
        figures["default_test"] = [brief(r) for r in [study.measured(arm, "test")] if r]
    figures["packing"] = packing(study)
    if options.save:
        save("preference", "preference methods on the same pairs and budget, on a model of the named run", rounded(figures))


DEFAULTS = [(0.3, 1e-4, 250), (0.1, 2e-4, 250), (0.3, 3e-4, 250), (0.3, 3e-4, 500)]
LADDER = (5e-5, 2e-4, 5e-4, 2e-3)
NOISE = (0.0, 0.1, 0.2, 0.3, 0.4)

if __name__ == "__main__":
    main()
