"""The scaling law: fits of made-up runs of any constants, the best size against a search, the knob against real models, and the record of the measured runs"""
import json
import math
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.counting import count_parameters
from llm_course.model import Transformer
from llm_course.packing import TokenRows, write_tokens
from llm_course.reading import UserError
from llm_course.scaling import Law, bootstrap, compute_optimal, fit_law, interval, isoflop_minima, knob, power_law, predict
from llm_course.trainer import seed_all

ROOT = Path(__file__).resolve().parents[1]
laws = st.builds(Law, E=st.floats(0.5, 3), A=st.floats(10, 2000), B=st.floats(10, 5000), alpha=st.floats(0.2, 0.8), beta=st.floats(0.2, 0.8))


def runs_of(law: Law, noise: float = 0.0, seed: int = 0, n: int = 7, levels=(1e12, 1e13, 1e14, 1e15)) -> list[dict]:
    rng = np.random.default_rng(seed)
    sizes = [(c, compute_optimal(law, c)[0] * f) for c in levels for f in np.geomspace(1 / 6, 6, n)]
    return [{"level": c, "parameters": s, "tokens": c / 6 / s, "loss": law.loss(s, c / 6 / s) * math.exp(noise * rng.standard_normal())} for c, s in sizes]


@given(laws, st.floats(1e10, 1e25))
@settings(max_examples=60, deadline=None)
def test_the_best_size_is_that_of_a_search(law, flops):
    N, D = compute_optimal(law, flops)
    assert math.isclose(6 * N * D, flops, rel_tol=1e-9)
    around = N * np.geomspace(0.25, 4, 2001)
    assert abs(math.log(around[law.loss(around, flops / 6 / around).argmin()] / N)) < 0.01


@given(laws)
@settings(max_examples=5, deadline=None)
def test_exact_points_give_back_the_loss_of_any_law(law):
    "Constants that hardly touch the loss cannot be found again; what the law says of a point between and beyond the runs can."
    found = fit_law(runs_of(law))
    for N, D in ((compute_optimal(law, c)) for c in (3e12, 3e14, 1e16)):
        assert math.isclose(found.loss(N, D), law.loss(N, D), rel_tol=1e-3)


def test_intervals_hold_what_they_promise():
    "Of four sets of noisy runs, most intervals have the true exponent of the best size and the true loss of a larger run in them."
    law, hits, told = Law(1.5, 200, 800, 0.35, 0.4), 0, 0
    N, D = compute_optimal(law, 4e15)
    for seed in range(4):
        runs = runs_of(law, 0.005, seed)
        fitted, resampled = fit_law(runs), bootstrap(runs, 30)
        low, high = interval([w.beta / (w.alpha + w.beta) for w in resampled])
        hits += low <= law.beta / (law.alpha + law.beta) <= high
        p = predict(fitted, resampled, runs, N, D)
        told += p["low"] <= law.loss(N, D) <= p["high"]
    assert hits >= 3 and told >= 3


def test_the_order_of_the_runs_does_not_matter():
    runs = runs_of(Law(1.5, 200, 800, 0.35, 0.4), 0.01)
    a, b = fit_law(runs), fit_law(runs[::-1])
    for x, y in zip(vars(a).values(), vars(b).values()):
        assert math.isclose(x, y, rel_tol=1e-3)


@given(st.floats(1e-3, 1e3), st.floats(-3, 3))
@settings(max_examples=50, deadline=None)
def test_a_power_law_is_found_again(c, p):
    x = np.geomspace(1, 1e4, 9)
    found = power_law(x, c * x**p)
    assert math.isclose(found[0], c, rel_tol=1e-6) and math.isclose(found[1], p, abs_tol=1e-6)


@given(st.integers(1, 40), st.sampled_from([16, 32, 64, 128]), st.floats(1, 200), st.floats(0.5, 8))
@settings(max_examples=60, deadline=None)
def test_every_plan_of_the_knob_holds_together(depth, width, per_parameter, factor):
    try:
        p = knob(depth, 1024, width, 256, per_parameter, factor)
    except UserError as e:
        assert "too few to learn from" in str(e)
        return
    assert p.model.dim == depth * width and p.model.n_heads == depth and p.parameters == count_parameters(p.model)["total"]
    assert p.tokens == p.train.steps * p.train.batch_size * 256
    assert abs(p.tokens / (per_parameter * p.parameters) - 1) <= 0.5 / (p.train.steps - 0.5) + 1e-9
    assert p.train.batch_size * 256 == pytest.approx(factor * math.sqrt(per_parameter * p.parameters), abs=128) or p.train.batch_size == 1
    assert 0 < p.train.lr < 1


def test_the_knob_grows_in_everything_but_the_learning_rate():
    plans = [knob(d) for d in range(2, 27)]
    for a, b in zip(plans, plans[1:]):
        assert b.parameters > a.parameters and b.tokens > a.tokens and b.flops > a.flops and b.train.batch_size >= a.train.batch_size and b.train.lr < a.train.lr


