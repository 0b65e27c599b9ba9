"""Near-duplicate methods on public sets with labels, and the whole of `deduplicate` on the course's own injected copies.

Pairs: each method gives a pair a similarity; reported are the area under the ROC curve over all pairs, and precision, recall and F1 at a
threshold. Thresholds are chosen (best F1) on one half of the pairs and used on the other, and the other way round, so that no pair is judged by
a threshold that it helped to choose. Collections: planted pairs among
all pairs of a collection, at settings that were not tuned. PAN and MSR are sentence pairs: paraphrase, not copies."""
import csv
import random
from itertools import combinations

import numpy as np
from record import arguments, save, testdata

from llm_course.dedup import deduplicate, drop_repeated_lines, hamming, jaccard, near_duplicates, shingles, simhash
from llm_course.cleaning import wilson
from llm_course.world import inject_mess, make_village, village_documents

Pair = tuple[str, str]


def containment(a: np.ndarray, b: np.ndarray) -> float:
    "Share of the smaller set that lies in the other."
    small = min(len(a), len(b))
    return len(np.intersect1d(a, b)) / small if small else 0.0


def methods() -> dict:
    "Name -> function of two texts to a similarity; the fuzzy hashes where they are installed."
    out = {"Jaccard, 5 words": lambda a, b: jaccard(shingles(a, 5), shingles(b, 5)),
           "Jaccard, 3 words": lambda a, b: jaccard(shingles(a, 3), shingles(b, 3)),
           "Jaccard, 1 word": lambda a, b: jaccard(shingles(a, 1), shingles(b, 1)),
           "containment, 5 words": lambda a, b: containment(shingles(a, 5), shingles(b, 5)),
           "SimHash, 3 words": lambda a, b: 1 - hamming(simhash(a), simhash(b)) / 64}
    try:
        import ppdeep
        out["ssdeep (ppdeep)"] = lambda a, b: ppdeep.compare(ppdeep.hash(a), ppdeep.hash(b)) / 100
    except ImportError:
        print("without ppdeep")
    try:
        import tlsh
        digest = lambda t: tlsh.hash(t.encode())
        out["TLSH"] = lambda a, b: -float(tlsh.diff(digest(a), digest(b))) if digest(a) not in ("", "TNULL") and digest(b) not in ("", "TNULL") else -999.0
    except ImportError:
        print("without TLSH")
    return out


METHODS = methods()


def auc(near: np.ndarray, far: np.ndarray) -> float:
    "Probability that a near pair scores above a far one, ties count half."
    order = np.sort(far)
    return float((np.searchsorted(order, near, "left") + np.searchsorted(order, near, "right")).mean() / (2 * len(far)))


def auc_interval(near: np.ndarray, far: np.ndarray, n: int = 500) -> list[float]:
    "95 % bootstrap interval of the area."
    rng = np.random.default_rng(0)
    values = [auc(rng.choice(near, len(near)), rng.choice(far, len(far))) for _ in range(n)]
    return [round(float(x), 4) for x in np.percentile(values, [2.5, 97.5])]


def f1(found: np.ndarray, label: np.ndarray) -> float:
    return 2 * float((found & label).sum()) / max(1, int(found.sum() + label.sum()))


