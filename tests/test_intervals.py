"""Intervals and comparisons: against known packages, against what they promise, and with whatever a suite may hand over."""
import json
import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llm_course.intervals import (clustered_interval, compare, detectable_difference, holm, items_needed, mcnemar, mean_interval, paired_difference, rate,
                                  sign_test, summarise_metric, t_interval, t_quantile, t_tail, unpaired_difference, win_rate)
from llm_course.cleaning import wilson
from llm_course.reading import UserError, read_rows

KEYS = {"value", "low", "high", "n", "missing", "method"}


def test_results_of_the_first_version():
    "Reports and records were written with these: same call, same figures."
    assert mean_interval([1, 2, 3, 4] * 25) == pytest.approx({"value": 2.5, "low": 2.29, "high": 2.72, "n": 100})
    assert win_rate([1, 2, 3, 0, 5], [1, 1, 4, 0, 2], seed=3) == pytest.approx({"value": 0.6, "low": 0.3, "high": 0.9, "n": 5})
    assert paired_difference([.5, 2, 3.25, 0, 5], [1, 1, 4, 0, 2], seed=7) == pytest.approx({"value": 0.55, "low": -0.45125, "high": 1.9, "n": 5})
    assert rate(7, 9) == pytest.approx({"value": 7 / 9, "low": 0.4525889666922117, "high": 0.9367748934594303, "n": 9})


# against known packages

@pytest.mark.parametrize("df", [1, 1.5, 2, 3, 4, 7.3, 30, 162, 1318, 14041, 3e5])
def test_students_t_is_scipys(df):
    for p in (0.6, 0.8, 0.95, 0.975, 0.999):
        assert t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-7)
    for t in (-3, 0, 1e-3, 0.7, 2, 6, 30):
        assert t_tail(t, df) == pytest.approx(2 * stats.t.sf(abs(t), df), rel=1e-6, abs=1e-12)
    assert t_tail(math.inf, df) == 0


def test_sign_test_is_scipys_exact_binomial_test():
    for wins, losses in [(a, b) for a in range(0, 30, 3) for b in range(0, 30) if a + b] + [(700, 600), (7100, 6900)]:
        known = stats.binomtest(wins, wins + losses).pvalue
        assert sign_test(wins, losses)["p"] == pytest.approx(known, rel=1e-9)
        half = stats.binom.pmf(wins, wins + losses, 0.5) if wins != losses else 0.0
        assert sign_test(wins, losses)["mid_p"] == pytest.approx(known - half, rel=1e-7)


def test_clustered_error_is_that_of_miller_and_of_statsmodels():
    rng = np.random.default_rng(0)
    for _ in range(20):
        groups = rng.integers(0, 9, 60)
        values = rng.normal(size=60) + groups
        e, G = values - values.mean(), len(set(groups.tolist()))
        miller = math.sqrt(sum(e[i] * e[j] for i in range(60) for j in range(60) if groups[i] == groups[j])) / 60
        found = clustered_interval(values, groups)
        assert found["se"] == pytest.approx(miller * math.sqrt(G / (G - 1)), rel=1e-12) and found["clusters"] == G
    twelve = clustered_interval([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0.5, 0.25], [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4])     # statsmodels 0.15.0, as below
    assert (twelve["se"], twelve["low"], twelve["high"]) == pytest.approx((0.10052218263343118, 0.28340568, 0.84159432), abs=1e-8)
    api = pytest.importorskip("statsmodels.api")
    known = api.OLS(values, np.ones(60)).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    assert (found["se"], found["low"], found["high"]) == pytest.approx((known.bse[0], *known.conf_int()[0]), rel=1e-9)


def test_holm_keeps_order_and_bounds():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.random(rng.integers(1, 9)).round(2).tolist()
        adjusted = holm(p)
        assert all(x - 1e-12 <= a <= min(1.0, len(p) * x) + 1e-12 for x, a in zip(p, adjusted))
        assert min(adjusted) == pytest.approx(min(1.0, len(p) * min(p)))
        order = np.argsort(p, kind="stable")
        assert (np.diff(np.array(adjusted)[order]) >= 0).all() and max(adjusted) <= 1
        slow = [max(min(1.0, sum(y >= x or j == k for k, y in enumerate(p)) * x) for j, x in enumerate(p) if x <= mine) for mine in p]
        if len(set(p)) == len(p):
            assert adjusted == pytest.approx(slow)


# what they promise

