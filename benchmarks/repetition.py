"""What repeating a source costs: the same token budget spent on all of its documents once, or on a part of them several times."""
import random
import statistics
import time

import torch
from mixtures import MODEL, make_sources, one_run

from llm_course.tokenizer import train_tokenizer

PARTS = (1, 2, 4, 16, 64)     # a 64th of the documents is read 64 times


def part_of(docs: list[dict], n_bytes: float, seed: int) -> list[dict]:
    "Documents drawn without replacement until `n_bytes` are reached."
    out, size = [], 0
    for doc in random.Random(f"part-{seed}").sample(docs, len(docs)):
        if size >= n_bytes:
            break
        out.append(doc)
        size += len(doc["text"].encode())
    return out


def summary(rows: list[dict], key: str) -> dict:
    "Mean and standard deviation of one figure over the seeds, for each part."
    of = lambda part: [r[key] for r in rows if r["part"] == part]
    return {str(p): {"mean": round(statistics.mean(of(p)), 4), "sd": round(statistics.stdev(of(p)), 4) if len(of(p)) > 1 else None} for p in PARTS}


def run_part(docs: list[dict], val: dict, tokenizer, part: int, seed: int, budget: tuple[int, float]) -> dict:
    "Two models on the same part of the documents: one reads it `part` times, one once."
    tokens, n_bytes = budget
    start, mine = time.perf_counter(), {"docs": part_of(docs, n_bytes / part, seed)}
    repeated, _ = one_run(mine, val, {"docs": 1.0}, tokenizer, tokens, seed)
    once, _ = one_run(mine, val, {"docs": 1.0}, tokenizer, tokens // part, seed) if part > 1 else (repeated, None)
    return {"part": part, "seed": seed, "documents": len(mine["docs"]), "repeated": round(repeated["docs"], 4), "once": round(once["docs"], 4),
            "seconds": round(time.perf_counter() - start, 1)}


if __name__ == "__main__":
    from record import arguments, save
    args = arguments(__doc__, tokens=400_000, seeds=3, held_out=60)
    torch.set_num_threads(1)
    train, val = make_sources({"village": 20_000, "code": 20_000, "docs": 8 * args.tokens}, args.held_out)
    docs, val = train["docs"], {"docs": val["docs"]}
    tokenizer = train_tokenizer([d["text"] for d in docs[:2000]], 2048)
    per_token = sum(len(d["text"].encode()) for d in docs) / sum(len(i) + 1 for i in tokenizer.encode_batch([d["text"] for d in docs]))
    budget = (args.tokens, args.tokens * per_token)
    available = sum(len(d["text"].encode()) for d in docs)
    if available < budget[1]:
        raise SystemExit(f"only {available:,} bytes left by the filters, {budget[1]:,.0f} are needed for one epoch; use fewer --tokens")
    rows = []
    for part in PARTS:
        for seed in range(args.seeds):
            rows.append(run_part(docs, val, tokenizer, part, seed, budget))
            print(rows[-1], flush=True)
    repeated, once = summary(rows, "repeated"), summary(rows, "once")
    print(repeated, once, sep="\n")
    if args.save:
        save("repetition", "Bits per byte on held-out documentation of small models that read a part of it as often as the token budget allows, and of models that read it once",
             {"tokens": args.tokens, "seeds": args.seeds, "model": MODEL, "vocab_size": len(tokenizer), "available_bytes": available, "bytes_per_token": round(per_token, 3),
              "held_out_documents": len(val["docs"]), "repeated": repeated, "once": once, "rows": rows}, ("torch",))