def best_threshold(score: np.ndarray, label: np.ndarray) -> float:
    "The threshold with the best F1 among the scores met; of equals the middle one, so that it does not sit on a single pair."
    values = np.unique(score)
    gains = np.array([f1(score >= v, label) for v in values])
    best = np.flatnonzero(gains == gains.max())
    return float(values[best[len(best) // 2]])


def f1_interval(found: np.ndarray, label: np.ndarray, n: int = 500) -> list[float]:
    "95 % bootstrap interval over pairs."
    rng = np.random.default_rng(0)
    picks = (rng.integers(0, len(found), len(found)) for _ in range(n))
    return [round(float(x), 4) for x in np.percentile([f1(found[p], label[p]) for p in picks], [2.5, 97.5])]


def share(k: int, n: int) -> dict | None:
    "A share with its Wilson interval."
    return {"k": k, "n": n, "share": round(k / n, 4), "interval": [round(x, 4) for x in wilson(k, n)]} if n else None


def judge_pairs(pairs: list[Pair], labels: list[bool]) -> dict:
    "Each method on labelled pairs; each half is judged by the threshold that the other half chose."
    order = np.random.default_rng(0).permutation(len(pairs))
    pairs, label, half, out = [pairs[i] for i in order], np.array(labels, bool)[order], np.arange(len(pairs)) % 2 == 1, {}
    for name, similarity in METHODS.items():
        score = np.array([similarity(a, b) for a, b in pairs])
        thresholds = {part: best_threshold(score[half == part], label[half == part]) for part in (False, True)}
        found = score >= np.where(half, thresholds[False], thresholds[True])
        both, near, far = int((found & label).sum()), score[label], score[~label]
        out[name] = {"auc": round(auc(near, far), 4), "auc_interval": auc_interval(near, far), "thresholds": [round(t, 4) for t in thresholds.values()],
                     "precision": share(both, int(found.sum())), "recall": share(both, int(label.sum())), "f1": round(f1(found, label), 4),
                     "f1_interval": f1_interval(found, label)}
    return {"pairs": len(pairs), "positives": int(label.sum()), "f1_all_positive": round(f1(np.ones_like(label), label), 4), "methods": out}


def clough(folder) -> tuple[list[Pair], list[int]]:
    "Answers beside the encyclopedia text: 0 written without it, 1 heavily revised, 2 lightly revised, 3 cut and paste."
    with open(folder / "clough_stevenson.csv", encoding="utf-8-sig", newline="") as f:
        rows = list(csv.reader(f))
    return [(r[0], r[1]) for r in rows], [int(r[2]) for r in rows]


def by_level(pairs: list[Pair], levels: list[int]) -> dict:
    "Median similarity and the share found at the usual thresholds, by the level of revision."
    usual = {"Jaccard, 5 words": 0.8, "containment, 5 words": 0.5, "SimHash, 3 words": 1 - 10 / 64}
    out = {}
    for name, threshold in usual.items():
        score = np.array([METHODS[name](a, b) for a, b in pairs])
        out[name] = {"threshold": round(threshold, 4), "levels": {str(k): {"median": round(float(np.median(score[np.array(levels) == k])), 4)}
                     | share(int((score[np.array(levels) == k] >= threshold).sum()), levels.count(k)) for k in range(4)}}
    return out


def msr(folder) -> tuple[list[Pair], list[bool]]:
    rows = [x.split("\t") for x in (folder / "msr_paraphrase_train.txt").read_text(encoding="utf-8-sig").splitlines()[1:]]
    return [(r[3], r[4]) for r in rows], [r[0] == "1" for r in rows]


def pan(folder) -> tuple[list[Pair], list[bool]]:
    sides = [(folder / f"pan-train_s{k}.txt").read_text(encoding="utf-8").split("\n") for k in (1, 2)]
    labels = (folder / "pan-train.labels").read_text().split()
    return [(a, b) for a, b, _ in zip(*sides, labels)], [x == "1" for x in labels]


def pairs_found(docs: list[dict], truth: set[tuple], **settings) -> dict:
    "What `near_duplicates` drops, as pairs, against planted pairs."
    found = {tuple(sorted(p)) for p in near_duplicates(docs, **settings).items()}
    return {"documents": len(docs), "planted": len(truth), "settings": settings, "precision": share(len(found & truth), len(found)),
            "recall": share(len(found & truth), len(truth))}


def collection(docs: list[dict], truth: set[tuple]) -> dict:
    "Planted pairs among all pairs of a collection: the least similar planted pair, the most similar other one, and two settings."
    sets = {d["id"]: shingles(d["text"]) for d in docs}
    others = (jaccard(sets[a], sets[b]) for a, b in combinations(sorted(sets), 2) if (a, b) not in truth)
    return {"least_planted": round(min(jaccard(sets[a], sets[b]) for a, b in truth), 4), "most_other": round(max(others), 4),
            "results": [pairs_found(docs, truth), pairs_found(docs, truth, threshold=0.5, bands=40, rows=4)]}


def articles(folder, n: int) -> dict:
    lines = (folder / f"articles_{n}.train").read_text(encoding="utf-8").splitlines()
    docs = [{"id": i, "text": t} for i, t in (x.split(" ", 1) for x in lines)]
    return collection(docs, {tuple(sorted(x.split())) for x in (folder / f"articles_{n}.truth").read_text().splitlines()})


# The pairs that the set's own program reports (its sample output); they are another program's findings, not labels of people.
PARKR = {(1, 75), (2, 76), (3, 87), (9, 64), (14, 88), (18, 99), (23, 51), (25, 40), (32, 52), (34, 63)}


def parkr(folder) -> dict:
    docs = [{"id": i, "text": (folder / f"parkr/file{i:02d}.txt").read_text(encoding="utf-8", errors="replace")} for i in range(100)]
    return collection(docs, PARKR)


def cs336(folder) -> dict:
    "The fixtures of the CS336 course: lines that occur more than once go altogether; of two MIT licences one stays."
    read = lambda name: {p.stem: p.read_text(encoding="utf-8") for p in sorted((folder / "cs336" / name).glob("*.txt"))}
    before, after, fuzzy = read("documents_with_line_duplicates"), read("documents_line_deduplicated"), read("documents_with_fuzzy_duplicates")
    kept, _ = drop_repeated_lines([{"id": k, "text": v} for k, v in before.items()], keep="none", min_words=1)
    ours = {k: "" for k in before} | {d["id"]: d["text"] for d in kept}
    dropped = near_duplicates([{"id": k, "text": v} for k, v in fuzzy.items()])
    return {"line_files_equal": sum(ours[k].split() == after[k].split() for k in after), "line_files": len(after),
            "fuzzy_dropped": len(dropped), "fuzzy_files": len(fuzzy), "fuzzy_pair_is_the_mit_licences": all("mit" in a and "mit" in b for a, b in dropped.items())}


def village(seeds: tuple[int, ...] = (11, 12, 13)) -> dict:
    "Copies that the course's own generator injects: decisions of `deduplicate` against the truth, several seeds together."
    hits = {rule: [0, 0, 0] for rule in ("exact_duplicate", "near_duplicate")}
    total = 0
    for seed in seeds:
        docs = inject_mess(village_documents(make_village(seed), 1_500_000, seed), rate=0.02, seed=seed)
        docs = [d for d in docs if d.get("truth") not in ("foreign", "repetition", "gibberish")]  # cleaning removes these first
        random.Random(seed).shuffle(docs)
        original = {d["id"]: d.get("copy_of") for d in docs}
        _, report = deduplicate(docs)
        total += len(docs)
        for rule, n in hits.items():
            truth, found = {d["id"] for d in docs if d.get("truth") == rule}, set(report["removed_ids"][rule])
            # after shuffling the original may come second: then it is the one that goes
            right = {i for i in found if i in truth or any(original.get(j) == i for j in truth)}
            n[0], n[1], n[2] = n[0] + len(right), n[1] + len(found), n[2] + len(truth)
    return {"documents": total, "seeds": list(seeds)} | {rule: {"precision": share(b, f), "recall": share(b, t)} for rule, (b, f, t) in hits.items()}


def main() -> None:
    args, folder = arguments(__doc__), testdata() / "neardup"
    pairs, levels = clough(folder)
    figures = {"clough_stevenson": judge_pairs(pairs, [k > 0 for k in levels]) | {"by_level": by_level(pairs, levels)},
               "msr_paraphrase": judge_pairs(*msr(folder)), "pan": judge_pairs(*pan(folder)),
               "articles_100": articles(folder, 100), "articles_1000": articles(folder, 1000), "parkr": parkr(folder),
               "cs336": cs336(folder), "village": village()}
    for name, found in figures.items():
        print(name, found)
    if args.save:
        save("near_duplicates", "near-duplicate methods on labelled pairs and collections", figures, ("ppdeep",))


if __name__ == "__main__":
    main()
