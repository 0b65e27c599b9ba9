"""What a reward model learns from pairs, on the fine-tuned model of a run: number of pairs, noise in the votes, length bias, content against style,
and real pairs of three public sets with a tiny model.

Settings are chosen on pairs about val people, figures are of 1,000 pairs about test people, in the order of the gold reward. What an arm gave
is kept in runs/reward-cache, so that a stopped program goes on. One thread, float32."""
import json
import random
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from record import ROOT, arguments, command_of, save, testdata

from llm_course.intervals import mean_interval, rate
from llm_course.formats import convert
from llm_course.hub import load_model
from llm_course.model import ModelConfig, Transformer
from llm_course.reading import read_rows
from llm_course.reward import (RewardModel, as_gold, bradley_terry_loss, calibration, pair_calibration_error, fit_choices, length_slope, pair_examples, pair_rewards,
                               reward_batch, rewards_of, train_reward)
from llm_course.tokenizer import Tokenizer, train_tokenizer
from llm_course.trainer import TrainConfig, Trainer, seed_all
from llm_course.votes import filter_pairs, longest_answer_baseline, vote_margin
from llm_course.world import make_village, preference_rows

CACHE = ROOT / "runs" / "reward-cache"
LR, BATCH = 5e-4, 16


def remembered(name: str, make) -> dict:
    "The result of an arm from the cache, or made and kept there."
    path = CACHE / f"{name}.json"
    if not path.exists():
        start = time.process_time()
        result = make()
        result["cpu_seconds"] = round(time.process_time() - start, 1)
        CACHE.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result), encoding="utf-8")
        print(f"{name}: {result['cpu_seconds']} s", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


class Lab:
    "The fine-tuned model of a run, its village, and the pairs on which reward models are judged."

    def __init__(self, run: Path, n_test: int):
        settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]
        self.run, self.seed, self.people = run, settings["seed"], settings["data"]["people"]
        self.village, self.tokenizer = make_village(self.seed, self.people), Tokenizer.load(run / "tokenizer")
        self.rows = preference_rows(self.village, settings["data"]["pairs"], seed=self.seed)
        self.val, self.test = (as_gold(preference_rows(self.village, n_test, split, self.seed)) for split in ("val", "test"))

    def body(self) -> Transformer:
        return load_model(self.run / "sft")

    def arm(self, name: str, pairs: list[dict], steps: int, seed: int = 0, fit=None, val: bool = False) -> dict:
        "Rewards on test pairs, if asked for on val pairs too, of a reward model that is trained on `pairs`."
        def make() -> dict:
            seed_all(seed, 7)
            model = RewardModel(self.body())
            examples, _ = pair_examples(pairs, self.tokenizer, model.config.max_seq_len)
            config = TrainConfig(steps=steps, batch_size=BATCH, lr=LR, weight_decay=0.01, seed=seed, log_every=steps)
            (fit or train_reward)(model, examples, config, self.tokenizer)
            return {s: [[round(r, 5) for r in row] for row in pair_rewards(model, getattr(self, s), self.tokenizer).tolist()] for s in (("val", "test") if val else ("test",))}
        return remembered(f"{self.run.name}-{name}", make)

    def curve(self, n: int, seed: int) -> dict:
        "The plain recipe on `n` pairs, each labelled by the majority."
        return self.arm(f"curve-{n}-{seed}", by_majority(sample(self.rows, n, seed)), steps_for(n), seed)

    def stage(self) -> dict:
        "The reward model that the run's own stage made of all pairs."
        model = lambda: RewardModel.load(self.run / "reward")
        return remembered(f"{self.run.name}-stage", lambda: {s: [[round(r, 5) for r in row] for row in pair_rewards(model(), getattr(self, s), self.tokenizer).tolist()] for s in ("val", "test")})

    def scores(self, result: dict, split: str = "test") -> dict:
        "Accuracy by what a pair's answers differ in, and calibration, of one arm."
        gaps = self.gaps(result, split)
        return accuracies(getattr(self, split), gaps > 0) | {"ece": pair_calibration_error(calibration(gaps))}

    def gaps(self, result: dict, split: str = "test") -> torch.Tensor:
        r = torch.tensor(result[split], dtype=torch.float64)
        return r[:, 0] - r[:, 1]

    def noisy_error(self, result: dict, share: float, draws: int = 20) -> float:
        "The calibration error against labels of which a share is turned round: mean of some draws."
        gaps, draw = self.gaps(result), torch.Generator().manual_seed(0)
        turned = [torch.where(torch.rand(len(gaps), generator=draw) < share, -gaps, gaps) for _ in range(draws)]
        return sum(pair_calibration_error(calibration(g)) for g in turned) / draws


