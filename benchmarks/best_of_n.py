"""Best-of-n from the fine-tuned model of a run, n = 1 to 64, against the run's own reward model, the same with the fine-tuned model's log-probability of
the answer added, a reward model of 250 pairs, and one whose annotators often just took the longer answer. Gold reward, proxy reward, KL and win rate on the same tasks, with the same settings, as the run's evaluation.

The small reward models come from benchmarks/reward.py's recipe. What an arm gave is kept in runs/reward-cache. One thread, float32."""
import json
from pathlib import Path

import torch
from record import arguments, save
from reward import CACHE, Lab, about_run, by_majority, prefer_longer, remembered, sample, steps_for

from llm_course.bestofn import answer_pool, best_of_n, best_of_n_kl, pool_logps, pool_rewards
from llm_course.evaluate import ask_tasks, gold_rewards
from llm_course.intervals import mean_interval, paired_difference
from llm_course.generate import Sampling
from llm_course.reward import RewardModel, likelihood_weight, pair_examples, train_reward
from llm_course.trainer import TrainConfig, seed_all
from llm_course.votes import filter_pairs
from llm_course.world import grade, preference_rows, sample_tasks

NS = (1, 2, 4, 8, 16, 32, 64)
LR, BATCH = 5e-4, 16


def judges(lab: Lab) -> dict:
    "The reward models, trained where they are not the run's own; kept as folders."
    def trained(name: str, pairs: list[dict]) -> RewardModel:
        folder = CACHE / f"{lab.run.name}-judge-{name}"
        if not (folder / "config.json").exists():
            seed_all(0, 7)
            model = RewardModel(lab.body())
            steps = steps_for(len(pairs))
            train_reward(model, pair_examples(pairs, lab.tokenizer, model.config.max_seq_len)[0], TrainConfig(steps=steps, batch_size=BATCH, lr=LR, weight_decay=0.01, log_every=steps), lab.tokenizer)
            model.save(folder, lab.tokenizer)
        return RewardModel.load(folder)

    return {"all pairs": lambda: RewardModel.load(lab.run / "reward"), "250 pairs": lambda: trained("250", by_majority(sample(lab.rows, 250, 0))),
            "1,000 pairs, length-biased": lambda: trained("long", prefer_longer(sample(lab.rows, 1000, 0), 0.5, 0))}


def pools(lab: Lab, tasks: list[dict], n: int, max_new_tokens: int, number: int) -> dict:
    "For each task n answers of the fine-tuned model: ids, gold rewards, lengths in words, log-probabilities."
    model, tok, prompts = lab.body().eval(), lab.tokenizer, [[{"role": "user", "content": t["prompt"]}] for t in tasks]
    pool = answer_pool(model, tok, prompts, n, max_new_tokens, seed=lab.seed + 100 + number)
    texts = [[tok.answer(a) for a in answers] for answers in pool]
    graded = [[grade(t, a) for a in answers] for t, answers in zip(tasks, texts)]
    return {"ids": pool, "gold": [gold_rewards([t] * n, answers) for t, answers in zip(tasks, texts)], "words": [[len(a.split()) for a in answers] for answers in texts],
            "right": [[float(g["contains"]) for g in row] for row in graded], "polite": [[float(g["polite"] > 0) for g in row] for row in graded],
            "logps": pool_logps(model, tok, prompts, pool, max_new_tokens).tolist(), "distinct": [len(set(map(tuple, a))) for a in pool]}


def in_parts(lab: Lab, tasks: list[dict], n: int, max_new_tokens: int, size: int = 50) -> dict:
    "The pools of all tasks, made and judged some tasks at a time."
    made: dict = {}
    for i in range(0, len(tasks), size):
        part, key = tasks[i:i + size], f"{lab.run.name}-pool-{len(tasks)}-{n}-{i}"
        found = remembered(key, lambda: pools(lab, part, n, max_new_tokens, i))
        for j, (name, judge) in enumerate(judges(lab).items()):
            prompts = [[{"role": "user", "content": t["prompt"]}] for t in part]
            found |= remembered(f"{key}-judge{j}", lambda: {f"proxy: {name}": pool_rewards(judge(), lab.tokenizer, prompts, found["ids"], max_new_tokens).tolist()})
        for k, v in found.items():
            if isinstance(v, list):
                made[k] = made.get(k, []) + v
    return made


