"""The same token budget under several mixtures of the course's sources: bits per byte on each source, for several seeds."""
import statistics
import tempfile
import time
from pathlib import Path

import torch

from llm_course.corpus import hold_out
from llm_course.filtering import clean_documents
from llm_course.reading import write_jsonl
from llm_course.mixing import epochs_per_source, mix, temperature_weights
from llm_course.model import ModelConfig, Transformer
from llm_course.packing import TokenRows
from llm_course.pretrain import bits_per_byte, pretrain, tokenize_corpus
from llm_course.tokenizer import train_tokenizer
from llm_course.trainer import TrainConfig, seed_all
from llm_course.world import make_village, python_code, python_docs, village_documents

SIZES = {"village": 3_000_000, "code": 1_500_000, "docs": 400_000}     # bytes asked for; what the filters leave is in the record
MODEL = {"dim": 96, "n_layers": 3, "n_heads": 4, "max_seq_len": 128}


def make_sources(sizes: dict[str, int], held_out: int) -> tuple[dict, dict]:
    "Cleaned documents by source, for training and held out."
    docs = village_documents(make_village(), sizes["village"]) + python_code(sizes["code"]) + python_docs(sizes["docs"])
    kept, _ = clean_documents(docs)
    train, val = hold_out(kept, held_out)
    split = lambda ds: {s: [d for d in ds if d["source"] == s] for s in sizes}
    return split(train), {s: [d["text"] for d in ds] for s, ds in split(val).items()}


def mixtures(available: dict[str, float]) -> dict[str, dict[str, float]]:
    "Three mixtures by temperature, and each source alone."
    tempered = {f"alpha {a:g}": temperature_weights(available, a) for a in (1, 0.3, 0)}
    return tempered | {f"only {s}": {s: 1.0} for s in available}


def one_run(train: dict, val: dict, weights: dict, tokenizer, tokens: int, seed: int) -> tuple[dict, dict]:
    "Train one model; returns bits per byte by source, and the mixture's report."
    n_bytes = tokens * 5     # more than is needed; the number of steps decides
    docs, report = mix(train, weights, n_bytes, seed=seed)
    seed_all(seed)
    model = Transformer(ModelConfig(len(tokenizer), **MODEL))
    with tempfile.TemporaryDirectory() as folder:
        write_jsonl(Path(folder) / "docs.jsonl", ({"text": d["text"]} for d in docs))
        tokenize_corpus(Path(folder) / "docs.jsonl", tokenizer, Path(folder) / "tokens.bin")
        steps, packed = tokens // (16 * MODEL["max_seq_len"]), TokenRows(Path(folder) / "tokens.bin", MODEL["max_seq_len"], tokenizer.bos_id)
        rows = [packed[i] for i in range(steps * 16)]     # the mixture has its shares in every prefix
    pretrain(model, rows, TrainConfig(steps=steps, batch_size=16, lr=4e-3, optimizer="muon", warmup=0.05, weight_decay=0.1, seed=seed, log_every=10**9, precision="no"))
    return {s: bits_per_byte(model, tokenizer, texts) for s, texts in val.items()}, report


if __name__ == "__main__":
    from record import arguments, save
    args = arguments(__doc__, tokens=400_000, seeds=3, scale=1.0, held_out=60)
    torch.set_num_threads(1)
    train, val = make_sources({s: int(n * args.scale) for s, n in SIZES.items()}, args.held_out)
    available = {s: sum(len(d["text"].encode()) for d in ds) for s, ds in train.items()}
    sample = min(available.values())
    tokenizer = train_tokenizer([d["text"] for d in mix(train, dict.fromkeys(train, 1), 3 * sample)[0]], 2048)
    rows = []
    for name, weights in mixtures(available).items():
        for seed in range(args.seeds):
            start = time.perf_counter()
            bits, report = one_run(train, val, weights, tokenizer, args.tokens, seed)
            rows.append({"mixture": name, "seed": seed, "bits": {s: round(b, 4) for s, b in bits.items()}, "seconds": round(time.perf_counter() - start, 1)})
            print(rows[-1], flush=True)
    per_token = {s: sum(len(t.encode()) for t in texts) / sum(len(i) for i in tokenizer.encode_batch(texts)) for s, texts in val.items()}
    table = {}
    for name, weights in mixtures(available).items():
        mean_bytes = 1 / sum(w / per_token[s] for s, w in weights.items())   # weights are shares of bytes: a harmonic mean
        mine = [r["bits"] for r in rows if r["mixture"] == name]
        table[name] = {"weights": {s: round(w, 4) for s, w in weights.items()}, "epochs": {s: round(e, 2) for s, e in epochs_per_source(available, weights, args.tokens * mean_bytes).items()},
                       "mean": {s: round(statistics.mean(b[s] for b in mine), 4) for s in val}, "sd": {s: round(statistics.stdev(b[s] for b in mine), 4) if len(mine) > 1 else None for s in val}}
        print(name, table[name])
    if args.save:
        save("mixtures", "Bits per byte of small models on each source, after the same number of tokens of several mixtures; mean and standard deviation over seeds",
             {"tokens": args.tokens, "seeds": args.seeds, "model": MODEL, "vocab_size": len(tokenizer), "available_bytes": available, "held_out_documents": {s: len(t) for s, t in val.items()},
              "bytes_per_token": {s: round(b, 3) for s, b in per_token.items()}, "table": table, "rows": rows}, ("torch",))
