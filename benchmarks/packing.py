"""Filling rows with real documents: what four ways use, lose and cut; the time of best fit;
memory and time of reading rows from a file of 1.6 GB.

Documents: web pages (C4 and DCLM samples), articles (WikiText-2), Python files (The Algorithms), instructions with answers (Alpaca, Dolly), encoded by a tokenizer
of 8,192 words trained on all of them. Only figures about their lengths are kept. One thread."""
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from llm_course.packing import TokenRows, best_fit, crop_fit, cut_stream, filling_report, pad_each, split_fit
from llm_course.reading import read_rows
from llm_course.tokenizer import train_tokenizer

WAYS = {"one document a row": pad_each, "cut the stream": cut_stream, "best fit, long ones split": split_fit, "best fit, cropped": crop_fit}
ROOMS = (512, 1024, 2048)
TOKENS, VOCAB = 800_000_000, 50_000


def documents(folder: Path) -> dict[str, list[str]]:
    "Texts by kind."
    texts = lambda path, *keys: ["\n\n".join(row[k] for k in keys if row.get(k)) for _, row in read_rows(folder / path)]
    articles = "".join((folder / "pretrain" / "wikitext-2" / f"{part}.txt").read_text(encoding="utf-8") for part in ("valid", "test"))
    return {"web pages": texts("web/c4_demo.jsonl", "text") + texts("web/dclm_quality_labels.jsonl", "text"),
            "articles": [t for t in re.split(r"\n(?= = [^=\n]+ = \n)", articles) if t.strip()],
            "code": texts("code/thealgorithms.jsonl", "text"),
            "instructions": texts("instruct/alpaca_en_demo.json", "instruction", "input", "output") + texts("instruct/dolly_hhrlhf_small.jsonl", "prompt", "response")}


def fillings(kinds: dict[str, list[str]]) -> dict:
    tokenizer, found = train_tokenizer([t for texts in kinds.values() for t in texts], 8192), {}
    for kind, texts in kinds.items():
        lengths = [1 + len(ids) for ids in tokenizer.encode_batch(texts)]
        rooms = {str(T): {way: {k: round(v, 4) for k, v in filling_report(fill(lengths, T), lengths, T).items()} for way, fill in WAYS.items()} for T in ROOMS}
        found[kind] = {"documents": len(lengths), "tokens": sum(lengths), "median": int(np.median(lengths)), "longest": max(lengths), "rooms": rooms}
        print(kind, json.dumps(found[kind]), flush=True)
    return found


def by_scanning(lengths: list[int], room: int) -> list[list[int]]:
    "Best fit that looks for the smallest sufficient space one by one."
    by_space, bins = [[] for _ in range(room + 1)], []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        space = next((s for s in range(lengths[i], room + 1) if by_space[s]), None)
        b = len(bins) if space is None else by_space[space].pop()
        if space is None:
            bins.append([])
        bins[b].append(i)
        by_space[(room if space is None else space) - lengths[i]].append(b)
    return bins


def best_fit_times(n: int = 100_000) -> list[dict]:
    rows = []
    for room in (512, 2048, 8192):
        lengths = np.clip(np.random.default_rng(0).lognormal(np.log(room) - 2.5, 1, n), 5, room).astype(int).tolist()
        seconds = {}
        for name, f in (("bits", best_fit), ("scan", by_scanning)):
            times = []
            for _ in range(3 if f is best_fit else 1):
                start = time.process_time()                    # of this process only, whoever else uses the machine
                bins = f(lengths, room)
                times.append(time.process_time() - start)
            seconds[name] = (round(min(times), 3), bins)
        assert seconds["bits"][1] == seconds["scan"][1]
        rows.append({"items": n, "room": room, "bins": len(bins), "used": round(sum(lengths) / (room * len(bins)), 5), "bits_seconds": seconds["bits"][0], "scan_seconds": seconds["scan"][0]})
        print(rows[-1], flush=True)
    return rows


def anonymous_mb() -> float:
    "Memory of this process that belongs to no file, in MB (Linux)."
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def read_big(path: str, n: int = 20_000) -> None:
    "What a process of its own does: rows from anywhere in the file, and the most anonymous memory above that before the file was opened, in MB."
    draw, before, most = np.random.default_rng(1), anonymous_mb(), 0.0
    rows = TokenRows(path, 2048, bos_id=0)
    start = time.perf_counter()
    for j, i in enumerate(draw.integers(0, len(rows), n)):
        rows[int(i)]
        if j % 500 == 0:
            most = max(most, anonymous_mb() - before)
    print(json.dumps({"rows_read": n, "anonymous_mb": round(most, 1), "microseconds_a_row": round((time.perf_counter() - start) / n * 1e6, 1)}))


def big_file() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path, block = Path(folder) / "big.bin", np.random.default_rng(0).integers(1, VOCAB, 4_000_000).astype(np.uint16)
        block[::700] = 0
        with open(path, "wb") as f:
            for _ in range(TOKENS // len(block)):
                block.tofile(f)
        Path(f"{path}.json").write_text(json.dumps({"tokens": TOKENS, "documents": 0, "dtype": "uint16", "vocab_size": VOCAB}))
        out = subprocess.run([sys.executable, __file__, "--read", str(path)], capture_output=True, text=True, check=True).stdout
        found = {"file_mb": round(path.stat().st_size / 1e6), "row_tokens": 2048} | json.loads(out.splitlines()[-1])
    print(found, flush=True)
    return found


def main() -> None:
    from record import arguments, save, testdata
    args = arguments(__doc__)
    figures = {"fillings": fillings(documents(testdata())), "best_fit": best_fit_times(), "big_file": big_file(), "cuda": {"varlen": "not measured yet", "flex": "not measured yet"}}
    if args.save:
        save("packing", __doc__.replace("\n", " "), figures, ("tokenizers",))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--read"]:
        read_big(sys.argv[2])
    else:
        main()
