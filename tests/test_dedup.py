"""Near-duplicates: shards, other libraries, arbitrary text, time that grows with the size, and labelled sets."""
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course import dedup
from llm_course.dedup import (candidate_groups, contamination, deduplicate, drop_repeated_lines, exact_duplicates, hamming, jaccard, match_signatures,
                              near_duplicates, normalise, shingles, signatures, simhash, text_digest, words_of)


def corpus(n: int, copies: int, seed: int = 0, words: int = 150) -> list[dict]:
    "Texts of random words, and near copies of some of them with a few words exchanged, shuffled."
    rng = random.Random(seed)
    lexicon = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)]
    texts = [rng.choices(lexicon, k=words) for _ in range(n)]
    for t in rng.choices(texts[:n], k=copies):
        texts.append(t[:])
        for _ in range(rng.randint(0, 5)):
            texts[-1][rng.randrange(words)] = rng.choice(lexicon)
    rng.shuffle(texts)
    return [{"id": f"d{i}", "text": " ".join(t)} for i, t in enumerate(texts)]


@pytest.fixture(scope="module")
def docs():
    return corpus(1500, 500)


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_shards_give_the_same_decisions(docs, shards):
    texts = [d["text"] for d in docs]
    keys = np.concatenate([signatures(part) for part in (texts[i * len(texts) // shards:(i + 1) * len(texts) // shards] for i in range(shards))])
    found = match_signatures(keys, lambda i: texts[i])
    assert {docs[i]["id"]: docs[k]["id"] for i, k in found.items()} == near_duplicates(docs)
    assert len(found) > 300


def test_groups_name_exactly_the_documents_that_share_a_key(docs):
    keys = signatures([d["text"] for d in docs[:300]])
    groups = candidate_groups(keys)
    for b in range(keys.shape[1]):
        same, grouped = keys[:, b, None] == keys[:, b], groups[:, b, None] == groups[:, b]
        np.fill_diagonal(same, False)
        alone = groups[:, b] < 0
        assert ((same.any(1)) == ~alone).all()
        assert (same[~alone] == (grouped & ~np.eye(300, dtype=bool))[~alone]).all()
    bands_of = [set(groups[:, b][groups[:, b] >= 0]) for b in range(keys.shape[1])]
    assert len(set().union(*bands_of)) == sum(map(len, bands_of))


def test_each_dropped_document_is_similar_to_one_that_stays(docs):
    for prefer in (None, lambda d: len(d["text"]), lambda d: -len(d["text"])):
        kept, report = deduplicate(docs, prefer=prefer)
        text, stay = {d["id"]: d["text"] for d in docs}, {d["id"] for d in kept}
        assert [d["id"] for d in docs if d["id"] in stay] == [d["id"] for d in kept]
        for gone, kept_id in report["kept_for"].items():
            assert kept_id in stay and gone not in stay
            assert normalise(text[gone]) == normalise(text[kept_id]) or jaccard(shingles(text[gone]), shingles(text[kept_id])) >= 0.8
            if prefer and gone in report["removed_ids"]["near_duplicate"]:
                assert prefer({"text": text[kept_id]}) >= prefer({"text": text[gone]})
        assert deduplicate(kept, prefer=prefer)[0] == kept


texts = st.text(max_size=200) | st.text(alphabet="ab \n.É\ud800", max_size=60)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(texts, max_size=8))
def test_arbitrary_text(raw):
    docs = [{"id": i, "text": t} for i, t in enumerate(raw)]
    kept, report = deduplicate(docs)
    assert deduplicate(kept)[0] == kept and report["documents_out"] == len(kept)
    for unit in ("line", "paragraph"):
        once = drop_repeated_lines(docs, unit=unit, min_words=1)[0]
        assert drop_repeated_lines(once, unit=unit, min_words=1)[0] == once
    for t in raw:
        assert normalise(normalise(t)) == normalise(t) and len(text_digest(t)) == 16
        assert 0 <= simhash(t) < 2**64 and hamming(simhash(t), simhash(t)) == 0
        assert jaccard(shingles(t), shingles(t)) == bool(words_of(t))
    exact_duplicates(docs), contamination(docs, raw, n=3, min_words=1)


@pytest.mark.parametrize("unit", ["a ", "<", "\\", "((", "{", "\n", "é", "<a ", "a", "\n \n", "word word\n\n"])
def test_time_grows_with_the_size(unit):
    def seconds(size):
        doc = [{"id": 0, "text": unit * (size // len(unit))}]
        start = time.perf_counter()
        deduplicate(doc * 1), drop_repeated_lines(doc, unit="paragraph"), drop_repeated_lines(doc), contamination(doc, ["a " * 50]), simhash(doc[0]["text"])
        return time.perf_counter() - start
    small, large = (min(seconds(n) for _ in range(2)) for n in (1_000_000, 2_000_000))
    assert small < 4 and large < 3.5 * small + 0.2