def test_verdicts_on_right_and_wrong_keep_their_promise():
    "All outcomes of 40 items added up: false alarms at most about 5 %, intervals hold the truth in about 95 % and more."
    n = 40
    tables = [(b, c) for b, c in product(range(n + 1), repeat=2) if b + c <= n]
    found = {}
    for b, c in tables:
        rest = n - b - c
        f = compare([1] * b + [0] * c + [1] * rest, [0] * b + [1] * c + [1] * rest)
        found[b, c] = f["low"], f["high"], "better" in f["verdict"]
    for p, q in ((0.02, 0.02), (0.1, 0.1), (0.25, 0.25), (0.1, 0.0), (0.3, 0.1), (0.5, 0.05)):
        weights = stats.multinomial.pmf([(b, c, n - b - c) for b, c in tables], n, [p, q, 1 - p - q])
        held = sum(w for w, t in zip(weights, tables) if found[t][0] <= p - q <= found[t][1])
        alarms = sum(w for w, t in zip(weights, tables) if found[t][2])
        assert weights.sum() == pytest.approx(1) and held > 0.94, (p, q, held)
        assert p != q or alarms < 0.052, (p, q, alarms)


def test_verdict_and_interval_and_p_agree():
    for b, c in product(range(0, 40), repeat=2):
        f = compare([1] * b + [0] * c + [1] * 30, [0] * b + [1] * c + [1] * 30)
        if "better" in f["verdict"]:
            assert f["p"] < 0.05 and (f["low"] > 0) == (f["verdict"] == "A is better") and (f["high"] < 0) == (f["verdict"] == "B is better")
        else:
            assert f["p"] >= 0.05 or f["low"] <= 0 <= f["high"]
        assert -1 <= f["low"] <= f["difference"] <= f["high"] <= 1


@pytest.mark.parametrize("rare", [0.02, 0.15])
def test_clustered_comparison_of_right_and_wrong_keeps_its_promise(rare):
    "Answers drawn several times for each question; models of equal skill, few and many disagreements."
    rng, alarms, held, rounds = np.random.default_rng(1), 0, 0, 400
    for _ in range(rounds):
        skill = rng.choice([1.0, 0.5], (2, 30), p=[1 - rare, rare])      # on a few questions, each model's own, it guesses
        x, y = rng.binomial(1, skill[:, :, None], (2, 30, 4)).tolist()
        f = compare(x, y)
        alarms, held = alarms + ("better" in f["verdict"]), held + (f["low"] <= 0 <= f["high"])
    assert alarms / rounds < 0.07 and held / rounds > 0.93


def test_intervals_of_real_scores_keep_their_promise():
    rng, held, rounds = np.random.default_rng(2), Counter(), 500
    for _ in range(rounds):
        items = rng.normal(0, 1, 25)
        lists = [(v + rng.normal(0, 1, k)).tolist() for v, k in zip(items, rng.integers(1, 6, 25))]
        f = summarise_metric(lists)
        held["lists"] += f["low"] <= 0 <= f["high"]
        f = compare((items + rng.normal(0.3, 1, 25)).tolist(), items.tolist())
        held["paired"] += f["low"] <= 0.3 <= f["high"]
        f = unpaired_difference(rng.normal(1, 1, 12), rng.normal(0, 3, 30))
        held["unpaired"] += f["low"] <= 1 <= f["high"]
    assert all(0.92 < k / rounds < 0.98 for k in held.values()), held


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_items_needed_gives_the_power_it_says(correlation):
    n, rng, rounds = items_needed(0.3, sd=1.0, correlation=correlation), np.random.default_rng(3), 400
    assert detectable_difference(n, sd=1.0, correlation=correlation) == pytest.approx(0.3, rel=0.01)
    shared = rng.normal(0, correlation**0.5, (rounds, n))
    a, b = (shared + rng.normal(0, (1 - correlation) ** 0.5, (rounds, n)) for _ in range(2))
    found = np.mean([compare(x + 0.3, y)["verdict"] == "A is better" for x, y in zip(a, b)])
    assert 0.74 < found < 0.86


def test_the_verdict_asks_for_enough_items():
    "As many items as a verdict asks for, of the same kind, settle it in most cases."
    rng, settled = np.random.default_rng(4), 0
    draw = lambda n: (rng.normal(0.2, 1, n), rng.normal(0, 1, n))
    f = compare(*(x - x.mean() + m for x, m in zip(draw(60), (0.2, 0.0))))
    asked = int(f["verdict"].split("needs about ")[1].split(" items")[0].replace(",", ""))
    assert f["verdict"].startswith("cannot tell: a difference of 0.2 needs about") and 250 < asked < 650
    settled = sum(compare(*draw(asked))["verdict"] == "A is better" for _ in range(200))
    assert 0.7 < settled / 200 < 0.97


