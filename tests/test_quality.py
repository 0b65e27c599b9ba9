"""Perplexity, quality classifier and toxicity: any text, linear time, and real labelled sets."""
import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.classifier import QualityClassifier, auc, bootstrap_interval, calibration_error, filter_by_quality, kept_curve, reliability
from llm_course.reading import UserError
from llm_course.quality import KneserNey, filter_by_perplexity, lm_tokens, perplexity_buckets, spearman, tag_perplexity
from llm_course.toxicity import WordList, best_threshold, f1, masked, plain_spelling, word_hash
from timing import assert_linear, cpu_seconds

ANY = st.text(max_size=80)  # lone surrogates among it
MODEL = KneserNey(1).fit(["the hen sees the dog", "the dog sees the hen"])
WORDS, CHARS = (QualityClassifier(10, a).fit(["good text", "bad one"] * 4, [1, 0] * 4) for a in ("word", "char"))
LIST = WordList.of(["stupid", "nonsense", "é"])
fuzz = settings(max_examples=60, deadline=None, derandomize=True)


@fuzz
@given(st.lists(ANY, max_size=5))
def test_any_text_has_a_score(texts):
    assert np.isfinite(MODEL.perplexities(texts)).all() and len(MODEL.perplexities(texts)) == len(texts)
    for classifier in (WORDS, CHARS):
        p = classifier.predict(texts)
        assert len(p) == len(texts) and ((p > 0) & (p < 1)).all()
    docs = [{"text": t, "source": "s"} for t in texts]
    assert len(tag_perplexity(docs, MODEL.perplexities)) == len(docs)
    kept, report = filter_by_perplexity(docs, [{"text": "a b"}], 0.5)
    assert len(kept) + report["removed"]["high_perplexity"] == len(docs)
    kept, report = filter_by_quality(docs, WORDS.predict, 0.5)
    assert len(kept) + report["removed"]["low_quality"] == len(docs)


@fuzz
@given(st.lists(ANY, min_size=1, max_size=5), ANY, st.booleans())
def test_distributions_sum_to_one(texts, context, fold):
    try:
        model = KneserNey(1, fold).fit(texts)
    except UserError:
        assert not any(lm_tokens(t) for t in texts)
        return
    assert abs(model.distribution(context).sum() - 1) < 1e-9


@fuzz
@given(ANY, st.text(alphabet="stupid 5!@$-ÉéNONSEnse", max_size=60))
def test_masking(any_text, close):
    for text in (any_text, close, any_text + " stupid"):
        once = LIST.mask(text)
        assert len(once) == len(text) and LIST.mask(once) == once
        assert 0 <= LIST.score([text])[0] <= 1
        for start, end in LIST.find(text):
            assert text[start:end] in LIST
    word_hash(any_text), plain_spelling(any_text)
    assert len(masked(any_text)) == len(any_text)


scores = st.lists(st.floats(-5, 5), min_size=1, max_size=30)


@fuzz
@given(scores, st.integers(0, 2**30))
def test_rankings(values, bits):
    labels = [bits >> i & 1 for i in range(len(values))]
    assert np.isnan(auc(labels, values)) or abs(auc(labels, values) + auc(labels, [-v for v in values]) - 1) < 1e-9
    curve = kept_curve(labels, values)
    assert curve["kept"][-1] == 1 and (np.diff(curve["recall"]) >= 0).all()
    best = best_threshold(labels, values)
    assert f1(labels, np.asarray(values) >= best) >= max(f1(labels, np.asarray(values) >= v) for v in values) - 1e-12
    r = spearman(values, values)
    assert np.isnan(r) or abs(r - 1) < 1e-9
    p = 1 / (1 + np.exp(-np.asarray(values)))
    assert 0 <= calibration_error(labels, p) <= 1 and sum(b["n"] for b in reliability(labels, p)) == len(values)
    assert len(perplexity_buckets(values)) == len(values)
    found = bootstrap_interval(np.mean, values, resamples=20)
    assert found["low"] <= found["high"]


@pytest.mark.parametrize("piece", ["a ", "<", "\\", "((", "{", "\n", "é", "<a ", "5tup1d!", "$$@"])
def test_linear_time(piece):
    for f in (lambda t: MODEL.perplexities([t]), lambda t: WORDS.predict([t]), lambda t: LIST.mask(t), plain_spelling, lambda t: CHARS.predict([t])):
        assert_linear(lambda n: cpu_seconds(f, piece * (n // len(piece))), 1_000_000)


def test_the_bundled_list_holds_hashes_only():
    from llm_course.course import data_path
    lines = data_path("rude_words.txt").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("#") or (len(line) == 16 and set(line) <= set("0123456789abcdef")) for line in lines)


def test_human_labels(testdata):
    rows = [json.loads(line) for line in (testdata / "web/dclm_quality_labels.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = [r["label"] for r in rows]
    assert auc(labels, [len(r["text"]) for r in rows]) > 0.7  # why length belongs into the table
    half = len(rows) // 2
    learned = QualityClassifier().fit([r["text"] for r in rows[:half]], labels[:half]).predict([r["text"] for r in rows[half:]])
    assert auc(labels[half:], learned) > 0.7


def test_toxic_words_are_found(testdata):
    with open(testdata / "toxicity/surge_toxicity_en.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    assert auc([r["is_toxic"] == "Toxic" for r in rows], WordList.bundled().score([r["text"] for r in rows])) > 0.6
