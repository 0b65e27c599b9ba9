"""Speed of near-duplicate search on one core: ours and datasketch side by side, shingling included, and the memory of ours.

Documents are random words that follow Zipf's law, some 1,000 characters each; a tenth are exact copies and a fifth near copies of others
(1 to 12 words exchanged). Both find candidates with 112 hashes in 14 bands of 8 over word 5-grams; the copies planted are the truth."""
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from record import arguments, save

from llm_course.dedup import candidate_groups, deduplicate, jaccard, shingles, signatures

BANDS, ROWS, N = 14, 8, 5


def make_documents(n: int, seed: int = 0) -> tuple[list[str], dict[int, int]]:
    "`n` texts, of which n / 10 are exact and n / 5 near copies; number of each near copy -> number of its original."
    rng = random.Random(seed)
    lexicon = ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", weights=range(26, 0, -1), k=rng.randint(2, 11))) for _ in range(30_000)]
    cumulative = np.cumsum(1 / (np.arange(len(lexicon)) + 8)).tolist()
    draw = lambda k: rng.choices(lexicon, cum_weights=cumulative, k=k)
    texts = [" ".join(draw(rng.randint(140, 190))) for _ in range(n - n // 10 - n // 5)]
    originals, near = len(texts), {}
    for _ in range(n // 10):
        texts.append(texts[rng.randrange(originals)])
    for _ in range(n // 5):
        source = rng.randrange(originals)
        words = texts[source].split(" ")
        for at in rng.sample(range(len(words)), rng.randint(1, 12)):
            words[at] = draw(1)[0]
        near[len(texts)] = source
        texts.append(" ".join(words))
    return texts, near


def ours(texts: list[str]) -> np.ndarray:
    "From texts to candidate groups, unverified, as datasketch's index gives them."
    return candidate_groups(signatures(texts, N, BANDS, ROWS))


def ours_verified(texts: list[str]) -> dict:
    "From texts to decisions, each verified by exact Jaccard similarity."
    return deduplicate([{"id": i, "text": t} for i, t in enumerate(texts)], 0.8, N, BANDS, ROWS)[1]


def datasketch(texts: list[str], **options) -> list[set]:
    "As its documentation says: shingles, `update_batch`, query, insert."
    from datasketch import MinHash, MinHashLSH
    index, out = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS)), []
    for i, text in enumerate(texts):
        words = text.lower().split()
        sketch = MinHash(num_perm=BANDS * ROWS, **options)
        sketch.update_batch({" ".join(words[k:k + N]).encode() for k in range(max(1, len(words) - N + 1))})
        out.append(set(index.query(sketch)))
        index.insert(i, sketch)
    return out


def datasketch_xxhash(texts: list[str]) -> list[set]:
    "The same with a hash function faster than its default, SHA-1."
    import xxhash
    return datasketch(texts, hashfunc=xxhash.xxh32_intdigest)


def seconds(function, *args) -> tuple[float, object]:
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def recalls(found: dict[int, bool], similarity: dict[int, float]) -> dict[str, dict]:
    "Share of the planted pairs found, by exact Jaccard similarity."
    out = {}
    for low, high in ((0.6, 0.7), (0.7, 0.8), (0.8, 0.9), (0.9, 1.01)):
        here = [found[i] for i, s in similarity.items() if low <= s < high]
        out[f"{low}-{min(high, 1.0)}"] = {"n": len(here), "recall": round(sum(here) / max(1, len(here)), 4)}
    return out


def side_by_side(n: int, repeats: int) -> dict:
    "Speeds in documents per second of CPU time, alternating, best and median; recall of both."
    texts, near = make_documents(n)
    similarity = {i: jaccard(shingles(texts[i], N), shingles(texts[j], N)) for i, j in near.items()}
    runs, times, results = (ours, datasketch, datasketch_xxhash, ours_verified), {}, {}
    for _ in range(repeats):
        for f in runs:
            took, results[f.__name__] = seconds(f, texts)
            times.setdefault(f.__name__, []).append(took)
    groups, sets = results["ours"], results["datasketch"]
    found = {"ours": {i: bool(((groups[i] == groups[j]) & (groups[i] >= 0)).any()) for i, j in near.items()},
             "datasketch": {i: j in sets[i] for i, j in near.items()}}
    speed = {name: {"best": round(n / min(t)), "median": round(n / statistics.median(t))} for name, t in times.items()}
    ratio = {f"{a} / {b}": {k: round(speed[a][k] / speed[b][k], 2) for k in ("best", "median")}
             for a in ("ours", "ours_verified") for b in ("datasketch", "datasketch_xxhash")}
    return {"documents": n, "bytes_per_document": round(sum(len(t.encode()) for t in texts) / n), "repeats": repeats, "docs_per_second": speed,
            "ratio": ratio, "recall": {name: recalls(f, similarity) for name, f in found.items()}, "removed": results["ours_verified"]["removed"]}


def parts(n: int) -> dict[str, float]:
    "Microseconds a document of each step."
    from llm_course.dedup import _shingle_batch, _WordHashes, band_keys, match_signatures, minhash, words_of
    texts, out, table = make_documents(n)[0], {}, _WordHashes()
    batches = [texts[i:i + 256] for i in range(0, n, 256)]
    out["words"], _ = seconds(lambda: [words_of(t) for t in texts])
    took, sets = seconds(lambda: [_shingle_batch(b, N, table) for b in batches])
    out["shingles"] = took  # words included
    out["minhash"], sketches = seconds(lambda: [minhash(s, BANDS * ROWS) for s in sets])
    out["band_keys"], keys = seconds(lambda: np.concatenate([band_keys(s, BANDS, ROWS) for s in sketches]))
    out["groups"], _ = seconds(candidate_groups, keys)
    took, _ = seconds(match_signatures, keys, texts.__getitem__)
    out["verification"] = took - out["groups"]
    return {k: round(1e6 * v / n, 1) for k, v in out.items()}


def resident(field: str) -> float:
    "Resident memory of this process in MB: `VmRSS` now, `VmHWM` at its peak (Linux)."
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 1e6


def peak(n: int) -> dict[str, float]:
    "Peak memory in MB of a process of its own: with the texts alone, and after `deduplicate`; run by `memory`."
    docs = [{"id": i, "text": t} for i, t in enumerate(make_documents(n)[0])]
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
    took, (kept, _) = seconds(lambda: deduplicate(docs, 0.8, N, BANDS, ROWS))
    return {"documents": n, "with_texts_mb": round(before), "peak_mb": round(resident("VmHWM")), "seconds": round(took, 1), "documents_out": len(kept)}


def memory(n: int) -> dict:
    done = subprocess.run([sys.executable, __file__, "--peak", str(n)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    args = arguments(__doc__, documents=20_000, repeats=3, large=200_000, peak=0)
    if args.peak:
        return print(json.dumps(peak(args.peak)))
    figures = side_by_side(args.documents, args.repeats)
    print(json.dumps(figures, indent=1))
    figures["microseconds_per_document"] = parts(args.documents)
    figures["memory"] = [memory(n) for n in (args.documents, args.large)]
    small, large = figures["memory"]
    extra = [1e6 * (m["peak_mb"] - m["with_texts_mb"]) / m["documents"] for m in (small, large)]
    slope = ((large["peak_mb"] - large["with_texts_mb"]) - (small["peak_mb"] - small["with_texts_mb"])) / (large["documents"] - small["documents"])
    figures["memory_per_document_bytes"] = {"measured": [round(x) for x in extra], "keys": 8 * BANDS, "groups": 8 * BANDS}
    figures["estimate_million_mb_without_texts"] = round(large["peak_mb"] - large["with_texts_mb"] + slope * (1_000_000 - large["documents"]))
    print(json.dumps({k: figures[k] for k in list(figures)[-4:]}, indent=1))
    if args.save:
        save("minhash_speed", "near-duplicate search on one core: documents per second of CPU time, recall, peak memory", figures, ("datasketch",))


if __name__ == "__main__":
    main()
