"""How far GPT-4 can be trusted to stand for people on MT-Bench: agreement, rankings, corrected win rates (3,355 human votes, 2,400 verdicts of GPT-4).

Agreement is counted as in FastChat's compute_agreement.py: each pair of votes (or vote and verdict) on the same question, turn and pair of
models is one comparison. FastChat's `human` are the experts; `people` here are experts and authors together. Intervals let whole questions count."""
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
from record import arguments, rounded, save, testdata

from llm_course.calibration import POINTS, agreement_by, confusion, corrected_rate, elo, judge_agreement, one_more_person, people_agreement, ppi_mean, rank_players, verdict_values
from llm_course.reading import UserError

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")      # ten questions each, 81 to 160
OTHER = {"first": "second", "second": "first", "tie": "tie"}


def read(path: Path) -> list[tuple[tuple, str, str]]:
    "Votes as (item, judge, outcome); an item is (question, turn, both models in alphabetical order), a contradiction of GPT-4 a tie."
    out = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        a, b, winner = row["model_a"], row["model_b"], {"model_a": "first", "model_b": "second"}.get(row["winner"], "tie")
        item = (int(row["question_id"]), int(row["turn"]), min(a, b), max(a, b))
        out.append((item, row["judge"], winner if a < b else OTHER[winner]))
    return out


def by_item(votes: list, who: tuple[str, ...]) -> dict[tuple, list[str]]:
    "The labels of each item that were given by judges whose names begin so."
    found = defaultdict(list)
    for item, judge, outcome in votes:
        if judge.startswith(who):
            found[item].append(outcome)
    return dict(found)


def with_people(gpt4: dict, people: dict, drop: tuple[str, ...] = ()) -> tuple[list, list, list]:
    "GPT-4's verdict, a vote, and the item of each comparison."
    both = [(gpt4[k], v, k) for k, votes in people.items() if k in gpt4 for v in votes if gpt4[k] not in drop and v not in drop]
    return tuple(map(list, zip(*both)))


def agreements(human: list, gpt4: dict, resamples: int) -> list[dict]:
    "Agreement of people with each other and with GPT-4, for each turn, with ties and without."
    out, groups = [], {"people": ("expert", "author"), "experts": ("expert",)}
    for turn in (1, 2):
        for name, who in groups.items():
            people = {k: v for k, v in by_item(human, who).items() if k[1] == turn}
            for ties in (True, False):
                drop = () if ties else ("tie",)
                mutual = people_agreement(list(people.values()), drop, resamples, groups=[k[0] for k in people], mirror=True)
                out.append({"who": f"{name} and {name}", "turn": turn, "ties": ties, "n": mutual["pairs"]} | {k: mutual[k] for k in ("raw", "kappa", "alpha", "by_chance")})
                verdicts, votes, items = with_people(gpt4, people, drop)
                found = judge_agreement(verdicts, votes, resamples, groups=[k[0] for k in items], mirror=True)
                out.append({"who": f"GPT-4 and {name}", "turn": turn, "ties": ties, "n": len(votes)} | {k: found[k] for k in ("raw", "kappa", "by_chance")})
    return out


def alphas(people: dict, gpt4: dict, resamples: int) -> dict:
    "Krippendorff's alpha of all labels: people, and people with GPT-4 as one more annotator."
    items = [k for k in people if k in gpt4 and len(people[k]) > 1]
    alpha = lambda votes: people_agreement(votes, resamples=resamples, groups=[k[0] for k in items], mirror=True)["alpha"]
    return {"people": alpha([people[k] for k in items]), "with_judge": alpha([[*people[k], gpt4[k]] for k in items]), "items": len(items)}


def rankings(gpt4: dict, people: dict, resamples: int) -> dict:
    "Bradley-Terry of both, on the same items."
    of_people = [(k, v) for k, votes in people.items() if k in gpt4 for v in votes]
    of_gpt4 = [(k, gpt4[k]) for k in people if k in gpt4]
    return {name: rank_players([(k[2], k[3], v) for k, v in votes], [k[0] for k, _ in votes], resamples=resamples) for name, votes in (("people", of_people), ("GPT-4", of_gpt4))}