def about_run(run: Path) -> dict:
    "On which model was it measured?"
    config, metrics = (json.loads((run / f).read_text(encoding="utf-8")) for f in ("config.json", "base/metrics.json"))
    s = config["settings"]
    return {"command": command_of(run), "pretraining_tokens": s["pretrain"]["tokens"], "pretrain_val_loss": metrics["pretrain"]["val_loss"], "model": s["model"], "pairs": s["data"]["pairs"]}


def accuracies(pairs: list[dict], right) -> dict:
    by = {d: [bool(x) for x, p in zip(right, pairs) if d in ("all", p["differs"])] for d in ("all", "style", "content")}
    return {d: rate(sum(x), len(x)) for d, x in by.items()}


def pooled(runs: list[dict], key: str = "all") -> dict:
    "Mean over seeds with the interval for one test set, for the seeds share it, and each seed's value."
    n = runs[0][key]["n"]
    return rate(round(sum(r[key]["value"] for r in runs) / len(runs) * n), n) | {"by_seed": [round(r[key]["value"], 4) for r in runs]}


def many(runs: list[dict]) -> dict:
    return {k: pooled(runs, k) for k in ("all", "style", "content")} | {"ece": round(sum(r["ece"] for r in runs) / len(runs), 4), "seeds": len(runs)}


def sample(rows: list[dict], n: int, seed: int) -> list[dict]:
    return random.Random(f"reward-{seed}").sample(rows, n) if n < len(rows) else list(rows)


def steps_for(n: int) -> int:
    return max(48, round(n / BATCH))


def by_majority(rows: list[dict], least: float = 0.5) -> list[dict]:
    return filter_pairs(rows, least)[0]


def learning_curve(lab: Lab) -> list[dict]:
    "Accuracy by the number of pairs, majority labels; one pass, but at least 48 steps."
    out = []
    for n, seeds in ((250, 2), (500, 1), (1000, 1), (2000, 1)):
        if n > len(lab.rows):
            break
        out.append({"pairs": n, "steps": steps_for(n)} | many([lab.scores(lab.curve(n, s)) for s in range(seeds)]))
    return out + [{"pairs": len(lab.rows), "steps": None} | many([lab.scores(lab.stage())])]


def with_margin(rows: list[dict], scale: float) -> list[dict]:
    return [p | {"margin": scale * vote_margin(p["votes"])} for p in by_majority(rows)]


def flipped(rows: list[dict], share: float, seed: int) -> list[dict]:
    "Pairs in their true order, a share of them turned round."
    draw, out = random.Random(f"flip-{seed}"), []
    for p in as_gold(rows):
        out.append(p | {"chosen": p["rejected"], "rejected": p["chosen"]} if draw.random() < share else p)
    return out


VOTES = {"first annotator of five (the best)": lambda rows: [p if p["votes"][0] else p | {"chosen": p["rejected"], "rejected": p["chosen"]} for p in rows],
         "last annotator of five (the worst)": lambda rows: [p if p["votes"][4] else p | {"chosen": p["rejected"], "rejected": p["chosen"]} for p in rows],
         "majority": by_majority, "4 of 5 agree": partial(by_majority, least=0.8), "all agree": partial(by_majority, least=1.0),
         "majority, margin by agreement": partial(with_margin, scale=1.0), "true order": as_gold}


