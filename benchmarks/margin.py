"""Does filtering preference pairs by agreement make a better reward model? On the village, where the right label of each pair is known.

Each reward model is trained from scratch for the same number of steps on the pairs that a threshold leaves, and scored on held-out pairs
in their true order. Three villages (seeds)."""
import time

import numpy as np
from record import arguments, save

from llm_course.intervals import rate
from llm_course.model import ModelConfig, Transformer
from llm_course.reward import RewardModel, as_gold, pair_correctness, pair_examples, train_reward
from llm_course.tokenizer import train_tokenizer
from llm_course.trainer import TrainConfig, seed_all
from llm_course.votes import filter_pairs, longest_answer_baseline
from llm_course.world import make_village, preference_rows, village_documents

NAMES = {"one annotator's label": None, "majority of five": 0.5, "4 of 5 agree": 0.8, "all agree": 1.0, "true labels": "gold"}


def labelled(pairs: list[dict], threshold) -> list[dict]:
    "The training pairs of a variant: as given, relabelled and filtered by agreement, or in their true order."
    return pairs if threshold is None else as_gold(pairs) if threshold == "gold" else filter_pairs(pairs, threshold)[0]


def one_run(seed: int, n_pairs: int, steps: int) -> dict[str, dict]:
    village = make_village(seed, n_people=20)
    tokenizer = train_tokenizer([d["text"] for d in village_documents(village, 200_000, seed)], 800)
    pairs, test = preference_rows(village, n_pairs, seed=seed), as_gold(preference_rows(village, 400, "test", seed))
    out = {}
    for name, threshold in NAMES.items():
        kept = labelled(pairs, threshold)
        right = sum(p["gold"]["chosen"] > p["gold"]["rejected"] for p in kept)
        seed_all(seed)
        model = RewardModel(Transformer(ModelConfig(len(tokenizer), dim=64, n_layers=2, n_heads=4)))
        examples, _ = pair_examples(kept, tokenizer, 128)
        train_reward(model, examples, TrainConfig(steps=steps, batch_size=16, lr=2e-3, log_every=steps), tokenizer)
        correct = pair_correctness(model, test, tokenizer)
        out[name] = {"pairs": len(kept), "labels_right": right / len(kept), "correct": int(sum(correct)), "n": len(correct)}
    out["longest answer"] = {"correct": longest_answer_baseline(test) * len(test), "n": len(test)}
    return out


def main():
    options = arguments(__doc__, seeds=3, pairs=200, steps=80)
    start, runs = time.perf_counter(), []
    for seed in range(options.seeds):
        runs.append(one_run(seed, options.pairs, options.steps))
        print(seed, {k: round(v["correct"] / v["n"], 3) for k, v in runs[-1].items()}, f"{time.perf_counter() - start:.0f} s")
    figures = {"pairs": options.pairs, "steps": options.steps, "seeds": options.seeds, "variants": {}}
    for name in runs[0]:
        shares = [r[name]["correct"] / r[name]["n"] for r in runs]
        pooled = rate(sum(r[name]["correct"] for r in runs), sum(r[name]["n"] for r in runs))
        extra = {k: float(np.mean([r[name][k] for r in runs])) for k in ("pairs", "labels_right") if k in runs[0][name]}
        figures["variants"][name] = extra | {"accuracy": pooled, "by_seed": shares}
        print(f"{name:25} {pooled['value']:.3f} ({pooled['low']:.3f} to {pooled['high']:.3f})", extra)
    if options.save:
        save("margin", "accuracy of small reward models trained on preference pairs filtered by agreement; three villages", figures)


if __name__ == "__main__":
    main()
