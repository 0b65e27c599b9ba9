"""Rewards that can be verified: GRPO, its kin and PPO on recall and form tasks of the world, by exact match, with the same number of answers.

Every arm starts from the SFT model of a run and writes answers to training tasks; accuracy is measured on tasks held out for tests (about other people), greedy and
at temperature 1. The learning rate of each method is chosen on validation tasks with a seed of its own (`choose`)."""
import copy
import time
from pathlib import Path

import torch
from ppo import cached, file_of, origin
from record import arguments, rounded, save

from llm_course.evaluate import accuracy_by_kind, ask_tasks, sequence_kl
from llm_course.intervals import rate
from llm_course.generate import Sampling
from llm_course.grpo import METHODS, GRPOConfig, task_prompts, train_grpo, verified_scorer
from llm_course.hub import load_model
from llm_course.pipeline import open_run
from llm_course.ppo import PPOConfig, train_ppo
from llm_course.reward import RewardModel
from llm_course.step import TrainConfig
from llm_course.tokenizer import Tokenizer
from llm_course.trainer import Callback, seed_all
from llm_course.world import grade, make_tasks, make_village

KINDS, NEW = ("recall", "form"), 24


class Material:
    "What all arms share: the SFT model and tasks of each split."

    def __init__(self, folder: Path):
        s = open_run(folder).settings
        self.tokenizer, self.sft, village = Tokenizer.load(folder / "tokenizer"), load_model(folder / "sft"), make_village(s["seed"], s["data"]["people"])
        room = self.sft.config.max_seq_len - NEW
        fits = lambda tasks: [t for t, p in zip(tasks, task_prompts(tasks, self.tokenizer)) if len(p) <= room]
        self.tasks = {split: fits(make_tasks(village, split, n, s["seed"] + 5, KINDS)) for split, n in {"train": 1500, "val": 60, "test": 200}.items()}

    def accuracy(self, model, split: str) -> dict:
        "Exact-match accuracy of each kind, greedy and sampled."
        tasks = self.tasks[split]
        greedy, sampled = (ask_tasks(model, self.tokenizer, tasks, max_new_tokens=NEW, sampling=Sampling(t)) for t in (0.0, 1.0))
        both = lambda answers: rate(sum(grade(t, a)["right"] for t, a in zip(tasks, answers)), len(tasks))
        return {"greedy": accuracy_by_kind(tasks, greedy) | {"both": both(greedy)}, "sampled": accuracy_by_kind(tasks, sampled) | {"both": both(sampled)}}


class Accuracy(Callback):
    "Every so many steps the share of right sampled answers to validation tasks."

    def __init__(self, m: Material, every: int):
        self.m, self.every, self.rows = m, every, []

    def after_step(self, trainer, record):
        if trainer.n_steps % self.every == 0:
            tasks = self.m.tasks["val"]
            answers = ask_tasks(getattr(trainer.model, "policy", trainer.model), self.m.tokenizer, tasks, max_new_tokens=NEW, sampling=Sampling(1.0))
            self.rows.append({"step": trainer.n_steps, "accuracy": sum(grade(t, a)["right"] for t, a in zip(tasks, answers)) / len(tasks)})
            trainer.model.train()


