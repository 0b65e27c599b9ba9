"""Mixing holds what its chapter promises, for sources, weights and cuts that a machine chooses."""
import gzip
import json
import random
import tracemalloc
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.reading import DataError, UserError, write_jsonl
from llm_course.mixing import (effective_epochs, epochs_per_source, mix, mix_table, mixture_table, shard_stream, shuffle_buffer, stream_mix, temperature_weights,
                               unimax_weights)

SOURCES = st.lists(st.lists(st.text(max_size=40), min_size=1, max_size=12), min_size=1, max_size=5)
WEIGHTS = st.lists(st.floats(0.01, 10), min_size=5, max_size=5)
SIZES = st.dictionaries(st.text(min_size=1, max_size=8), st.floats(1e-3, 1e12), min_size=1, max_size=8)
relaxed = settings(max_examples=100, deadline=None, derandomize=True)


def documents(texts: list[list[str]]) -> dict[str, list[dict]]:
    return {f"s{k}": [{"id": f"{k}-{i}", "source": f"s{k}", "text": t} for i, t in enumerate(ts)] for k, ts in enumerate(texts)}


def size(doc: dict) -> int:
    return len(doc["text"].encode("utf-8", "surrogatepass"))


def strays(docs: list[dict], shares: dict[str, float]) -> dict[str, float]:
    "For each source: how far a prefix is from its share at most."
    read, worst = dict.fromkeys(shares, 0), dict.fromkeys(shares, 0.0)
    for d in docs:
        read[d["source"]] += size(d)
        for s, w in shares.items():
            worst[s] = max(worst[s], abs(read[s] - w * sum(read.values())))
    return worst


def bound(sources: dict, shares: dict[str, float], s: str) -> float:
    longest = {o: max(map(size, sources[o])) for o in shares}
    return (1 - shares[s]) * longest[s] + shares[s] * sum(n for o, n in longest.items() if o != s)


@relaxed
@given(SIZES, st.floats(-2, 3), st.floats(1e-3, 1e13), st.floats(0.01, 100))
def test_weights_sum_to_one_and_unimax_keeps_its_limit(sizes, alpha, budget, limit):
    for shares in (temperature_weights(sizes, alpha), unimax_weights(sizes, budget, limit)):
        assert abs(sum(shares.values()) - 1) < 1e-9 and all(w >= 0 for w in shares.values())
    within = min(budget, limit * sum(sizes.values()))
    assert all(e <= limit * (1 + 1e-9) for e in epochs_per_source(sizes, unimax_weights(sizes, budget, limit), within).values())
    assert len(mixture_table(sizes, temperature_weights(sizes, 0.3), budget).splitlines()) > len(sizes)


@relaxed
@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_more_readings_are_worth_more_and_never_more_than_new_text(a, b):
    low, high = sorted((a, b))
    assert effective_epochs(low) <= effective_epochs(high) <= high * (1 + 1e-9) + 1e-9


@relaxed
@given(SOURCES, WEIGHTS, st.integers(1, 3000), st.integers(0, 9), st.sampled_from([None, 0.5, 1, 3]))
def test_a_mix_has_its_shares_in_every_prefix(texts, raw, budget, seed, limit):
    sources = {s: ds for s, ds in documents(texts).items() if sum(map(size, ds))}
    if not sources:
        return
    docs, report = mix(sources, dict(zip(sources, raw)), budget, seed=seed, max_epochs=limit)
    rows, filled = report["sources"], sum(r["target"] for r in report["sources"].values())
    shares = {s: r["target"] / filled for s, r in rows.items()}   # what a limit leaves of the weights
    assert abs(filled + report["shortfall"] - budget) < 1e-6 * budget
    for s, stray in strays(docs, shares).items():
        assert stray <= bound(sources, shares, s) / 2 + 1e-6
        assert abs(rows[s]["taken"] - rows[s]["target"]) <= max(map(size, sources[s])) / 2 + 1e-6
    assert docs == mix(sources, dict(zip(sources, raw)), budget, seed=seed, max_epochs=limit)[0]
    assert len(mix_table(report).splitlines()) == len(sources) + 2


@relaxed
@given(SOURCES, WEIGHTS, st.lists(st.integers(0, 25), max_size=3), st.integers(0, 9), st.sampled_from([None, 1, 2]))
def test_a_stream_goes_on_where_it_stopped(texts, raw, cuts, seed, epochs):
    "Stopped several times, each time through JSON, by a mixer made anew."
    sources = documents(texts)
    make = lambda state=None: stream_mix(sources, dict(zip(sources, raw)), seed=seed, max_epochs=epochs, state=state)
    whole, got, mixer = list(islice(make(), 120)), [], make()
    for cut in cuts:
        got += islice(mixer, cut)
        mixer = make(json.loads(json.dumps(mixer.state_dict())))
    got += islice(mixer, 120 - len(got))
    assert got == whole


