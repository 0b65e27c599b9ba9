"""PPO on the world, from the SFT and the reward model of a run: seeds, strengths of the KL penalty, and rewards that invite to cheat.

Every arm starts from the same SFT and reward model and takes the pipeline's settings of that run, but for what its row says. While it trains,
answers to open tasks about validation people show what the world's gold reward makes of them (settings are chosen on these); at the end it is measured as in
`pipeline.run_eval`: 400 open tasks about test people, one sampled answer each, against the SFT model's answers to the same."""
import copy
import json
import time
from pathlib import Path

import torch
from record import arguments, command_of, rounded, save

from llm_course.evaluate import ask_tasks, gold_rewards, sequence_kl
from llm_course.intervals import mean_interval, win_rate
from llm_course.generate import Sampling
from llm_course.hub import load_model
from llm_course.pipeline import open_run, train_config
from llm_course.ppo import PPOConfig, reward_scorer, steps_each_round, train_ppo
from llm_course.reading import read_rows, write_json
from llm_course.reward import RewardModel, likelihood_scorer, likelihood_weight
from llm_course.tokenizer import Tokenizer
from llm_course.trainer import Callback
from llm_course.votes import filter_pairs
from llm_course.world import grade, make_village, preference_rows, sample_tasks, vocabulary

# name: settings of PPOConfig (and `updates`, `lr`), seed, judge. Most take ten rounds of answers: the curve of the first shows that little happens after.
SHORT = {"updates": 10}
ARMS = {**{f"β = 0.2, seed {s}": (SHORT, s, "reward model") for s in range(3)},
        **{f"{judge}, β = 0": (SHORT | {"kl_coef": 0.0, "lr": 3e-4}, 0, judge) for judge in ("thanks", "words")},
        **{f"β = {b:g}": (SHORT | {"kl_coef": b}, 0, "reward model") for b in (0.0, 0.8, 0.05)},
        **{f"with likelihood, seed {s}": (SHORT, s, "with likelihood") for s in range(3)},
        **{f"30 rounds, seed {s}": ({}, s, "reward model") for s in range(3)},
        "30 rounds, β = 0, lr 3e-4": ({"kl_coef": 0.0, "lr": 3e-4}, 0, "reward model"), "thanks, β = 0.2": (SHORT | {"lr": 3e-4}, 0, "thanks"),
        "adaptive": (SHORT | {"kl_target": 1.0, "kl_horizon": 640, "kl_coef": 0.05}, 0, "reward model"), "score after": (SHORT | {"score_at": "after"}, 0, "reward model")}


class Material:
    "What all arms share: the run's models, prompts and tasks."

    def __init__(self, folder: Path, cache: Path):
        self.run = open_run(folder)
        s = self.s = self.run.settings
        self.tokenizer, self.sft = Tokenizer.load(folder / "tokenizer"), load_model(folder / "sft")
        self.reward_model = RewardModel.load(folder / "reward")
        village = make_village(s["seed"], s["data"]["people"])
        self.village, c = village, s["ppo"]
        room = self.sft.config.max_seq_len - c["max_new_tokens"]
        prompts = (self.tokenizer.chat(p["prompt"], add_generation_prompt=True)[0] for _, p in read_rows(folder / "corpus" / "pairs.jsonl"))
        self.prompts = [p for p in prompts if len(p) <= room]
        self.open_tasks = {"val": sample_tasks(village, "val", 100, s["seed"] + 3), "test": sample_tasks(village, "test", s["eval"]["preference_tasks"], s["seed"] + 2)}
        self.sft_gold = cached(cache, "sft gold", lambda: {split: gold_rewards(tasks, self.answers(self.sft, tasks)) for split, tasks in self.open_tasks.items()})

    def answers(self, model, tasks) -> list[str]:
        return ask_tasks(model, self.tokenizer, tasks, max_new_tokens=self.s["eval"]["max_new_tokens"], sampling=Sampling(1.0), seed=self.s["seed"])

    def judge(self, kind: str):
        "The reward model, the same with the SFT model's log-probability of the answer added, or a flawed reward: number of polite phrases, number of words."
        if kind == "reward model":
            return reward_scorer(copy.deepcopy(self.reward_model), self.tokenizer.pad_id)
        if kind == "with likelihood":
            voted = filter_pairs(preference_rows(self.village, 300, "val", self.s["seed"]))[0]
            return likelihood_scorer(self.reward_model, self.sft, likelihood_weight(self.reward_model, self.sft, voted, self.tokenizer), self.tokenizer.pad_id)
        count = {"thanks": lambda text: float(sum(text.count(p) for p in vocabulary()["polite"])), "words": lambda text: len(text.split()) / 5}[kind]
        return lambda prompts, answers: [count(self.tokenizer.answer(a)) for a in answers]


class GoldCurve(Callback):
    "Every `every` steps the gold reward and the win rate on validation people."

    def __init__(self, m: Material, every: int):
        self.m, self.every, self.rows = m, every, []

    def after_step(self, trainer, record):
        if trainer.n_steps % self.every == 0:
            gold = gold_rewards(self.m.open_tasks["val"], self.m.answers(trainer.model.policy, self.m.open_tasks["val"]))
            self.rows.append({"step": trainer.n_steps, "gold": round(sum(gold) / len(gold), 4), "win_rate": win_rate(gold, self.m.sft_gold["val"])["value"]})
            trainer.model.train()


