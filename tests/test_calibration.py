"""Judges and people: known values, other implementations, any labels, published figures."""
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.calibration import (agreement_by, bradley_terry, calibrate_threshold, confusion, corrected_rate, elo, judge_agreement, one_more_person,
                                    people_agreement, ppi_mean, rank_players, verdict_values, win_matrix)
from llm_course.reading import UserError
from llm_course.labelling import label_agreement
from llm_course.votes import cohen_kappa, krippendorff_alpha, pair_alpha
from llm_course.course import data_path

ROOT = Path(__file__).resolve().parent.parent
fuzz = settings(max_examples=60, deadline=None, derandomize=True)
LABEL = st.sampled_from(["first", "second", "tie"])
MAYBE = st.one_of(st.none(), LABEL)


def near(a, b, eps=1e-9):
    return (a is None and (b is None or math.isnan(b))) or abs(a - b) < eps


@fuzz
@given(st.lists(st.tuples(MAYBE, st.one_of(MAYBE, st.just("skip")), st.integers(0, 3)), max_size=25), st.booleans())
def test_agreement_of_any_labels(rows, grouped):
    judge, people, groups = ([r[k] for r in rows] for k in range(3))
    both = [(a, b) for a, b in zip(judge, people) if a and b not in (None, "skip")]
    if not both:
        with pytest.raises(UserError, match="nothing to compare"):
            judge_agreement(judge, people)
        return
    r = judge_agreement(judge, people, 20, groups=groups if grouped else None)
    assert near(r["raw"]["value"], np.mean([a == b for a, b in both])) and near(r["kappa"]["value"], cohen_kappa(*zip(*both)))
    assert (r["kappa"]["value"] is None) == bool(r["note"]) and 0 < r["base_rate"] <= 1
    assert r["raw"]["n"] + sum(a is None or b in (None, "skip") for a, b in zip(judge, people)) == len(rows)
    table = confusion(judge, people)
    assert sum(map(sum, table["counts"])) == len(both)
    assert sum(v["n"] for v in verdict_values(judge, people).values()) == len(both)
    parts = agreement_by(judge, people, groups, 5)
    assert sum(p["raw"]["n"] for p in parts.values() if p) == len(both)


@fuzz
@given(st.lists(st.lists(MAYBE, max_size=4), max_size=15))
def test_agreement_of_people_is_krippendorffs(votes):
    several = [v for v in ([x for x in item if x] for item in votes) if len(v) > 1]
    if not several:
        with pytest.raises(UserError, match="two labels"):
            people_agreement(votes)
        return
    r = people_agreement(votes, resamples=5)
    most = max(map(len, several))
    assert near(r["alpha"]["value"], krippendorff_alpha(list(zip(*[[*v, *[None] * (most - len(v))] for v in several]))))
    pairs = [a == b for v in several for i, a in enumerate(v) for b in v[i + 1:]]
    assert near(r["raw"]["value"], np.mean(pairs)) and r["pairs"] == len(pairs) and r["items"] + r["too_few"] == len(votes)


@fuzz
@given(st.lists(st.tuples(MAYBE, st.lists(LABEL, max_size=5)), max_size=12))
def test_one_more_person(rows):
    judge, votes = [r[0] for r in rows], [r[1] for r in rows]
    if not any(j and len(v) > 2 for j, v in rows):
        with pytest.raises(UserError):
            one_more_person(judge, votes)
        return
    r = one_more_person(judge, votes, resamples=5)
    assert abs(r["judge"]["value"] - r["person"]["value"] - r["difference"]["value"]) < 1e-9
    echo = one_more_person([v[0] if v else None for v in votes], [[v[0]] * 3 if v else [] for v in votes], resamples=5)
    assert echo["judge"]["value"] == echo["person"]["value"] == 1


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(2, 7))
def test_strengths_are_those_of_logistic_regression(seed, players):
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(seed)
    wins = rng.integers(0, 7, (players, players)) / 2 * (1 - np.eye(players))
    try:
        s = bradley_terry(wins)
    except UserError as e:
        assert "no finite ranking" in str(e)
        return
    expected = (wins + wins.T) / (1 + np.exp(s - s[:, None]))
    assert np.abs((wins - expected).sum(1)).max() < 1e-7             # the likelihood is level: as many wins as expected
    rows = [(i, j) for i in range(players) for j in range(players) if wins[i, j] > 0]
    X, weight = np.array([np.eye(players)[i] - np.eye(players)[j] for i, j in rows]), [wins[p] for p in rows]
    fit = linear.LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-9, max_iter=10_000).fit(np.r_[X, -X], [1] * len(X) + [0] * len(X), weight * 2)
    np.testing.assert_allclose(s, fit.coef_[0] - fit.coef_[0].mean(), atol=2e-3)