@pytest.mark.parametrize("bad", [dict(depth=0), dict(depth=1.5), dict(depth="8"), dict(depth=4, width=3), dict(depth=4, tokens_per_parameter=-1), dict(depth=4, batch_factor=math.nan),
                                 dict(depth=4, optimizer="sgd"), dict(depth=4, lr=-1), dict(depth=4, context=0)])
def test_nonsense_is_refused_with_a_remedy(bad):
    with pytest.raises(UserError):
        knob(**bad)


@pytest.mark.parametrize("change, words", [({"loss": math.inf}, "run 3"), ({"loss": 0}, "run 3"), ({"tokens": -5}, "run 3")])
def test_a_failed_run_is_named(change, words):
    runs = runs_of(Law(1.5, 200, 800, 0.35, 0.4))
    runs[3] = runs[3] | change
    with pytest.raises(UserError, match=words):
        fit_law(runs)


LAW = Law(1.5, 200, 800, 0.35, 0.4)
RUNS = runs_of(LAW)
ODD = {
    "no runs": (lambda: fit_law([]), "0 runs"), "one size": (lambda: fit_law([r | {"parameters": 1e6} for r in RUNS]), "1 sizes.*at least 6 runs"),
    "one ratio": (lambda: fit_law([r | {"tokens": 20 * r["parameters"]} for r in RUNS]), "several sizes for one budget"),
    "a word for a loss": (lambda: fit_law([*RUNS, RUNS[0] | {"loss": "x"}]), "run 28 is .*mend its record"), "no loss": (lambda: fit_law([*RUNS, RUNS[0] | {"loss": None}]), "run 28 is"),
    "an empty run": (lambda: fit_law([*RUNS, {}]), "run 28 is {}"), "a list": (lambda: fit_law([*RUNS, [1]]), r"run 28 is \[1\]"), "a number": (lambda: fit_law([*RUNS, 3]), "run 28 is 3"),
    "delta 0": (lambda: fit_law(RUNS, delta=0), "delta=0"), "delta nan": (lambda: fit_law(RUNS, delta=math.nan), "delta=nan"), "times": (lambda: bootstrap(RUNS, 2.5), "times=2.5"),
    "interval of nothing": (lambda: interval([]), "0 values"), "interval of nan": (lambda: interval([1, math.nan]), "finite"), "level": (lambda: interval([1, 2], 95), "level=95"),
    "no level": (lambda: isoflop_minima([{"parameters": 1, "loss": 2}]), "run 0 is .*level, parameters, loss"), "no size": (lambda: isoflop_minima(RUNS, size="N"), "level, N, loss"),
    "nan in a level": (lambda: isoflop_minima([*RUNS, RUNS[0] | {"loss": math.nan}]), "run 28 has.*loss=nan"), "size 0": (lambda: isoflop_minima([*RUNS, RUNS[0] | {"parameters": 0}]), "run 28 has"),
    "level 0": (lambda: isoflop_minima([r | {"level": 0} for r in RUNS]), "run 0 has level=0"), "no parabola": (lambda: isoflop_minima(RUNS[:3]), "four sizes"),
    "no laws": (lambda: predict(LAW, [], RUNS, 1e6, 1e8), "no resampled laws"), "no parameters": (lambda: predict(LAW, [LAW], RUNS, 0, 1e8), "above 0"),
    "no tokens": (lambda: LAW.loss(1e6, np.array([1e6, 0])), "above 0"), "no budget": (lambda: compute_optimal(LAW, 0), "flops=0"), "endless budget": (lambda: compute_optimal(LAW, math.inf), "flops=inf"),
    "words": (lambda: power_law(["a"], [1]), "lists of numbers"), "two dimensions": (lambda: power_law([[1, 2], [3, 4]], [1, 2]), "a line needs"), "numbers alone": (lambda: power_law(3, 4), "a line needs"),
    "tokens": (lambda: knob(4, tokens="1e9"), "tokens=1e9"), "per parameter": (lambda: knob(4, tokens_per_parameter="20"), "must be a number"), "context": (lambda: knob(4, context=100.5), "context=100.5"),
}