def elo_orders(people: dict, k: float, orders: int) -> dict:
    "How far the order of people's votes moves Elo ratings."
    games, rng = [(item[2], item[3], v) for item, votes in people.items() for v in votes], random.Random(0)
    found = [elo(rng.sample(games, len(games)), k) for _ in range(orders)]
    spread = {p: (min(f[p] for f in found), max(f[p] for f in found)) for p in found[0]}
    player = max(spread, key=lambda p: spread[p][1] - spread[p][0])
    return {"k": k, "orders": orders, "rankings": len({tuple(sorted(f, key=f.get)) for f in found}), "example": {"player": player, "low": spread[player][0], "high": spread[player][1]}}


def win_points(model: str, people: dict, gpt4: dict) -> tuple[list, np.ndarray, list[np.ndarray]]:
    "Of the items of a model: the items, GPT-4's points for it, and people's points, one array an item."
    items = [k for k in people if k in gpt4 and model in k[2:]]
    points = lambda k, v: POINTS[v] if k[2] == model else 1 - POINTS[v]
    return items, np.array([points(k, gpt4[k]) for k in items]), [np.array([points(k, v) for v in people[k]]) for k in items]


def one_study(judge: np.ndarray, votes: list[np.ndarray], n: int, rng: np.random.Generator) -> dict:
    "n items drawn at random, one vote each; the judge's verdicts of the rest: `ppi_mean`, and people only as `ppi_mean` of a useless judge."
    at = rng.permutation(len(judge))
    few, rest = at[:n], at[n:]
    y = np.array([rng.choice(votes[i]) for i in few])
    return {"PPI++": ppi_mean(judge[rest], judge[few], y), "people only": ppi_mean(np.zeros(len(rest)), np.zeros(n), y)}


def corrected(models: list[str], people: dict, gpt4: dict, repeats: int) -> dict:
    "Win rates from n human votes: width and coverage over many draws, mean over the models; and what the judge alone says."
    about, widths = {}, {n: defaultdict(list) for n in (25, 50, 100, 200, 400)}
    for m in models:
        items, judge, votes = win_points(m, people, gpt4)
        truth, rng = float(np.mean([v.mean() for v in votes])), np.random.default_rng(0)
        alone, half = float(judge.mean()), float(1.959963984540054 * judge.std() / np.sqrt(len(judge)))
        about[m] = {"items": len(items), "truth": truth, "judge_only": {"value": alone, "low": alone - half, "high": alone + half},
                    "correlation": float(np.corrcoef(np.concatenate([np.full(len(v), j) for v, j in zip(votes, judge)]), np.concatenate(votes))[0, 1])}
        for n in widths:
            for _ in range(repeats):
                for name, r in one_study(judge, votes, n, rng).items():
                    sure = r["low"] is not None                      # all labels alike: no interval, which holds nothing
                    widths[n][name].append((r["high"] - r["low"] if sure else np.nan, sure and r["low"] <= truth <= r["high"]))
                    if name == "PPI++" and sure:
                        widths[n]["effective_n"].append(r["effective_n"] / n)
    held = float(np.mean([r["judge_only"]["low"] <= r["truth"] <= r["judge_only"]["high"] for r in about.values()]))
    rows = [{"n": n, "gain": float(np.median(w["effective_n"])), "judge only": {"coverage": held}} |
            {name: dict(zip(("width", "coverage"), np.nanmean(w[name], axis=0).tolist())) for name in ("people only", "PPI++")} for n, w in widths.items()]
    return {"models": about, "by_n": rows, "repeats": repeats}