def one_arm(m: Material, method: str, lr: float, seed: int, updates: int, split: str = "test", **change) -> dict:
    "Train with one method on `updates` x 64 answers, and measure."
    start, policy, score = time.perf_counter(), copy.deepcopy(m.sft), verified_scorer(m.tasks["train"], m.tokenizer)
    prompts, ppo = task_prompts(m.tasks["train"], m.tokenizer), method == "ppo"
    config = TrainConfig(updates * 2, batch_size=32 if not ppo else 64, lr=lr, weight_decay=0.0, warmup=0.05, seed=seed, log_every=1)      # two steps a rollout in both
    watch = Accuracy(m, max(2, updates // 3))
    if ppo:
        seed_all(seed, 7)
        c = PPOConfig(**{"rollouts": 64, "epochs": 2, "max_new_tokens": NEW, "missing_end_penalty": 0.0} | change)
        trainer, rollouts = train_ppo(policy, RewardModel(copy.deepcopy(m.sft)), prompts, m.tokenizer, config, c, callbacks=[watch], score=score)
    else:
        trainer, rollouts = train_grpo(policy, prompts, m.tokenizer, config, GRPOConfig(**{"prompts": 8, "group": 8, "max_new_tokens": NEW} | METHODS[method] | change), score, callbacks=[watch])
    keys = ("step", "score", "kl", "length", "ended", "entropy", "reward_std", "frac_reward_zero_std", "groups/all_right", "groups/all_wrong", "seconds/rollout")
    asked = [[{"role": "user", "content": t["prompt"]}] for t in m.tasks[split][::4]]
    return {"method": method, "lr": lr, "seed": seed, "answers": updates * 64, "change": change, "accuracy": m.accuracy(policy, split), "val": watch.rows,
            "kl": sequence_kl(policy, m.sft, m.tokenizer, asked, NEW), "curve": [{k: r[k] for k in keys if k in r} for r in rollouts.stats[::max(1, updates // 30)]],
            "seconds": time.perf_counter() - start, "seconds_rollout": sum(r["seconds/rollout"] for r in rollouts.stats) / len(rollouts.stats),
            "seconds_update": sum(r.get("seconds/update", 0) for r in trainer.history) / updates}


if __name__ == "__main__":
    args = arguments(__doc__, run="runs/laptop", cache="runs/grpo-cache", updates=25, seeds=3, methods="grpo,ppo", rates="1e-4,3e-4", more="rloo,dr_grpo,reinforce++", new=1000)
    torch.set_num_threads(1)
    cache, rates = Path(args.cache), [float(r) for r in args.rates.split(",")]
    cache.mkdir(parents=True, exist_ok=True)
    m = Material(Path(args.run))

    def once(name: str, work) -> dict:
        "One arm from the cache, or measured now: at most `--new` of them, then the program ends."
        args.new -= not file_of(cache, name).exists()
        if args.new < 0:
            raise SystemExit("more arms are left")
        return cached(cache, name, work)

    before = once("sft", lambda: {split: m.accuracy(m.sft, split) for split in ("val", "test")})
    show = lambda r: {f"{how} {k}": v["value"] for how in ("greedy", "sampled") for k, v in r[how].items()}
    print("sft", show(before["test"]), flush=True)
    chosen, arms = {}, []
    for method in args.methods.split(","):
        tried = {lr: once(f"choose {method} {lr:g}", lambda: one_arm(m, method, lr, 100, args.updates, "val")) for lr in rates}
        chosen[method] = max(tried, key=lambda lr: tried[lr]["accuracy"]["sampled"]["both"]["value"])
        print(method, {lr: show(r["accuracy"]) for lr, r in tried.items()}, flush=True)
    for method in (args.methods + "," * bool(args.more) + args.more).split(","):
        lr = chosen.get(method, chosen["grpo"])      # the others take what was chosen for GRPO, and one seed
        for seed in range(args.seeds if method in chosen else 1):
            r = once(f"{method} {lr:g} seed {seed}", lambda: one_arm(m, method, lr, seed, args.updates))
            print(method, lr, seed, show(r["accuracy"]), "kl", r["kl"]["value"], r["seconds"], flush=True)
            arms.append(r)
    if args.save:
        tried = {method: {f"{lr:g}": cached(cache, f"choose {method} {lr:g}", None)["accuracy"]["sampled"]["both"]["value"] for lr in rates} for method in chosen}
        save("grpo", "Exact-match accuracy on recall and form tasks of the village after training with a verified reward: GRPO, its kin and PPO with the same number of answers",
             {"run": origin(Path(args.run)), "kinds": KINDS, "tasks": {k: len(v) for k, v in m.tasks.items()}, "sft": before, "chosen_on_val": tried, "arms": rounded(arms)}, ("torch", "tokenizers"))