def test_a_prior_is_a_draw_with_an_average_player():
    wins = np.array([[0, 5, 3], [0, 0, 2], [0, 1, 0.0]])
    s = bradley_terry(wins, prior=2.0)
    level = lambda t: (wins - (wins + wins.T) / (1 + np.exp(t - t[:, None]))).sum(1) + 2 * (0.5 - 1 / (1 + np.exp(-t)))
    low, high = -10.0, 10.0                                            # strengths come back with mean 0; look for where the average player stands
    for _ in range(80):
        low, high = ((low + high) / 2, high) if level(s + (low + high) / 2).sum() > 0 else (low, (low + high) / 2)
    shift = low
    assert abs(level(s + shift)).max() < 1e-7
    assert np.abs(bradley_terry(wins, prior=50.0)).max() < np.abs(s).max()


def test_strengths_of_extreme_and_sparse_games():
    chain = np.zeros((40, 40))
    for i in range(39):
        chain[i, i + 1], chain[i + 1, i] = 3, 1
    np.testing.assert_allclose(-np.diff(bradley_terry(chain)), math.log(3), atol=1e-6)
    lopsided = bradley_terry([[0, 1e6, 0], [1, 0, 1e5], [0, 1, 0]])
    np.testing.assert_allclose([lopsided[0] - lopsided[1], lopsided[1] - lopsided[2]], [math.log(1e6), math.log(1e5)], atol=1e-6)


@fuzz
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd"), LABEL).filter(lambda g: g[0] != g[1]), min_size=1, max_size=30))
def test_games(games):
    players, wins = win_matrix(games)
    assert wins.sum() == len(games) and len(players) == len(wins)
    assert abs(sum(elo(games).values()) - 1000 * len(players)) < 1e-6
    r = rank_players(games, prior=1.0, resamples=10)
    values = [p["value"] for p in r["players"].values()]
    assert values == sorted(values, reverse=True) and all(1 <= p["rank"][0] <= p["rank"][1] <= len(players) for p in r["players"].values())
    assert r["unsolved"] == 0 and all(p["low"] - 1e-9 <= p["high"] for p in r["players"].values())
    assert abs(np.mean([p["value"] for p in r["players"].values()]) - 1000) < 1e-6


# ppi-python 0.2.3 on `scores(...)`: seed, n, others, tie to people, tuned; ppi_mean_pointestimate, and both ends of ppi_mean_ci(alpha=0.05)
PPI = [
    (0, 12, 40, 0.7, True, 0.5322973435267337, 0.3572427754849953, 0.7073519115684722),
    (0, 12, 40, 0.7, False, 0.5023538156590683, 0.30277849981043925, 0.7019291315076974),
    (1, 50, 500, 2.0, True, 0.4923839349651152, 0.45026266802349774, 0.5345052019067326),
    (1, 50, 500, 2.0, False, 0.5991040634291376, 0.4840639613561901, 0.714144165502085),
    (2, 200, 300, 0.7, True, 0.5175002987214292, 0.48213004501141743, 0.552870552431441),
    (2, 200, 300, 0.7, False, 0.511003468780971, 0.45323818733471305, 0.5687687502272291),
    (3, 30, 30, -1.0, True, 0.39570531879748927, 0.30674503476560033, 0.4846656028293782),
    (3, 30, 30, -1.0, False, 0.20630987776676585, -0.06771786099781019, 0.4803376165313419),
    (4, 25, 1000, 0.0, True, 0.5040237859266601, 0.4135928497180976, 0.5944547221352225),
    (4, 25, 1000, 0.0, False, 0.5699444995044598, 0.4269749179056683, 0.7129140811032513),
]