def verdicts(people: dict, gpt4: dict) -> dict:
    "Confusion of GPT-4 and people, what a verdict is worth, and what both say where both decide."
    judge, votes, _ = with_people(gpt4, people)
    judge, votes = [*judge, *(OTHER[v] for v in judge)], [*votes, *(OTHER[v] for v in votes)]      # which answer is called first has no meaning
    table = confusion(judge, votes)
    values = verdict_values(judge, votes)
    return {"labels": table["labels"], "counts": [[x / 2 for x in row] for row in table["counts"]], "value": {k: {"value": v["value"], "n": v["n"] // 2} for k, v in values.items()}}


def decisive(people: dict, gpt4: dict) -> list[tuple[tuple, float, float]]:
    "Items with a verdict of GPT-4 and one vote, drawn once, neither of them a tie: item, verdict, vote, 1 for the first model."
    rng = random.Random(0)
    drawn = [(k, POINTS[gpt4[k]], POINTS[rng.choice(votes)]) for k, votes in sorted(people.items()) if k in gpt4]
    return [x for x in drawn if 0.5 not in x[1:]]


def transferred(people: dict, gpt4: dict, models: list[str], n: int, repeats: int) -> dict:
    "Mean absolute error of a model's win rate: the judge's own, and corrected by n labels of its own items, or of other models' items."
    items, out = decisive(people, gpt4), {}
    for m in models:
        own = np.array([(j, y) if k[2] == m else (1 - j, 1 - y) for k, j, y in items if m in k[2:]])
        other = np.array([(j, y) for k, j, y in items if m not in k[2:]])
        rng, truth, found, failed = np.random.default_rng(0), own[:, 1].mean(), defaultdict(list), 0
        for _ in range(repeats):
            at, elsewhere = rng.permutation(len(own)), other[rng.permutation(len(other))[:n]]
            few, rest = own[at[:n]], own[at[n:]]
            turned = np.abs(elsewhere - (rng.random(n) < 0.5)[:, None])      # either model may stand first
            try:
                found["Rogan-Gladen, other models' labels"].append(corrected_rate(own[:, 0], turned[:, 0], turned[:, 1])["value"])
                found["Rogan-Gladen, own labels"].append(corrected_rate(rest[:, 0], few[:, 0], few[:, 1])["value"])
            except UserError:
                failed += 1
            found["PPI++, own labels"].append(ppi_mean(rest[:, 0], few[:, 0], few[:, 1])["value"])
            found["people only"].append(few[:, 1].mean())
        errs = {"sensitivity": float(own[own[:, 1] == 1, 0].mean()), "specificity": float(1 - own[own[:, 1] == 0, 0].mean())}
        out[m] = {"items": len(own), "people": float(truth), "judge": float(own[:, 0].mean()), **errs, "failed": failed,
                  "mean": {k: float(np.mean(v)) for k, v in found.items()}, "error": {k: float(np.mean(np.abs(np.array(v) - truth))) for k, v in found.items()}}
    return {"labels": n, "repeats": repeats, "alike": float(np.mean([j == y for _, j, y in items])), "models": out}


def main():
    options = arguments(__doc__, resamples=500, repeats=500)
    folder = testdata() / "pref/mt_bench_votes"
    human, machine = read(folder / "human.jsonl"), read(folder / "gpt4_pair.jsonl")
    gpt4 = {item: outcome for item, _, outcome in machine}
    people = by_item(human, ("expert", "author"))
    models = sorted({m for k in people for m in k[2:]})
    figures = {"agreement": agreements(human, gpt4, options.resamples)}
    for a in figures["agreement"]:
        print(f"{a['who']:20} turn {a['turn']} ties {a['ties']!s:5} {a['raw']['value']:.3f} of {a['n']}, kappa {a['kappa']['value']:.3f} " + (f"({a['kappa']['low']:.2f} to {a['kappa']['high']:.2f})" if a["kappa"]["low"] is not None else "(no interval)"))
    judge, votes, items = with_people(gpt4, people, ("tie",))
    figures["by_category"] = agreement_by(judge, votes, [CATEGORIES[(k[0] - 81) // 10] for k in items], options.resamples, groups=[k[0] for k in items], mirror=True)
    figures["by_turn"] = agreement_by(judge, votes, [f"turn {k[1]}" for k in items], options.resamples, groups=[k[0] for k in items], mirror=True)
    figures["one_more_person"] = {}
    for name, drop in (("ties count", ()), ("ties left out", ("tie",))):
        at = [k for k in people if k in gpt4 and gpt4[k] not in drop]
        figures["one_more_person"][name] = one_more_person([gpt4[k] for k in at], [[v for v in people[k] if v not in drop] for k in at], resamples=options.resamples, groups=[k[0] for k in at])
    figures |= {"alpha": alphas(people, gpt4, options.resamples), "ranking": rankings(gpt4, people, options.resamples), "elo": elo_orders(people, 32.0, 200),
                "ppi": corrected(models, people, gpt4, options.repeats), "verdicts": verdicts(people, gpt4), "transfer": transferred(people, gpt4, models, 100, options.repeats)}
    print(json.dumps(rounded({k: v for k, v in figures.items() if k != "agreement"}), indent=1))
    if options.save:
        save("calibration", "agreement, rankings and corrected win rates of GPT-4 and people on MT-Bench; 95 % intervals let whole questions count", rounded(figures))


if __name__ == "__main__":
    main()