@pytest.mark.parametrize("call, words", ODD.values(), ids=ODD)
def test_odd_input_is_refused_in_words(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_runs_may_come_one_by_one():
    assert fit_law(r for r in RUNS) == fit_law(RUNS)


def test_a_level_that_is_almost_a_line_has_no_vertex():
    "Its parabola has one far beyond the largest number; the best run stands in for it."
    found = isoflop_minima([{"level": 1e12, "parameters": 1e5 * 2**i, "loss": 3 - 0.1 * i + 1e-7 * i * i} for i in range(5)])[0]
    assert not found["inside"] and found["parameters"] == pytest.approx(1.6e6)


def test_parabolas_find_the_vertex_of_the_law():
    "On a narrow range around the best size the parabola's vertex is the best size of the law."
    law = Law(1.5, 200, 800, 0.35, 0.4)
    levels = (1e12, 1e14)
    runs = [{"level": c, "parameters": n, "loss": law.loss(n, c / 6 / n)} for c in levels for n in compute_optimal(law, c)[0] * np.geomspace(0.7, 1.4, 5)]
    for m in isoflop_minima(runs):
        assert m["inside"] and math.isclose(m["parameters"], compute_optimal(law, m["level"])[0], rel_tol=0.02)


def test_a_benchmark_run_is_what_its_row_says(tmp_path, monkeypatch):
    "One small run of the benchmark on made-up tokens: it trains what the knob says, and a second call of the book does not train again."
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling
    from llm_course.tokenizer import train_tokenizer
    tokenizer = train_tokenizer(["the cat sat on the mat"], 300)
    tokenizer.save(tmp_path / "tokenizer")
    for name, n in (("train", 300), ("village", 30), ("docs", 30)):
        seed_all(n)
        write_tokens(tmp_path / f"{name}.bin", ([tokenizer.bos_id, *torch.randint(10, 30, (99,)).tolist()] for _ in range(n)), len(tokenizer))
    (tmp_path / "corpus.json").write_text(json.dumps({"bytes": {"village": 3, "docs": 1}, "tokens": 30_000, "vocab_size": 300}))
    book, shape, level = scaling.Book(tmp_path), (1, 16), 6 * 8000 * 6000.0
    row = book.run("grid", shape, level)
    plan = scaling.plan_of(shape, level, len(tokenizer))
    assert (row["parameters"], row["tokens"], row["steps"]) == (plan.parameters, plan.tokens, plan.train.steps)
    assert row["parameters"] == sum(p.numel() for p in Transformer(plan.model).parameters()) and row["flops"] == plan.flops
    assert row["loss"] == pytest.approx((3 * row["by_source"]["village"] + row["by_source"]["docs"]) / 4, abs=1e-4) and 2.5 < row["loss"] < math.log(300)
    monkeypatch.setattr(scaling, "one_run", lambda *a, **k: pytest.fail("trained twice"))
    assert scaling.Book(tmp_path).run("grid", shape, level) == row
    assert len(TokenRows(tmp_path / "train.bin", 128, tokenizer.bos_id)) == 30_000 // 128


def test_the_benchmark_predicts_before_it_trains(tmp_path, monkeypatch):
    "The order of the whole program, with a law in place of training: levels, then the prediction in a file, then the larger run, and nothing twice."
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling
    law, made, corpus = Law(1.0, 300, 900, 0.4, 0.45), [], {"vocab_size": 1024, "tokens": 10_000_000}

    def one_run(folder, shape, level, lr=0.0, seed=0, optimizer="muon"):
        plan, file = scaling.plan_of(shape, level, 1024, lr, seed), folder / "prediction.json"
        made.append((shape, level, file.exists()))
        row = {"depth": shape[0], "width": shape[1], "parameters": plan.parameters, "tokens": plan.tokens, "level": level, "lr": plan.train.lr, "steps": plan.train.steps, "seed": seed,
               "loss": law.loss(plan.parameters, plan.tokens), "seconds": 0.0, "cpu_seconds": 0.0}
        return row

    monkeypatch.setattr(scaling, "one_run", one_run)
    settings = scaling.FULL | {"resamples": 20}
    book = scaling.Book(tmp_path)
    scaling.grid(book, settings, corpus)
    assert not any(told for *_, told in made) and len(made) == len(set(made)) + len(settings["seeds_of"])
    found = scaling.larger(book, settings, corpus)
    assert made[-1][2] and made[-1][1] == settings["larger"]
    assert found["prediction"]["loss"] == pytest.approx(found["outcome"]["loss"], rel=2e-3)
    n = len(made)
    again = scaling.Book(tmp_path)
    scaling.grid(again, settings, corpus)
    assert scaling.larger(again, settings, corpus) == found and len(made) == n


def test_the_record_was_predicted_before_it_was_measured():
    figures = json.loads((ROOT / "data" / "runs" / "scaling.json").read_text())["figures"]
    told, outcome, runs = figures["prediction"], figures["outcome"], figures["runs"]
    assert datetime.fromisoformat(told["written"]) <= datetime.fromisoformat(outcome["began"])
    assert outcome["level"] >= 2 * max(r["level"] for r in runs) and (told["parameters"], told["tokens"]) == (outcome["parameters"], outcome["tokens"])
    assert max(r["tokens"] for r in [*runs, outcome]) <= figures["corpus"]["tokens"], "a token was read twice"
    assert len({r["parameters"] for r in runs}) >= 5
    for r in [*runs, outcome]:
        assert r["steps"] >= figures["settings"]["min_steps"] and math.isclose(6 * r["parameters"] * r["tokens"] / r["level"], 1, rel_tol=0.02)