def column(seed, n):
    return np.array([(i * i * (37 + seed) + i * 7919 + seed * 131) % 1009 / 1009 for i in range(n)])


def scores(seed, n, more, tie):
    y = column(seed, n + more)
    f = tie * y + column(seed + 50, n + more)
    return f[n:], f[:n], y[:n]


@pytest.mark.parametrize("seed, n, more, tie, tuned, value, low, high", PPI)
def test_ppi_is_that_of_its_authors(seed, n, more, tie, tuned, value, low, high):
    many, f, y = scores(seed, n, more, tie)
    r = ppi_mean(many, f, y, power_tuning=tuned)
    np.testing.assert_allclose([r["value"], r["low"], r["high"]], [value, low, high], rtol=0, atol=1e-9)
    if importlib.util.find_spec("ppi_py"):
        import ppi_py
        lam = None if tuned else 1.0
        theirs = [float(np.ravel(x)[0]) for x in (ppi_py.ppi_mean_pointestimate(y, f, many, lam=lam), *ppi_py.ppi_mean_ci(y, f, many, alpha=0.05, lam=lam))]
        np.testing.assert_allclose([r["value"], r["low"], r["high"]], theirs, rtol=0, atol=1e-9)


def test_a_useless_judge_leaves_people_only():
    rng = np.random.default_rng(0)
    y = rng.random(100)
    r = ppi_mean(np.zeros(50), np.zeros(100), y)
    assert r["weight"] == 0 and abs(r["value"] - y.mean()) < 1e-12 and abs(r["effective_n"] - 100) < 1e-9
    assert abs(r["high"] - r["low"] - 2 * 1.959963984540054 * y.std() / 10) < 1e-12
    against = ppi_mean(-rng.random(500), -y, y)                       # never a negative weight
    assert against["weight"] == 0


def test_the_correction_of_rates_spreads_as_it_says():
    rng, found, half = np.random.default_rng(1), [], []
    for _ in range(1500):
        y = np.repeat([1, 0], [80, 120])
        verdict = lambda y: np.where(rng.random(len(y)) < np.where(y == 1, 0.85, 0.75), y, 1 - y)
        r = corrected_rate(verdict((rng.random(600) < 0.3).astype(int)), verdict(y), y)
        found.append(r["value"])
        half.append((r["high"] - r["low"]) / 2)
    assert abs(np.mean(found) - 0.3) < 0.01
    assert abs(1.96 * np.std(found) / np.mean(half) - 1) < 0.12


@pytest.mark.parametrize("sensitivity, specificity, base", [(0.98, 0.95, 0.4), (0.98, 0.95, 0.1), (0.85, 0.75, 0.4)])
def test_the_correction_of_rates_holds_the_truth_with_few_labels(sensitivity, specificity, base):
    "A good judge makes no error among forty labels in many draws; the interval must not take this for a proof."
    rng, held, rounds = np.random.default_rng(2), 0, 1500
    verdict = lambda y: np.where(rng.random(len(y)) < np.where(y == 1, sensitivity, specificity), y, 1 - y)
    for _ in range(rounds):
        y = np.repeat([1, 0], [round(40 * base), 40 - round(40 * base)])
        r = corrected_rate(verdict((rng.random(2000) < base).astype(int)), verdict(y), y)
        held += r["low"] <= base <= r["high"]
    assert held / rounds > 0.94
    assert corrected_rate([1] * 50, [1, 0], [1, 0])["low"] < 0.5