def measured(m: Material, policy) -> dict:
    "Gold reward, win rate, KL and length of a policy on the open tasks about test people."
    tasks = m.open_tasks["test"]
    answers = m.answers(policy, tasks)
    gold = gold_rewards(tasks, answers)
    prompts = [[{"role": "user", "content": t["prompt"]}] for t in tasks]
    lengths = [len(m.tokenizer.encode(a)) for a in answers]
    polite = [grade(t, a)["polite"] for t, a in zip(tasks, answers)]
    return {"gold": mean_interval(gold), "win_rate": win_rate(gold, m.sft_gold["test"]), "length": sum(lengths) / len(lengths), "distinct_answers": len(set(answers)),
            "kl": sequence_kl(policy, m.sft, m.tokenizer, prompts[:200], m.s["eval"]["max_new_tokens"], seed=m.s["seed"]), "polite_phrases": sum(polite) / len(polite),
            "samples": [{"prompt": t["prompt"], "answer": a[:160], "gold": g} for t, a, g in list(zip(tasks, answers, gold))[:6]]}


def one_arm(m: Material, change: dict, seed: int, judge: str) -> dict:
    "Train one arm and measure it."
    start, s = time.perf_counter(), copy.deepcopy(m.s)
    s["seed"], c = seed, s["ppo"] | change
    s["ppo"]["lr"] = c["lr"]
    settings = PPOConfig(**{k: v for k, v in c.items() if k in PPOConfig.__dataclass_fields__})
    config = train_config(s, "ppo", c["updates"] * steps_each_round(c["rollouts"], c["epochs"], c["batch_size"]))
    curve, policy = GoldCurve(m, max(4, config.steps // 6)), copy.deepcopy(m.sft)
    _, rollouts = train_ppo(policy, copy.deepcopy(m.reward_model), m.prompts, m.tokenizer, config, settings, None, [curve], m.judge(judge))
    keys = ("step", "score", "kl", "length", "ended", "entropy", "explained_variance", "kl_coef", "seconds/rollout")
    thin = rollouts.stats[::max(1, len(rollouts.stats) // 30)]
    took = [r["seconds/update"] for r in _.history if "seconds/update" in r]
    return {"change": change, "seed": seed, "judge": judge, "kl_coef": c["kl_coef"], "updates": c["updates"], "answers": c["updates"] * c["rollouts"], "lr": c["lr"],
            **measured(m, policy), "val": curve.rows, "curve": [{k: r[k] for k in keys} for r in thin],
            "seconds": time.perf_counter() - start, "seconds_rollout": sum(r["seconds/rollout"] for r in rollouts.stats) / len(rollouts.stats), "seconds_update": sum(took) / len(took)}


def file_of(folder: Path, name: str) -> Path:
    "Where the result of an arm is kept."
    return folder / f"{''.join(c if c.isalnum() else '_' for c in name)}.json"


def cached(folder: Path, name: str, work) -> dict:
    "The result of `work()`, kept in a file: a stop loses one arm at most."
    path = file_of(folder, name)
    if not path.exists():
        write_json(path, rounded(work()))
    return json.loads(path.read_text(encoding="utf-8"))


def origin(folder: Path) -> dict:
    "On which model it was measured."
    config, base = (json.loads((folder / f).read_text(encoding="utf-8")) for f in ("config.json", "base/metrics.json"))
    return {"command": command_of(folder), "pretrain_tokens": base["pretrain"]["tokens"], "val_loss": round(base["pretrain"]["val_loss"], 4), "ppo": config["settings"]["ppo"]}


if __name__ == "__main__":
    args = arguments(__doc__, run="runs/laptop", arms="", cache="runs/ppo-cache", new=1000)
    torch.set_num_threads(1)
    chosen, cache, material = [a for a in args.arms.split(";") if a] or list(ARMS), Path(args.cache), None
    cache.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        args.new -= not file_of(cache, name).exists()
        if args.new < 0:
            break

        def work(name=name):
            global material
            material = material or Material(Path(args.run), cache)
            return one_arm(material, *ARMS[name])
        r = cached(cache, name, work)
        print(name, {k: r[k]["value"] if isinstance(r[k], dict) else r[k] for k in ("win_rate", "gold", "kl", "length", "polite_phrases", "seconds")}, "val", r["val"][-1], flush=True)
    if args.save:
        material = material or Material(Path(args.run), cache)
        arms = {name: cached(cache, name, None) for name in chosen if file_of(cache, name).exists()}
        frontier = [{k: a[k] for k in ("kl_coef", "seed", "updates", "kl", "gold", "win_rate", "length")} for n, a in arms.items()
                    if a["judge"] == "reward model" and a["change"].keys() <= {"kl_coef", "updates"}]
        gold = material.sft_gold["test"]
        greedy = gold_rewards(material.open_tasks["test"], ask_tasks(material.sft, material.tokenizer, material.open_tasks["test"], max_new_tokens=material.s["eval"]["max_new_tokens"]))
        sft = {"gold": mean_interval(gold), "greedy_win_rate": win_rate(greedy, gold), "best_possible_win_rate": win_rate([2.0] * len(gold), gold)}
        save("ppo", "PPO on the village from one SFT and one reward model: seeds, KL coefficients, flawed rewards; gold reward and win rate over SFT on 400 open tasks about test people",
             {"run": origin(Path(args.run)), "sft": rounded(sft), "frontier": frontier, "arms": arms}, ("torch", "tokenizers"))