# whatever a suite may hand over

number = st.one_of(st.integers(0, 1), st.booleans(), st.floats(-1e6, 1e6, allow_nan=False), st.integers(-5, 10))
score = st.one_of(number, st.none(), st.lists(st.one_of(number, st.none()), max_size=4))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(score, st.sampled_from(["a", "b", 3, (1, 2)])), max_size=12))
def test_any_metric_is_summarised(rows):
    values, groups = [r[0] for r in rows], [r[1] for r in rows]
    for g in (None, groups):
        f = summarise_metric(values, g)
        assert set(f) == KEYS and json.loads(json.dumps(f, allow_nan=False)) == f
        flat = [x for v in values for x in ((v or [None]) if isinstance(v, list) else [v])]
        assert f["n"] + f["missing"] == len(flat) and f["missing"] == flat.count(None)
        assert (f["value"] is None) == (f["n"] == 0)
        assert (f["low"] is None) == (f["high"] is None) == f["method"].startswith("none")
        if f["low"] is not None:
            slack = 1e-9 * (1 + abs(f["value"]))
            assert f["low"] - slack <= f["value"] <= f["high"] + slack


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.one_of(number, st.none()), st.one_of(number, st.none()), st.sampled_from("ab")), max_size=12), st.booleans())
def test_any_two_models_are_compared_and_exchanged(rows, grouped):
    a, b, groups = ([r[i] for r in rows] for i in range(3))
    f, g = (compare(x, y, groups if grouped else None) for x, y in ((a, b), (b, a)))
    assert json.loads(json.dumps(f, allow_nan=False)) == f
    assert f["n"] + f["missing"] == len(rows) and f["wins"] + f["losses"] + f["ties"] == f["n"]
    assert (f["wins"], f["missing"]) == (g["losses"], g["missing"])
    assert f["verdict"].startswith(("A is better", "B is better", "cannot tell"))
    if f["p"] is not None:
        scale = 1 + max(abs(x) for x in a + b if x is not None)
        assert f["p"] == pytest.approx(g["p"], abs=1e-9) and f["low"] == pytest.approx(-g["high"], abs=1e-9 * scale)
        assert f["verdict"].startswith("cannot") == g["verdict"].startswith("cannot")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "0.5", b"1", {"score": 1}, object(), np.array([np.nan]), [1, "x"], torch.tensor([1.0, float("nan")])])
def test_what_is_no_score_is_refused_by_item(bad):
    for call in (lambda: summarise_metric([1, 0, bad]), lambda: clustered_interval([1, 0, bad], [1, 2, 3]), lambda: compare([1, 0, bad], [1, 0, [1, 1] if isinstance(bad, (list, torch.Tensor)) else 1])):
        with pytest.raises(UserError, match="item 2"):
            call()


def test_arrays_and_tensors_are_taken_as_lists():
    values = [1.0, 0.5, 0.25, 0.0]
    assert summarise_metric(values) == summarise_metric(np.array(values)) == summarise_metric(torch.tensor(values)) == summarise_metric(tuple(values))
    rows = [[1, 0], [1, 1], [0, 0]]
    assert summarise_metric(rows) == summarise_metric(np.array(rows)) == summarise_metric(torch.tensor(rows))
    assert compare(rows, rows[::-1]) == compare(np.array(rows), torch.tensor(rows[::-1]))
    assert summarise_metric(rows, np.array(["x", "y", "z"])) == summarise_metric(rows, ["x", "y", "z"]) == summarise_metric(rows)