def likelihood_share(lab: Lab) -> float:
    "The a in r + a log p(answer), by the choices of val people's pairs on which four of five annotators agree; none of them was trained on."
    held_out, _ = filter_pairs(preference_rows(lab.village, 300, "val", lab.seed))
    return likelihood_weight(RewardModel.load(lab.run / "reward"), lab.body(), held_out, lab.tokenizer)


def frontier(made: dict, proxy: torch.Tensor, sft_gold: list[float]) -> list[dict]:
    "One row a number of answers."
    part = {k: torch.tensor(made[k], dtype=torch.float64) for k in ("gold", "words", "right", "polite", "logps")}
    wins = (part["gold"] > torch.tensor(sft_gold, dtype=torch.float64)[:, None]).double() + 0.5 * (part["gold"] == torch.tensor(sft_gold, dtype=torch.float64)[:, None])
    scaled, out = (proxy - proxy.mean()) / proxy.std(), []
    for n in (n for n in NS if n <= proxy.shape[1]):
        of = lambda values: mean_interval(best_of_n(proxy, values, n).tolist())
        row = {"n": n, "kl": of(best_of_n_kl(n, part["logps"].exp())), "kl_formula": best_of_n_kl(n).item(), "gold": of(part["gold"]), "proxy": of(proxy), "proxy_in_sd": of(scaled),
               "win_rate": of(wins)}
        out.append(row | {k: of(part[k])["value"] for k in ("words", "right", "polite")})
    return out


def main() -> None:
    args = arguments(__doc__, run="runs/laptop", pool=64, tasks=400)
    torch.set_num_threads(1)
    lab = Lab(Path(args.run), 10)
    settings = json.loads((lab.run / "config.json").read_text(encoding="utf-8"))["settings"]
    new = settings["eval"]["max_new_tokens"]
    tasks = sample_tasks(lab.village, "test", args.tasks, lab.seed + 2)
    sft = remembered(f"{lab.run.name}-sft-gold-{args.tasks}", lambda: {"gold": gold_rewards(tasks, ask_tasks(lab.body(), lab.tokenizer, tasks, max_new_tokens=new, sampling=Sampling(1.0), seed=lab.seed))})["gold"]
    made = in_parts(lab, tasks, args.pool, new)
    a = remembered(f"{lab.run.name}-likelihood-weight", lambda: {"weight": likelihood_share(lab)})["weight"]
    made["proxy: all pairs, and likelihood"] = (torch.tensor(made["proxy: all pairs"], dtype=torch.float64) + a * torch.tensor(made["logps"], dtype=torch.float64)).tolist()
    figures = {"likelihood_weight": a, "run": about_run(lab.run), "tasks": args.tasks, "pool": args.pool, "max_new_tokens": new, "sft": {"gold": mean_interval(sft)},
               "distinct_answers": sum(made["distinct"]) / len(tasks), "frontiers": {}}
    for key in [k for k in made if k.startswith("proxy: ")]:
        rows = figures["frontiers"][key.removeprefix("proxy: ")] = frontier(made, torch.tensor(made[key], dtype=torch.float64), sft)
        for r in rows:
            print(key, {k: round(v["value"] if isinstance(v, dict) else v, 3) for k, v in r.items()}, flush=True)
    gold, usual = (torch.tensor(made[k], dtype=torch.float64) for k in ("gold", "proxy: all pairs"))
    for name, rows in figures["frontiers"].items():
        proxy = torch.tensor(made[f"proxy: {name}"], dtype=torch.float64)
        for r in rows:                        # on the same tasks, so the difference is known better than each of the two
            r["gold_minus_all_pairs"] = paired_difference(best_of_n(proxy, gold, r["n"]).tolist(), best_of_n(usual, gold, r["n"]).tolist())
    figures["frontier"] = figures["frontiers"]["all pairs"]
    figures["best_possible"] = [{"n": n, "gold": mean_interval(best_of_n(gold, gold, n).tolist())} for n in NS if n <= args.pool]
    if args.save:
        save("best_of_n", __doc__.replace("\n", " "), figures)


if __name__ == "__main__":
    main()