@fuzz
@given(st.lists(st.lists(MAYBE, min_size=3, max_size=3), min_size=1, max_size=15))
def test_alpha_in_both_orders_is_the_same_everywhere(votes):
    "Three functions offer it, for the data that they know: all count every item in both orders."
    if not any(sum(x is not None for x in v) > 1 for v in votes):
        return
    table = [{"id": str(i), "labels": dict(zip("abc", v))} for i, v in enumerate(votes)]
    alpha = people_agreement(votes, resamples=2, mirror=True)["alpha"]["value"]
    assert near(alpha, label_agreement(table)["alpha"])
    if all(x != "tie" for v in votes for x in v):
        assert near(alpha, pair_alpha([{"votes": [int(x == "first") for x in v if x]} for v in votes if any(v)]))


def test_no_interval_without_spread():
    "Perfect agreement on few questions: kappa has no interval, the share of agreements a cautious one."
    labels, groups = ["first", "second"] * 6, [i // 4 for i in range(12)]
    r = judge_agreement(labels, labels, 50, groups=groups)
    assert (r["raw"]["value"], r["kappa"]["value"], r["kappa"]["low"], r["kappa"]["high"]) == (1, 1, None, None)
    assert 0 < r["raw"]["low"] < 0.7 and r["raw"]["high"] == 1 and set(r["raw"]) == {"value", "low", "high", "n"}
    assert people_agreement([[x, x] for x in labels], resamples=50)["raw"]["low"] is None
    assert one_more_person(["first"] * 5, [["first"] * 3] * 5, resamples=50)["difference"]["low"] is None


@pytest.mark.parametrize("bad", [[0.5], ["a"], [None], [math.nan], [2]])
def test_verdicts_that_are_no_zeros_and_ones(bad):
    with pytest.raises(UserError, match="0 and 1|list of numbers"):
        corrected_rate(bad, [0, 1], [0, 1])


def test_a_threshold_is_chosen_on_one_half_and_measured_on_the_other():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 2000)
    r = calibrate_threshold(y + rng.normal(0, 0.4, 2000), y)
    assert abs(r["threshold"] - 0.5) < 0.2 and abs(r["kappa"] - r["kappa_held_out"]) < 0.05
    with pytest.raises(UserError, match="both 0 and 1"):
        calibrate_threshold([1, 2, 3, 4], [0, 0, 0, 0])


def test_published_agreement_on_mt_bench(testdata):
    "Zheng et al. (2023), as FastChat counts: experts; and with the authors' votes, the figures that others report from the same file."
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from calibration import by_item, read, with_people
    human, machine = (read(testdata / f"pref/mt_bench_votes/{name}.jsonl") for name in ("human", "gpt4_pair"))
    gpt4 = {item: outcome for item, _, outcome in machine}
    record = json.loads(data_path("runs/calibration.json").read_text(encoding="utf-8"))["figures"]["agreement"]
    expected = {("people", True): (1199, 0.641), ("people", False): (772, 0.820), ("experts", True): (721, 0.630), ("experts", False): (479, 0.810)}
    for (name, ties), (n, share) in expected.items():
        people = {k: v for k, v in by_item(human, ("expert",) if name == "experts" else ("expert", "author")).items() if k[1] == 1}
        r = people_agreement(list(people.values()), () if ties else ("tie",), resamples=2)
        assert (r["pairs"], round(r["raw"]["value"], 3)) == (n, share)
        kept = next(a for a in record if (a["who"], a["turn"], a["ties"]) == (f"{name} and {name}", 1, ties))
        assert kept["n"] == n and abs(kept["raw"]["value"] - r["raw"]["value"]) < 1e-3
    experts = {k: v for k, v in by_item(human, ("expert",)).items() if k[1] == 1}
    for drop, n, share in (((), 1343, 0.66), (("tie",), 859, 0.85)):
        verdicts, votes, _ = with_people(gpt4, experts, drop)
        r = judge_agreement(verdicts, votes, 2)
        assert (r["raw"]["n"], round(r["raw"]["value"], 2)) == (n, share)