def labels_right(pairs: list[dict], rows: list[dict]) -> float:
    "Share of pairs whose chosen answer is the better one by the gold reward."
    better = {(p["prompt"][0]["content"], g["chosen"][0]["content"], g["rejected"][0]["content"]) for p, g in zip(rows, as_gold(rows))}
    return sum((p["prompt"][0]["content"], p["chosen"][0]["content"], p["rejected"][0]["content"]) in better for p in pairs) / len(pairs)


def votes_and_noise(lab: Lab, n: int = 1000, seeds: int = 1) -> dict:
    "The same pairs with labels of several kinds; and with a share of labels turned round."
    votes, noise, n = {}, [], min(n, len(lab.rows))
    parts = [sample(lab.rows, n, s) for s in range(seeds)]
    for i, (name, label) in enumerate(VOTES.items()):
        kept = [label(rows) for rows in parts]
        runs = [lab.scores(lab.curve(n, s) if name == "majority" else lab.arm(f"votes-{i}-{s}", kept[s], steps_for(n), s)) for s in range(seeds)]
        votes[name] = {"pairs": sum(map(len, kept)) / seeds, "labels_right": sum(map(labels_right, kept, parts)) / seeds} | many(runs)
    for share in (0.2, 0.4):
        result = lab.arm(f"noise-{share}-0", flipped(parts[0], share, 0), steps_for(n), 0)
        noise.append({"share": share} | many([lab.scores(result)]) | {"ece_noisy": lab.noisy_error(result, share)})
    return {"votes": votes, "noise": [{"share": 0.0} | {k: v for k, v in votes["true order"].items() if k not in ("pairs", "labels_right")}] + noise, "pairs": n}


def words(pairs: list[dict]) -> torch.Tensor:
    "Words of the chosen and the rejected answers, `[N, 2]`."
    return torch.tensor([[len(p[s][0]["content"].split()) for s in ("chosen", "rejected")] for p in pairs], dtype=torch.float64)


def prefer_longer(rows: list[dict], share: float, seed: int) -> list[dict]:
    "Pairs in their true order, but in a share of them the annotator looks at nothing but the length."
    draw, out = random.Random(f"long-{seed}"), []
    for p, (a, b) in zip(as_gold(rows), words(as_gold(rows)).tolist()):
        out.append(p | {"chosen": p["rejected"], "rejected": p["chosen"]} if draw.random() < share and a < b else p)
    return out