@relaxed
@given(SOURCES, WEIGHTS, WEIGHTS, st.integers(0, 30), st.integers(0, 20), st.integers(0, 9))
def test_new_weights_read_on_and_can_be_resumed(texts, raw, new, cut, later, seed):
    sources = {s: ds for s, ds in documents(texts).items() if sum(map(size, ds))}
    if not sources:
        return
    first, last = dict(zip(sources, raw)), dict(zip(sources, new))
    mixer = stream_mix(sources, first, seed=seed, max_epochs=None)
    before = list(islice(mixer, cut))
    mixer = mixer.reweighted(last)
    after = list(islice(mixer, later))
    for s, ds in sources.items():     # the documents of a source come in its own order, whatever the weights were
        mine = [d for d in before + after if d["source"] == s]
        assert mine == [ds[i % len(ds)] for i in range(len(mine))]
    for s, stray in strays(after, mixer.shares).items():
        assert stray <= bound(sources, mixer.shares, s) + 1e-6
    again = stream_mix(sources, last, seed=seed, max_epochs=None, state=json.loads(json.dumps(mixer.state_dict())))
    assert list(islice(again, 30)) == list(islice(mixer, 30))


@relaxed
@given(st.lists(st.integers(), max_size=200), st.integers(0, 60), st.integers(0, 5))
def test_a_buffer_keeps_every_row(rows, held, seed):
    out = list(shuffle_buffer(enumerate(rows), held, random.Random(seed)))
    assert sorted(out) == list(enumerate(rows))
    assert all(i - place <= held for place, (i, _) in enumerate(out))
    assert held or out == list(enumerate(rows))


def test_a_buffer_is_lazy():
    assert len(list(islice(shuffle_buffer(iter(int, 1), 10, random.Random(0)), 100))) == 100


def test_shards_of_any_kind_are_read_once_an_epoch_and_resumed(tmp_path):
    for k in range(4):
        write_jsonl(tmp_path / "a" / f"{k}.jsonl", ({"id": f"{k}-{i}", "text": "word " * (i + 1)} for i in range(30)))
    with gzip.open(tmp_path / "a" / "z.jsonl.gz", "wt") as f:
        f.writelines(json.dumps({"id": f"z-{i}", "text": "zip"}) + "\n" for i in range(30))
    source = shard_stream(tmp_path / "a", seed=1, buffer=20)
    first, second = ([d["id"] for d in source(epoch)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) and len(set(first)) == 150 and first != second
    assert first == [d["id"] for d in shard_stream(tmp_path / "a", seed=1, buffer=20)(0)] != [d["id"] for d in shard_stream(tmp_path / "a", seed=2, buffer=20)(0)]
    plain = [d["id"].split("-") for d in shard_stream(tmp_path / "a", buffer=0)(0)]
    assert all(int(i) == n % 30 for n, (_, i) in enumerate(plain))     # whole files, as they stand
    make = lambda state=None: stream_mix({"a": source, "b": [{"id": "b", "text": "b" * 50}]}, {"a": 1, "b": 1}, max_epochs=None, state=state)
    mixer = make()
    list(islice(mixer, 700))
    assert list(islice(make(mixer.state_dict()), 200)) == list(islice(mixer, 200))


def test_a_long_stream_is_held_one_document_at_a_time(tmp_path):
    def endless(epoch):
        return ({"text": "x" * 10_000} for _ in range(4_000))
    tracemalloc.start()
    read = sum(size(d) for d in stream_mix({"a": endless, "b": endless}, {"a": 0.7, "b": 0.3}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == 80_000_000 and peak < 500_000


@pytest.mark.parametrize("call, says", [
    (lambda: temperature_weights({"a": -1}), "'a': -1"), (lambda: unimax_weights({"a": 1}, 1, 0), "max_epochs=0"), (lambda: effective_epochs(float("nan")), "nan"),
    (lambda: mix({"a": [{"text": None}]}, {"a": 1}, 1), "string `text`"), (lambda: next(stream_mix({"a": [{}]}, {"a": 1})), "fields: none"),
    (lambda: stream_mix({"a": []}, {"a": 1}, state={"epoch": {}}), "no state"), (lambda: stream_mix({"a": []}, {"a": 1}).reweighted({"b": 1}), "unknown sources"),
    (lambda: mix({"a": [{"text": "x"}]}, {"a": 1}, 5, max_epochs=0), "max_epochs=0")])
def test_errors_say_what_was_met(call, says):
    with pytest.raises(UserError, match=says.replace("(", r"\(")):
        call()


def test_no_shards_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no data file"):
        shard_stream(tmp_path)
