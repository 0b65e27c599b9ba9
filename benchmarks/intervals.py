"""For chapter 9's intervals: which problems four published models solved, and how often intervals of means and of clustered rates hold the truth.

GSM8K: OpenAI's example_model_solutions.jsonl, the first 350 test problems; counts of patterns of right (1) and wrong (0), no texts. Coverage:
samples with a known mean, each with the percentile and BCa bootstrap (Efron, 1987) and Student's t; rates in clusters of 1 to 9 scores, the
rate of each cluster drawn from a beta distribution, with the naive interval, the clustered one, and Wilson's with the effective number."""
from collections import Counter
from statistics import NormalDist

import numpy as np

from llm_course.intervals import clustered_interval, rate, summarise_metric, t_quantile
from llm_course.reading import read_rows
from record import arguments, rounded, save, testdata

MODELS = {"6b_finetuning": "6B", "6b_verification": "6B + verifier", "175b_finetuning": "175B", "175b_verification": "175B + verifier"}
MARKS, SHARES = (1, 5, 8, 9, 10), (0.1, 0.1, 0.2, 0.3, 0.3)
DRAWS = {"normal": (lambda rng, n: rng.normal(size=n), 0.0),
         "marks from 1 to 10": (lambda rng, n: rng.choice(MARKS, n, p=SHARES).astype(float), float(np.dot(MARKS, SHARES))),
         "log-normal": (lambda rng, n: rng.lognormal(0, 1, n), float(np.exp(0.5)))}
normal = NormalDist()


def bootstraps(x: np.ndarray, rng: np.random.Generator, resamples: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    "Percentile and BCa interval of the mean."
    n, mean = len(x), x.mean()
    means = x[rng.integers(0, n, (resamples, n))].mean(1)
    shift = normal.inv_cdf(min(max((means < mean).mean(), 1e-6), 1 - 1e-6))
    left_out = (x.sum() - x) / (n - 1)                   # the mean without each value in turn
    u = left_out.mean() - left_out
    speed = (u**3).sum() / (6 * max((u @ u) ** 1.5, 1e-300))
    at = [normal.cdf(shift + (shift + z) / (1 - speed * (shift + z))) for z in (-1.959964, 1.959964)]
    return np.percentile(means, [2.5, 97.5]), np.quantile(means, at)


def mean_coverage(rounds: int, seed: int) -> dict:
    rng, rows = np.random.default_rng(seed), []
    for name, (draw, mean) in DRAWS.items():
        for n in (8, 20, 50, 200):
            held = np.zeros(3)
            for _ in range(rounds):
                x = draw(rng, n)
                half = t_quantile(0.975, n - 1) * x.std(ddof=1) / n**0.5
                held += [low <= mean <= high for low, high in (*bootstraps(x, rng), (x.mean() - half, x.mean() + half))]
            rows.append({"values": name, "n": n, **dict(zip(("percentile", "bca", "t"), (held / rounds).tolist()))})
            print(rows[-1], flush=True)
    return {"rounds": rounds, "rows": rows}


def cluster_coverage(rounds: int, seed: int, correlation: float = 0.2) -> dict:
    rng, rows, a = np.random.default_rng(seed), [], 1 / correlation - 1
    for clusters in (5, 10, 30, 60):
        for p in (0.5, 0.9, 0.98):
            held = np.zeros(3)
            for _ in range(rounds):
                sizes = rng.integers(1, 10, clusters)
                groups = np.repeat(np.arange(clusters), sizes)
                scores = rng.binomial(1, rng.beta(a * p, a * (1 - p), clusters)[groups]).tolist()
                found = rate(sum(scores), len(scores)), clustered_interval(scores, groups.tolist()), summarise_metric(scores, groups.tolist())
                held += [f["low"] <= p <= f["high"] for f in found]
            rows.append({"clusters": clusters, "rate": p, **dict(zip(("independent", "t", "wilson"), (held / rounds).tolist()))})
            print(rows[-1], flush=True)
    return {"rounds": rounds, "correlation": correlation, "rows": rows}


def gsm8k() -> dict:
    rows = [row for _, row in read_rows(testdata() / "eval" / "gsm8k" / "example_model_solutions_a.jsonl")]
    patterns = Counter("".join(str(int(row[m]["is_correct"])) for m in MODELS) for row in rows)
    return {"models": list(MODELS.values()), "patterns": dict(sorted(patterns.items()))}


def main() -> None:
    args = arguments(__doc__, rounds=1000, seed=0)
    figures = {"gsm8k": gsm8k(), "mean_coverage": mean_coverage(args.rounds, args.seed), "cluster_coverage": cluster_coverage(args.rounds, args.seed)}
    if args.save:
        save("intervals", __doc__, rounded(figures))


if __name__ == "__main__":
    main()
