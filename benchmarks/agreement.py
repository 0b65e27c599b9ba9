"""How far judges agree on MT-Bench: GPT-4 with people, and people with each other (3,355 human votes, 2,400 verdicts of GPT-4).

Counted as in FastChat's compute_agreement.py: each human vote, or pair of votes, on the same question, turn and pair of models is one
comparison; S1 counts ties as a third verdict (an inconsistent verdict of GPT-4 is a tie), S2 leaves out comparisons with a tie."""
import json
from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
from record import arguments, save, testdata

from llm_course.classifier import bootstrap_interval
from llm_course.intervals import rate
from llm_course.reading import read_rows
from llm_course.votes import cohen_kappa, krippendorff_alpha, longest_answer_baseline

PUBLISHED = {  # Zheng et al. (2023), Table 5: agreement, number of comparisons
    "GPT-4 and experts": {"turn 1, ties count": (0.66, 1343), "turn 1, no ties": (0.85, 859), "turn 2, ties count": (0.66, 1325), "turn 2, no ties": (0.85, 864)},
    "experts and experts": {"turn 1, ties count": (0.63, 721), "turn 1, no ties": (0.81, 479), "turn 2, ties count": (0.67, 707), "turn 2, no ties": (0.82, 474)}}


def ordered(row: dict) -> tuple[tuple, str]:
    "The item (question, turn, both models in alphabetical order) and the winner in that order."
    a, b, winner = row["model_a"], row["model_b"], "tie" if "tie" in row["winner"] else row["winner"]
    if a > b:
        a, b, winner = b, a, {"model_a": "model_b", "model_b": "model_a"}.get(winner, winner)
    return (row["question_id"], row["turn"], a, b), winner


def comparisons(people: dict, gpt4: dict, turn: int) -> dict[str, list[tuple]]:
    "Pairs of verdicts on the same item, and the question they belong to: (first, second, question)."
    at = [k for k in people if k[1] == turn]
    return {"GPT-4 and experts": [(gpt4[k], v, k[0]) for k in at if k in gpt4 for v in people[k].values()],
            "experts and experts": [(x, y, k[0]) for k in at for x, y in combinations(people[k].values(), 2)]}


def both_orders(pairs: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    "Verdicts of both raters, each also with the models exchanged and the raters exchanged: who is called A, or first, has no meaning."
    swap = {"model_a": "model_b", "model_b": "model_a", "tie": "tie"}
    x, y = [p[0] for p in pairs], [p[1] for p in pairs]
    return np.array([*x, *(swap[v] for v in x)]), np.array([*y, *(swap[v] for v in y)])


def clustered(statistic, pairs: list[tuple], resamples: int) -> dict:
    "A statistic of comparisons with an interval that resamples whole questions: votes on one question are not independent."
    groups = defaultdict(list)
    for p in pairs:
        groups[p[2]].append(p)
    lists = np.empty(len(groups), object)
    lists[:] = list(groups.values())
    out = bootstrap_interval(lambda g: statistic([p for ps in g for p in ps]), lists, resamples=resamples)
    return out | {"n": len(pairs), "questions": len(groups)}


def agreement(pairs: list[tuple], resamples: int) -> dict:
    x, y = both_orders(pairs)
    shares = Counter(x), Counter(y)
    chance = sum(shares[0][c] * shares[1][c] for c in shares[0]) / len(x) ** 2
    return {"agreement": clustered(lambda ps: float(np.mean([a == b for a, b, _ in ps])), pairs, resamples), "by_chance": chance,
            "kappa": clustered(lambda ps: cohen_kappa(*both_orders(ps)), pairs, resamples), "ties": float(np.mean([[a == "tie", b == "tie"] for a, b, _ in pairs]))}


def read(path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [r | {"turn": int(r["turn"]), "question_id": int(r["question_id"])} for r in rows]


def by_expert(people: dict) -> dict:
    "Spread over the experts of their agreement with the other experts' votes, for those with 30 comparisons or more."
    seen = defaultdict(list)
    for votes in people.values():
        for a, b in combinations(votes, 2):
            for me, other in ((a, b), (b, a)):
                seen[me[0]].append(votes[me] == votes[other])
    shares = sorted(float(np.mean(v)) for v in seen.values() if len(v) >= 30)
    return {"experts": len(seen), "with_30_or_more": len(shares), "lowest": shares[0], "median": float(np.median(shares)), "highest": shares[-1]}


def main():
    options = arguments(__doc__, resamples=500)
    data = testdata()
    human, machine = read(data / "pref/mt_bench_votes/human.jsonl"), read(data / "pref/mt_bench_votes/gpt4_pair.jsonl")
    gpt4 = dict(ordered(r) for r in machine)
    people = defaultdict(dict)  # item -> {(expert, running number): verdict}; some experts voted twice on an item
    for i, r in enumerate(human):
        if r["judge"].startswith("expert"):
            item, winner = ordered(r)
            people[item][r["judge"], i] = winner
    out = {}
    for turn in (1, 2):
        for who, pairs in comparisons(people, gpt4, turn).items():
            for setup, kept in (("ties count", pairs), ("no ties", [p for p in pairs if "tie" not in p[:2]])):
                name, published = f"turn {turn}, {setup}", PUBLISHED[who][f"turn {turn}, {setup}"]
                found = out.setdefault(who, {})[name] = agreement(kept, options.resamples) | {"published": published[0], "published_n": published[1]}
                print(f"{who:20} {name:20} {found['agreement']['value']:.3f} of {len(kept)} (published {published[0]:.2f} of {published[1]}), kappa {found['kappa']['value']:.3f}, by chance {found['by_chance']:.2f}")
    verdicts = Counter(r["winner"] for r in machine)
    most = max(len(v) for v in people.values())
    code = {"model_a": 0, "tie": 1, "model_b": 2}
    rows = [[*[code[v] for v in votes.values()], *[None] * (most - len(votes))] for votes in people.values()]
    table = [row for r in rows for row in (r, [None if v is None else 2 - v for v in r])]
    pairs = [p for name in ("hh_harmless-base_test.jsonl.gz",) for _, p in read_rows(data / f"pref/{name}")]
    last = lambda text: text.rsplit("\n\nAssistant:", 1)[-1].strip()
    longest = {"hh-rlhf harmless, test": [{"chosen": last(p["chosen"]), "rejected": last(p["rejected"])} for p in pairs],
               "dpo_en_demo": [{"chosen": p["chosen"]["value"], "rejected": p["rejected"]["value"]} for _, p in read_rows(data / "pref/dpo_en_demo.json")]}
    baseline = {name: rate(round(longest_answer_baseline(ps) * len(ps), 1), len(ps)) for name, ps in longest.items()}
    figures = {"agreement": out, "alpha_experts_ordinal": krippendorff_alpha(list(zip(*table)), "ordinal"), "by_expert": by_expert(people),
               "gpt4_inconsistent_after_swap": rate(verdicts["tie (inconsistent)"], len(machine)), "longest_answer_chosen": baseline}
    print({k: v for k, v in figures.items() if k != "agreement"})
    if options.save:
        save("agreement", "agreement of GPT-4 and human experts on MT-Bench, as published and recomputed; 95 % intervals over questions", figures, ("krippendorff", "scikit-learn"))


if __name__ == "__main__":
    main()
