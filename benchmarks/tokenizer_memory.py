"""Memory of training a tokenizer on streams that grow: one text again and again, real text (encyclopedia, novels, plays), words that are all new; and with max_bytes.
Each run is a process of its own; the figure is its peak above that of the imports and of a training on a few bytes."""
import json
import random
import re
import string
import subprocess
import sys
import time
from pathlib import Path

from llm_course.tokenizer import train_tokenizer
from record import arguments, save, testdata


def peak() -> float:
    "Largest resident set of this process so far, in MB (Linux)."
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def real_lines():
    "Lines of encyclopedia articles, novels and plays."
    for name in ("wikitext-2/test.txt", "wikitext-2/valid.txt", "wiki_demo.txt", "gutenberg/melville-moby_dick.txt", "tinyshakespeare.txt", "gutenberg/austen-emma.txt"):
        with (testdata() / "pretrain" / name).open(encoding="utf-8") as f:
            yield from f


def new_words():
    "Texts of 200 words each, nearly all of which occur once."
    rng = random.Random(0)
    while True:
        yield " ".join("".join(rng.choices(string.ascii_lowercase, k=8)) for _ in range(200))


def first(texts, size: int):
    "The head of a stream, `size` bytes."
    for text in texts:
        size -= len(text.encode())
        if size < 0:
            return
        yield text


def stream(kind: str, size: int):
    "Texts made one by one, about `size` bytes."
    if kind == "repeated":
        return (line for _ in range(round(size / 750_000)) for line in first(real_lines(), 750_000))
    return first(real_lines() if kind == "real text" else new_words(), size)


def child(kind: str, size: int, max_bytes: int | None) -> None:
    train_tokenizer(["a few words to wake the library"], 300)
    before, start = peak(), time.perf_counter()
    tokenizer = train_tokenizer(stream(kind, size), 2048, max_bytes)
    print(json.dumps({"kind": kind, "max_bytes": max_bytes, "mb": round(peak() - before, 1), "seconds": round(time.perf_counter() - start, 1)} | tokenizer.report))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]) or None)
        sys.exit()
    args = arguments(__doc__, mega=6)
    sizes = [int(args.mega * 1e6 / k) for k in (8, 4, 2, 1)]
    plan = [(kind, size, 0) for kind in ("repeated", "real text", "new words") for size in sizes]
    plan += [("new words", size, sizes[0]) for size in sizes[1:]] + [("real text", sizes[-1], sizes[0])]
    rows = []
    for kind, size, cap in plan:
        done = subprocess.run([sys.executable, __file__, "child", kind, str(size), str(cap)], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
        print(rows[-1])
    if args.save:
        save("tokenizer_memory", "Peak memory of training a tokenizer on growing streams, in MB above that of the imports", {"rows": rows}, ("tokenizers",))
