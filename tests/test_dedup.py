"""Near-duplicates: shards, other libraries, arbitrary text, time that grows with the size, and labelled sets."""
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.dedup import (candidate_groups, containment, contamination, decontaminate, deduplicate, drop_repeated_lines, exact_duplicates, hamming,
                              jaccard, lined_up, lsh_probability, match_signatures, near_duplicates, normalise, shingles, signatures, simhash,
                              simhash_pairs, text_digest, words_of)
from timing import assert_linear, cpu_seconds


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
        assert containment(shingles(t), shingles(t + " more")) >= jaccard(shingles(t), shingles(t + " more"))
    codes = [simhash(t) for t in raw]
    assert simhash_pairs(codes, 5) == [(i, j, hamming(x, y)) for i, x in enumerate(codes) for j, y in enumerate(codes) if i < j and hamming(x, y) <= 5]
    exact_duplicates(docs)
    found = contamination(docs, raw, n=3, min_words=1)
    assert {(r["id"], r["eval"]) for r in found} >= {(i, i) for i, t in enumerate(raw) if words_of(t)}
    for row in found:
        document, evaluation = lined_up(row).split("\n")
        assert row["ngram"] and document.index("[") == evaluation.index("[") and row["words"] <= row["of"]
        assert row["document"][row["document"].index("["):row["document"].index("]")] == row["evaluation"][row["evaluation"].index("["):row["evaluation"].index("]")]
    assert decontaminate(decontaminate(docs, raw, 3, 1)[0], raw, 3, 1)[1]["removed"] == {"contaminated": 0}


@pytest.mark.parametrize("unit", ["a ", "<", "\\", "((", "{", "\n", "é", "<a ", "a", "\n \n", "word word\n\n"])
def test_time_grows_with_the_size(unit):
    def seconds(size):
        doc = [{"id": 0, "text": unit * (size // len(unit))}]
        return cpu_seconds(lambda: (deduplicate(doc), near_duplicates(doc + [doc[0] | {"id": 1}]), drop_repeated_lines(doc, unit="paragraph"), drop_repeated_lines(doc),
                                    contamination(doc, ["a " * 50, unit * 1000]), simhash(doc[0]["text"])))
    assert_linear(seconds, 2_000_000)


def test_datasketch_finds_the_same_pairs(docs):
    datasketch = pytest.importorskip("datasketch")
    bands, rows, sets = 14, 8, [shingles(d["text"]) for d in docs]
    index, theirs = datasketch.MinHashLSH(num_perm=bands * rows, params=(bands, rows)), set()
    for i, d in enumerate(docs):
        words, sketch = words_of(d["text"]), datasketch.MinHash(num_perm=bands * rows)
        sketch.update_batch({b" ".join(words[k:k + 5]) for k in range(len(words) - 4)})
        theirs |= {(j, i) for j in index.query(sketch)}
        index.insert(i, sketch)
    groups = candidate_groups(signatures([d["text"] for d in docs], 5, bands, rows))
    ours = {(j, i) for b in range(bands) for i in range(len(docs)) if groups[i, b] >= 0 for j in np.flatnonzero(groups[:i, b] == groups[i, b]).tolist()}
    holders = {}
    for i, hashes in enumerate(sets):
        for h in hashes.tolist():
            holders.setdefault(h, []).append(i)
    # every pair with a common shingle, by exact Jaccard similarity, is the judge
    similarity = {p: jaccard(sets[p[0]], sets[p[1]]) for p in {(j, i) for h in holders.values() for i in h for j in h if j < i}}
    near, expected = [p for p, s in similarity.items() if s >= 0.8], {p: lsh_probability(s, bands, rows) for p, s in similarity.items()}
    assert len(near) > 250
    for found in (ours, theirs):
        assert sum(similarity.get(p, 0) >= 0.5 for p in found) >= 0.98 * len(found)
        assert len(found & set(near)) / len(near) > sum(expected[p] for p in near) / len(near) - 0.03
        assert abs(len(found) - sum(expected.values())) < 4 * sum(e * (1 - e) for e in expected.values()) ** 0.5 + 1


def test_simhash_pairs_are_complete(docs):
    codes = [simhash(d["text"]) for d in docs[:500]]
    for distance in (0, 3, 6):
        assert simhash_pairs(codes, distance) == [(i, j, n) for i in range(500) for j in range(i + 1, 500) if (n := hamming(codes[i], codes[j])) <= distance]


def test_articles_with_planted_copies(testdata):
    lines = (testdata / "neardup/articles_1000.train").read_text(encoding="utf-8").splitlines()
    truth = {tuple(sorted(x.split())) for x in (testdata / "neardup/articles_1000.truth").read_text().splitlines()}
    docs = [{"id": i, "text": t} for i, t in (x.split(" ", 1) for x in lines)]
    for settings_ in ({}, {"threshold": 0.5, "bands": 40, "rows": 4}):
        assert {tuple(sorted(p)) for p in near_duplicates(docs, **settings_).items()} == truth


def test_cs336_fixtures(testdata):
    read = lambda name: {p.stem: p.read_text(encoding="utf-8") for p in sorted((testdata / "neardup/cs336" / name).glob("*.txt"))}
    kept, _ = drop_repeated_lines([{"id": k, "text": v} for k, v in read("documents_with_line_duplicates").items()], keep="none", min_words=1)
    ours = {d["id"]: d["text"] for d in kept}
    for name, text in read("documents_line_deduplicated").items():
        assert ours.get(name, "").split() == text.split()
    dropped = near_duplicates([{"id": k, "text": v} for k, v in read("documents_with_fuzzy_duplicates").items()])
    assert [sorted(p) for p in dropped.items()] == [["rails_mit_license", "react_mit_license"]]