def balanced(pairs: list[dict], seed: int, width: int = 3) -> list[dict]:
    "As many pairs in which the longer answer was chosen as in which the shorter was, for each size of the difference (in steps of `width` words)."
    groups: dict[tuple, list[dict]] = {}
    for p, (a, b) in zip(pairs, words(pairs).tolist()):
        groups.setdefault((min(4, int(abs(a - b) + width - 1) // width), a > b), []).append(p)
    draw, out = random.Random(seed), []
    for size in {g for g, _ in groups}:
        longer, shorter = groups.get((size, True), []), groups.get((size, False), [])
        keep = min(len(longer), len(shorter)) if size else max(len(longer), len(shorter))
        out += draw.sample(longer, min(keep, len(longer))) + draw.sample(shorter, min(keep, len(shorter)))
    return out


def length_figures(lab: Lab, rewards: torch.Tensor) -> dict:
    "Accuracy where the longer and where the shorter answer is the better one, and what a word is worth in gold points."
    n, gold = words(lab.test), torch.tensor([[p["gold"]["chosen"], p["gold"]["rejected"]] for p in lab.test], dtype=torch.float64)
    right, longer = rewards[:, 0] > rewards[:, 1], n[:, 0] > n[:, 1]
    shorter = n[:, 0] < n[:, 1]
    share = lambda where: rate(int(right[where].sum()), int(where.sum()))
    return {"all": share(longer | ~longer), "longer_is_better": share(longer), "shorter_is_better": share(shorter), "gold_points_per_word": length_slope(rewards, n, gold)}


def length_bias(lab: Lab, n: int = 1000, share: float = 0.5, seeds: int = 1, trusted: int = 200) -> dict:
    "Labels of annotators who in half of the pairs just take the longer answer; and two ways out."
    arms: dict[str, list] = {}
    figures: dict = {"pairs": min(n, len(lab.rows)), "share": share, "trusted": trusted, "seeds": seeds}
    for s in range(seeds):
        rows = sample(lab.rows, n, s)
        biased = prefer_longer(rows, share, s)
        even = balanced(biased, s)
        figures.setdefault("labels", []).append({"right": labels_right(biased, rows), "longer_chosen": longest_answer_baseline(biased), "kept_by_balancing": len(even),
                                                 "right_after_balancing": labels_right(even, rows)})
        clean, raw, flat = (lab.arm(f"{name}-{s}", pairs, steps_for(n), s, val=name == "length-biased") for name, pairs in ((f"votes-{list(VOTES).index('true order')}", as_gold(rows)), ("length-biased", biased), ("length-balanced", even)))
        val, test = (torch.tensor(raw[k], dtype=torch.float64) for k in ("val", "test"))
        some = random.Random(s).sample(range(len(lab.val)), min(trusted, len(lab.val)))
        nv, nt = words([lab.val[i] for i in some]), words(lab.test)
        w = fit_choices(torch.stack([val[some, 0] - val[some, 1], nv[:, 0] - nv[:, 1]], 1))
        judged = {"true labels": torch.tensor(clean["test"], dtype=torch.float64), "labels with the bias": test, "the same, balanced": torch.tensor(flat["test"], dtype=torch.float64),
                  "the same, length taken off": w[0] * test + w[1] * nt}
        for name, rewards in judged.items():
            arms.setdefault(name, []).append(length_figures(lab, rewards))
    for name, runs in arms.items():
        figures[name] = {k: pooled(runs, k) for k in ("all", "longer_is_better", "shorter_is_better")} | {"gold_points_per_word": mean_interval([r["gold_points_per_word"] for r in runs])["value"]}
    return figures


def regularised(weight: float):
    "Training with the next-token loss on the chosen answer beside the reward's (Yang et al., 2024)."
    def loss_fn(model, batch):
        h = model.body.hidden(batch["input_ids"])
        last = batch["attention_mask"].sum(1) - 1
        chosen, rejected = model.score(h[torch.arange(len(h)), last])[:, 0].chunk(2)
        half = len(chosen)
        targets = F.pad(batch["labels"][:half, 1:], (0, 1), value=-100)
        language = F.cross_entropy(model.body.head(h[:half][targets != -100]), targets[targets != -100])
        return (bradley_terry_loss(chosen, rejected, centering=0.01).mean() + weight * language) * half, half, {}

    return lambda model, examples, config, tokenizer: Trainer(model, loss_fn, examples, config, partial(reward_batch, pad_id=tokenizer.pad_id)).fit()


class MeanReward(RewardModel):
    "Reads the reward off the mean of all hidden states in place of the last one."

    def forward(self, input_ids, attention_mask):
        m = attention_mask[..., None].float()
        return self.score((self.body.hidden(input_ids) * m).sum(1) / m.sum(1))[:, 0]


def as_mean(model, examples, config, tokenizer):
    model.__class__ = MeanReward
    train_reward(model, examples, config, tokenizer)


def frozen_embedding(model, examples, config, tokenizer):
    model.body.embed_tokens.requires_grad_(False)
    train_reward(model, examples, config, tokenizer)


@torch.no_grad()
def likelihoods(lab: Lab) -> dict:
    """Log-probabilities of the answers under the fine-tuned model, `[N, 2, 4]` by split: sum, mean, lowest token, and how far below the
    model's favourite the worst token lies."""
    model, tok = lab.body().eval(), lab.tokenizer
    out = {}
    for split in ("val", "test"):
        rows = []
        for p in getattr(lab, split):
            for side in ("chosen", "rejected"):
                start = len(tok.chat(p["prompt"], add_generation_prompt=True)[0])
                ids = torch.tensor([tok.chat([*p["prompt"], *p[side]])[0]])
                every = model(ids)[0, start - 1:-1].float().log_softmax(-1)
                logps = every.gather(-1, ids[0, start:, None])[:, 0]
                rows.append([x.item() for x in (logps.sum(), logps.mean(), logps.min(), (logps - every.max(-1).values).min())])
        out[split] = torch.tensor(rows).view(-1, 2, 4).tolist()
    return out


def together(lab: Lab, result: dict, features: dict, which: int) -> dict:
    "Reward plus a times a log-probability, a fitted on the val people's pairs."
    gaps = {}
    for s in ("val", "test"):
        r, f = torch.tensor(result[s], dtype=torch.float64), torch.tensor(features[s], dtype=torch.float64)[..., which]
        gaps[s] = torch.stack([r[:, 0] - r[:, 1], f[:, 0] - f[:, 1]], 1)
    w = fit_choices(gaps["val"])
    both = gaps["test"] @ w
    return accuracies(lab.test, both > 0) | {"ece": pair_calibration_error(calibration(both)), "weights": [round(x, 4) for x in w.tolist()]}


def content(lab: Lab, n: int = 1000) -> dict:
    "What was tried to make reward models see which content is right."
    n = min(n, len(lab.rows))
    pairs, steps, plain = by_majority(sample(lab.rows, n, 0)), steps_for(n), lab.curve(n, 0)
    arms = {"plain recipe": plain, "mean over the tokens": lab.arm("content-mean", pairs, steps, 0, as_mean),
            "language loss on the chosen, weight 0.3": lab.arm("content-grm0.3", pairs, steps, 0, regularised(0.3)),
            "embedding frozen, two passes": lab.arm("content-frozen", pairs, 2 * steps, 0, frozen_embedding)}
    figures = {name: lab.scores(result) for name, result in arms.items()}
    features = remembered(f"{lab.run.name}-likelihoods", lambda: likelihoods(lab))
    alone, both = {}, {}
    for i, name in enumerate(("sum", "mean", "lowest token", "furthest below the favourite")):
        f = torch.tensor(features["test"])[..., i]
        alone[name] = accuracies(lab.test, f[:, 0] > f[:, 1])
        both[name] = {"stage": together(lab, lab.stage(), features, i)}
    return {"pairs": n, "arms": figures, "likelihood_alone": alone, "reward_and_likelihood": both}


def whole(lab: Lab) -> dict:
    "The stage's reward model: accuracy, calibration before and after a temperature that is fitted on val people's pairs."
    val, test = (torch.tensor(lab.stage()[k], dtype=torch.float64) for k in ("val", "test"))
    gaps, t = test[:, 0] - test[:, 1], 1 / fit_choices(val[:, :1] - val[:, 1:])[0].item()
    nll = lambda g: F.softplus(-g).mean().item()
    return lab.scores(lab.stage()) | {"temperature": t, "bins": calibration(gaps), "bins_scaled": calibration(gaps / t), "ece_scaled": pair_calibration_error(calibration(gaps / t)), "loss": nll(gaps),
                                      "loss_scaled": nll(gaps / t), "mean_reward": test.mean().item(), "longest_answer": longest_answer_baseline(lab.test), "n": len(lab.test)}


REAL = {"hh-rlhf harmless, test": "hh_harmless-base_test.jsonl.gz", "instructions, polite or not": "rasbt_instruction-data-with-preference.json", "dpo_en_demo": "dpo_en_demo.json"}


def word_weights(pairs: list[dict], known: dict[str, int]) -> torch.Tensor:
    "How often each known word stands in the chosen answer more than in the rejected one, `[N, K]`."
    x = torch.zeros(len(pairs), len(known))
    for row, p in zip(x, pairs):
        for side, sign in (("chosen", 1.0), ("rejected", -1.0)):
            for word in set(p[side][-1]["content"].lower().split()):
                if word in known:
                    row[known[word]] += sign
    return x


def counted_words(train: list[dict], test: list[dict], n_words: int = 300) -> list[bool]:
    "A reward that only looks which of the most frequent words stand in an answer: what a model has to beat."
    counts = Counter(w for p in train for s in ("chosen", "rejected") for w in set(p[s][-1]["content"].lower().split()))
    known = {w: i for i, (w, _) in enumerate(counts.most_common(n_words))}
    w = fit_choices(word_weights(train, known), ridge=10.0)
    return (word_weights(test, known).double() @ w > 0).tolist()


def tiny_reward(train: list[dict], test: list[dict], seed: int, max_len: int = 384) -> list[bool]:
    "A reward model of two layers from scratch on the pairs: which test pairs does it order right? Long conversations keep their end."
    tok = train_tokenizer([m["content"] for p in train for m in (*p["prompt"], *p["chosen"], *p["rejected"])], 2048)
    seed_all(seed)
    model = RewardModel(Transformer(ModelConfig(len(tok), dim=64, n_layers=2, n_heads=4, max_seq_len=max_len)))
    ids = lambda p, side: tok.chat([*p["prompt"], *p[side]])[0][-max_len:]
    examples = [{f"{s}_{k}": ids(p, s) for s in ("chosen", "rejected") for k in ("ids", "labels")} for p in train]
    train_reward(model, examples, TrainConfig(steps=max(60, 2 * len(train) // 16), batch_size=16, lr=1e-3, seed=seed, log_every=1000), tok)
    scores = torch.tensor(rewards_of(model, [ids(p, s) for p in test for s in ("chosen", "rejected")], tok.pad_id)).view(-1, 2)
    return (scores[:, 0] > scores[:, 1]).tolist()


def real(lab: Lab | None, seeds: int = 2) -> dict:
    "Accuracy on a held-out 30 % of public preference pairs: tiny models, counted words, the longer answer. No row is kept."
    out = {}
    for name, file in REAL.items():
        pairs = [p for p in convert(read_rows(testdata() / "pref" / file), "preference") if p["chosen"] != p["rejected"]]
        random.Random(0).shuffle(pairs)
        train, test = pairs[len(pairs) * 3 // 10:], pairs[:len(pairs) * 3 // 10]
        made = [remembered(f"real-{file}-{s}", lambda: {"right": tiny_reward(train, test, s)})["right"] for s in range(seeds)]
        known = {p["prompt"][0]["content"] for p in train}                    # conversations that begin as one of the training part do not count
        new = [p["prompt"][0]["content"] not in known for p in test]
        kept, n = [p for p, fresh in zip(test, new) if fresh], sum(new)
        longer, words_only = longest_answer_baseline(kept), counted_words(train, kept)
        out[name] = {"train": len(train), "test": n, "longer": rate(longer * n, n), "shorter": rate((1 - longer) * n, n), "counted_words": rate(sum(words_only), n),
                     "model": [rate(sum(r for r, fresh in zip(right, new) if fresh), n) for right in made]}
    return out


def main() -> None:
    args = arguments(__doc__, run="runs/laptop", test=1000, parts="whole,content,curve,length,votes,real")
    torch.set_num_threads(1)
    lab, parts = Lab(Path(args.run), args.test), args.parts.split(",")
    make = {"whole": whole, "curve": learning_curve, "votes": votes_and_noise, "length": length_bias, "content": content, "real": real}
    figures = {}
    for part in parts:
        figures[part] = make[part](lab)
        print(part, json.dumps(figures[part])[:4000], flush=True)
    if args.save:
        save("reward", __doc__.replace("\n", " "), figures | {"run": about_run(Path(args.run))})


if __name__ == "__main__":
    main()