def test_edges_of_a_summary():
    method = lambda *a: summarise_metric(*a)["method"]
    assert method([1, 0]) == "Wilson" and method([0.5, 1]) == "Student's t" and method([[1, 0], [1, 1]]) == "Wilson, 2 clusters"
    assert method([0.5, 1, 1], ["a", "a", "b"]) == "Student's t, 2 clusters"
    assert [method(v) for v in ([], [None], [0.5], [[0.5, 1]], [[1, 1]])] == ["none: no scores", "none: no scores", "none: one score", "none: one cluster", "none: one cluster"]
    assert summarise_metric([1])["low"] == rate(1, 1)["low"] and summarise_metric([0.5, 0.5])["low"] is None and method([0.5, 0.5]) == method([[0.25, 0.5]] * 3) == "none: no spread"
    for rows in ([[1, 1, 0]] * 3, [[1, 0, 0]] * 7, [[1, 1, 1, 0, 0, 1, 0]] * 9):      # equal means, which rounding hides: as many observations as items
        n, k = len(rows), len(rows) * sum(rows[0]) / len(rows[0])
        low, high = wilson(k, n, t_quantile(0.975, n - 1))
        f = summarise_metric(rows)
        assert (f["low"], f["high"]) == pytest.approx((low, high))
    sure = summarise_metric([1] * 100, [i // 10 for i in range(100)])            # ten clusters without an error are no more than ten observations
    assert sure["high"] == 1 and sure["low"] < rate(10, 10)["low"]


def test_p_values_of_clusters_and_of_no_spread():
    a, b = [[1, 0], [1, 1], [0, 1], [1, 1], [0, 0]], [[0, 0], [1, 0], [0, 1], [1, 1], [0, 1]]
    known = clustered_interval([[x - y for x, y in zip(s, t)] for s, t in zip(a, b)])
    assert compare(a, b)["p"] == pytest.approx(t_tail(known["value"] / known["se"], 4)) and known["value"] == pytest.approx(0.1)
    few, many = compare([0.3, 0.3], [0.2, 0.2]), compare([0.3] * 10, [0.2] * 10)      # no spread: each item is one vote, no more
    assert (few["p"], few["verdict"][:11]) == (0.5, "cannot tell") and (many["p"], many["verdict"]) == (2 / 1024, "A is better")


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), "0.5", [1, 0], {"score": 1}, torch.tensor([1.0, 2.0]), np.array([1.0])], ids=repr)
@pytest.mark.parametrize("call", [t_interval, mean_interval, lambda v: paired_difference(v, [1, 2, 3]), lambda v: paired_difference([1, 2, 3], v), lambda v: win_rate(v, [1, 2, 3]),
                                  lambda v: unpaired_difference(v, [1, 2, 3]), lambda v: unpaired_difference([1, 2, 3], v)])
def test_what_is_no_number_is_refused_by_item(call, bad):
    with pytest.raises(UserError, match="item 1 .*summarise_metric"):
        call([1, bad, 0])


def test_a_rate_needs_a_count_from_0_to_n():
    assert rate(2.5, 5)["value"] == 0.5 and rate(0.1 + 0.2 + 0.7, 1)["high"] == 1
    assert isinstance(rate(1 + 1e-12, 1)["low"], float) and rate(-1e-12, 3)["value"] == 0
    for k, n in ((5, 3), (-1, 3), (1, 0), (math.nan, 3)):
        with pytest.raises(UserError, match="from 0 to n"):
            rate(k, n)


def test_messages_of_the_rest():
    for call, words in ((lambda: win_rate([1], []), "same items"), (lambda: mcnemar([2], [1]), "item 0"), (lambda: items_needed(-1, sd=1), "above 0"),
                        (lambda: items_needed(0.1), "give one"), (lambda: unpaired_difference([1, 1], [2, 2]), "different scores"), (lambda: holm([2]), "between 0 and 1"),
                        (lambda: compare([1, 2], [1, 2], [1]), "2 items and 1 groups"), (lambda: compare([[1]], [[1, 2]]), "item 0")):
        with pytest.raises(UserError, match=words):
            call()


def test_large_suites_are_quick():
    import time
    begin, n = time.process_time(), 14042
    right = [i % 10 < 7 for i in range(n)]
    assert summarise_metric(right, [i // 247 for i in range(n)])["n"] == compare(right, right[::-1])["n"] == n
    assert paired_difference(right, right[::-1], resamples=200)["n"] == n
    assert time.process_time() - begin < 5


def test_the_four_models_of_gsm8k_are_as_recorded(testdata):
    "The published file gives the patterns of the record."
    from pathlib import Path
    record = json.loads((Path(__file__).parent.parent / "data" / "runs" / "intervals.json").read_text())["figures"]["gsm8k"]
    rows = [r for _, r in read_rows(testdata / "eval" / "gsm8k" / "example_model_solutions_a.jsonl")]
    names = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
    assert Counter("".join(str(int(r[m]["is_correct"])) for m in names) for r in rows) == record["patterns"]
    assert sum(record["patterns"].values()) == 350
