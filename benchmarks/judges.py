"""What length and kinship do to verdicts: AlpacaEval's published verdicts at equal length, and GPT-4's verdicts on MT-Bench beside people's.

`--alpaca-eval FOLDER` is a checkout of github.com/tatsu-lab/alpaca_eval (Apache-2.0): `results/*/weighted_alpaca_eval_gpt4_turbo/annotations.json`, and its
leaderboard. MT-Bench's votes (CC BY 4.0) come from the folder of real files. The record holds figures only."""
import csv
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from record import arguments, rounded, save, testdata

from llm_course.intervals import rate
from llm_course.judge import length_controlled, self_preference
from llm_course.reading import read_rows

ASKED = ("alpaca-7b", "claude-2.1", "gpt-3.5-turbo-1106")                # asked as they are, and for shorter or longer answers
BASELINE = "gpt4_1106_preview"


def verdicts_of(folder: Path) -> dict[str, dict]:
    "Of each model: probabilities that its answer beats the baseline's, and both lengths, by question."
    found = {}
    for path in sorted(folder.glob("results/*/weighted_alpaca_eval_gpt4_turbo/annotations.json")):
        rows = {r["instruction"]: r for r in json.loads(path.read_text(encoding="utf-8"))}
        if path.parts[-3] != BASELINE and {r["generator_1"] for r in rows.values()} == {BASELINE} and len(rows) > 800:
            found[path.parts[-3]] = {q: (None if r["preference"] is None else 0.5 if r["preference"] == 0 else r["preference"] - 1, len(r["output_2"]), len(r["output_1"])) for q, r in rows.items()}
    return found


def difficulty_of(models: dict[str, dict]) -> dict[str, float]:
    "For each question the logit of the mean preference over all models, centred: how hard the baseline is to beat there."
    seen = defaultdict(list)
    for rows in models.values():
        for q, (p, *_) in rows.items():
            seen[q].append(0.5 if p is None else p)
    mean = {q: min(0.99, max(0.01, float(np.mean(p)))) for q, p in seen.items()}
    logit = {q: float(np.log(p / (1 - p))) for q, p in mean.items()}
    centre = float(np.mean(list(logit.values())))
    return {q: v - centre for q, v in logit.items()}


def gaps(ours: dict[str, float], theirs: dict[str, float]) -> dict:
    names = sorted(ours)
    a, b = np.array([ours[n] for n in names]), np.array([theirs[n] for n in names])
    worst = int(np.abs(a - b).argmax())
    return {"correlation": float(np.corrcoef(a, b)[0, 1]), "mean_gap": float(np.abs(a - b).mean()), "largest_gap": float(abs(a - b)[worst]), "largest_gap_model": names[worst]}


def alpaca(folder: Path) -> dict:
    models, published = verdicts_of(folder), {}
    with open(next(folder.glob("src/alpaca_eval/leaderboards/data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv")), encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            published[row[""]] = {"raw": float(row["win_rate"]) / 100, "controlled": float(row["length_controlled_winrate"]) / 100}
    models = {n: rows for n, rows in models.items() if n in published}
    hard = difficulty_of(models)
    plain, full = {}, {}
    for n, rows in models.items():
        p, mine, base = map(list, zip(*rows.values()))
        plain[n] = length_controlled(p, mine, base)
        full[n] = length_controlled(p, mine, base, [hard[q] for q in rows], resamples=2)
        print(f"{n:35} raw {plain[n]['raw']['value']:.3f} ({published[n]['raw']:.3f})  equal length {plain[n]['value']:.3f}, with difficulty {full[n]['value']:.3f} ({published[n]['controlled']:.3f})")
    points = {n: {"raw": plain[n]["raw"]["value"], "controlled": plain[n]["value"], "with_difficulty": full[n]["value"], "published": published[n]["controlled"],
                  "as_long": float(np.mean([mine >= base for _, mine, base in rows.values()]))} for n, rows in models.items()}
    column = lambda key: {n: row[key] for n, row in points.items()}
    asked = {stem: {kind: points[n] for kind, n in (("concise", f"{stem}_concise"), ("normal", stem), ("verbose", f"{stem}_verbose")) if n in points} for stem in ASKED}
    spread = {key: float(np.mean([(max(v) - min(v)) / np.mean(v) for v in ([r[key] for r in row.values()] for row in asked.values())])) for key in ("raw", "controlled", "with_difficulty", "published")}
    raw_gap = max(abs(plain[n]["raw"]["value"] - published[n]["raw"]) for n in models)
    return {"models": len(models), "points": points, "asked_for_length": asked, "relative_spread": spread, "raw_largest_gap": raw_gap,
            "against_published": {key: gaps(column(key), column("published")) for key in ("raw", "controlled", "with_difficulty")}}


def ordered(row: dict) -> tuple[tuple, str]:
    "The pair (question, turn, both models in alphabetical order) and its verdict in that order."
    a, b = row["model_a"], row["model_b"]
    verdict = "tie" if "tie" in row["winner"] else "first" if (row["winner"] == "model_a") == (a < b) else "second"
    return (row["question_id"], row["turn"], *sorted((a, b))), verdict


def kinship(data: Path) -> dict:
    "For each model as the `family`: GPT-4's verdicts and people's majority on the pairs that hold it."
    votes = defaultdict(Counter)
    for _, row in read_rows(data / "pref/mt_bench_votes/human.jsonl"):
        key, verdict = ordered(row)
        votes[key][verdict] += 1
    judge = dict(ordered(row) for _, row in read_rows(data / "pref/mt_bench_votes/gpt4_pair.jsonl"))
    people = {k: top[0][0] if len(top := v.most_common(2)) == 1 or top[0][1] > top[1][1] else "tie" for k, v in votes.items()}
    keys = sorted(k for k in people if k in judge)
    out = {}
    for name in sorted({m for k in keys for m in k[2:]}):
        mine = [k for k in keys if name in k[2:]]
        out[name] = self_preference([judge[k] for k in mine], [people[k] for k in mine], ["first" if k[2] == name else "second" for k in mine])
    return out


def main(save_it: bool, folder: str) -> None:
    data = testdata()
    inconsistent = [("inconsistent" in row["winner"]) for _, row in read_rows(data / "pref/mt_bench_votes/gpt4_pair.jsonl")]
    figures = {"alpaca_eval": alpaca(Path(folder)), "self_preference": kinship(data), "gpt4_inconsistent": rate(sum(inconsistent), len(inconsistent))}
    for name, row in figures["self_preference"].items():
        print(name, {k: v["value"] if isinstance(v, dict) else v for k, v in row.items()})
    print({k: v for k, v in figures["alpaca_eval"].items() if k not in ("asked_for_length", "points")})
    if save_it:
        save("judges", "verdicts at equal length (AlpacaEval) and kinship (MT-Bench); 95 % intervals", rounded(figures))


if __name__ == "__main__":
    args = arguments(__doc__, alpaca_eval="alpaca_eval")
    main(args.save, args.alpaca_eval)
