"""The published rules on real web pages (decisions beside datatrove's, by tokenizer, by version), and their speed beside datatrove's
filters with str.split for a tokenizer. Writes two records: rules, rules_speed."""
import gzip
import json
import re
import time
from pathlib import Path

import numpy as np

from llm_course.filtering import (C4_ANY_END, C4_RULES, FINEWEB_RULES, GOPHER_QUALITY, GOPHER_REPETITION, STOP_WORDS, count_sentences, decide, failures, rule,
                                  tag, tag_documents)
from record import arguments, save, testdata

GROUPS = ("words", "lines", "repetition", "c4")
CODE_FINEWEB = FINEWEB_RULES | {"dup_chars": rule("dup_chars", high=0.01)}


def reference():
    "datatrove's four filters, with str.split and our sentences for its tokenizer."
    from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Blanks(WordTokenizer):
        def word_tokenize(self, text):
            return text.split()

        def sent_tokenize(self, text):
            return [""] * count_sentences(text)

        def span_tokenize(self, text):
            return [(0, 0)] * count_sentences(text)                          # the filters count spans, and look at nothing else

    lang = Blanks()
    return {"Gopher quality": (GopherQualityFilter(language=lang), GOPHER_QUALITY), "Gopher repetition": (GopherRepetitionFilter(language=lang), GOPHER_REPETITION),
            "C4": (C4QualityFilter(language=lang), C4_RULES), "C4, lines may end anyhow": (C4QualityFilter(language=lang, filter_no_terminal_punct=False), C4_ANY_END),
            "FineWeb": (FineWebQualityFilter(language=lang), CODE_FINEWEB)}


def keeps(step, text: str) -> bool:
    from datatrove.data import Document
    result = step.filter(Document(text=text, id="0"))
    return (result[0] if isinstance(result, tuple) else result) is True


def dolma_keeps(text: str) -> bool:
    "Gopher's quality rules as Dolma's code counts: median length, occurrences of stop words, other ellipses and bullets."
    words, lines = text.split(), text.split("\n")
    n = max(1, len(words))
    median = float(np.median([len(w) for w in words] or [0]))
    bullets = sum(line.strip().startswith(("*", "-")) for line in lines) / len(lines)
    ellipses = sum(line.strip().endswith("…") for line in lines) / len(lines)
    return (50 <= len(words) <= 100_000 and 3 <= median <= 10 and text.count("#") / n <= 0.1 and text.count("…") / n <= 0.1 and bullets <= 0.9 and ellipses <= 0.3
            and sum(any(map(str.isalpha, w)) for w in words) / n >= 0.8 and sum(w in STOP_WORDS for w in words) >= 2)


def articles(folder: Path) -> list[str]:
    "All text of the pages of the article benchmark, markup taken off by the standard library, a line a block."
    texts = []
    for path in sorted(folder.glob("*.html.gz")):
        html = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
        html = re.sub(r"<(script|style|noscript|svg)\b.*?</\1\s*>", " ", html, flags=re.S | re.I)
        html = re.sub(r"</?(?:p|div|li|ul|ol|h[1-6]|br|tr|table|section|article|nav|footer|header)\b[^>]*>", "\n", html, flags=re.I)
        lines = (" ".join(re.sub(r"<[^>]+>", " ", line).split()) for line in html.split("\n"))
        texts.append("\n".join(line for line in lines if line))
    return texts


def good(table: dict, rules: dict) -> np.ndarray:
    return ~np.any(list(failures(table, rules).values()), axis=0)


def compare(texts: list[str]) -> dict:
    docs = [{"text": t} for t in texts]
    table, marked = tag_documents(docs, GROUPS), tag_documents(docs, ["words"], split=lambda t: re.findall(r"\w+|[^\w\s]", t))
    quality, apart, dolma = good(table, GOPHER_QUALITY), good(marked, GOPHER_QUALITY), np.array([dolma_keeps(t) for t in texts])
    cased = good(table | {"stop_words": np.array([len(STOP_WORDS & set(t.lower().split())) for t in texts])}, GOPHER_QUALITY)
    kept = {"gopher quality": quality, "gopher quality, punctuation apart": apart, "gopher quality, dolma": dolma, "gopher quality, stop words in any case": cased,
            "gopher repetition": good(table, GOPHER_REPETITION), "c4": good(table, C4_RULES), "c4, any end": good(table, C4_ANY_END),
            "fineweb 0.1": good(table, FINEWEB_RULES), "fineweb 0.01": good(table, CODE_FINEWEB),
            "all, 0.1": good(table, GOPHER_QUALITY | GOPHER_REPETITION | C4_ANY_END | FINEWEB_RULES)}
    same = {name: int(sum(keeps(step, t) == g for t, g in zip(texts, good(table, rules)))) for name, (step, rules) in reference().items()}
    return {"n": len(texts), "mean_characters": round(float(np.mean([len(t) for t in texts]))), "kept": {k: round(float(v.mean()), 4) for k, v in kept.items()},
            "flips": {"tokenizer": int((quality != apart).sum()), "dolma": int((quality != dolma).sum()), "stop words in any case": int((quality != cased).sum())},
            "same": same}


def cut(texts: list[str], size: int = 1000, most: int = 500) -> list[str]:
    "Documents of `size` characters."
    pieces = [t[i:i + size] for t in texts for i in range(0, len(t) - size + 1, size)]
    return pieces[:most]


def seconds(f, docs: list[str]) -> float:
    start = time.perf_counter()
    for d in docs:
        f(d)
    return time.perf_counter() - start


def speed(texts: list[str], repetitions: int) -> dict:
    "Best of several repetitions, ours and theirs in turn; every filter of theirs runs on every document, as ours do."
    docs, steps = cut(texts), [s for name, (s, _) in reference().items() if "anyhow" not in name]
    rules = GOPHER_QUALITY | GOPHER_REPETITION | C4_RULES | FINEWEB_RULES
    ours, theirs = lambda t: decide(tag(t, GROUPS), rules), lambda t: [keeps(s, t) for s in steps]
    everything = lambda t: tag(t)
    times = [[seconds(f, docs) for f in (ours, theirs, everything)] for _ in range(repetitions)]
    best = [min(t) for t in zip(*times)]
    rates = {"all rules, ours": len(docs) / best[0], "datatrove's four filters, str.split": len(docs) / best[1], "all measures, with letters and language, ours": len(docs) / best[2]}
    return {"documents": len(docs), "characters": 1000, "words": round(float(np.mean([len(d.split()) for d in docs])), 1), "repetitions": repetitions,
            "documents_per_second": {k: round(v) for k, v in rates.items()}, "ratio": round(best[1] / best[0], 2),
            "ratio_of_each_repetition": [round(t[1] / t[0], 2) for t in times]}


def main() -> None:
    args = arguments(__doc__, repetitions=5)
    web = testdata() / "web"
    lines = lambda name: [json.loads(line)["text"] for line in (web / name).read_text(encoding="utf-8").splitlines()]
    texts = {"C4 sample": lines("c4_demo.jsonl"), "DCLM labelled pages": lines("dclm_quality_labels.jsonl"), "article pages, all text": articles(web / "article_html")}
    sets = {name: compare(t) for name, t in texts.items()}
    print(json.dumps(sets, indent=1))
    fast = speed(texts["C4 sample"], args.repetitions)
    print(json.dumps(fast, indent=1))
    if args.save:
        save("rules", "Published rules on real pages: share kept, decisions that differ by tokenizer and version, and decisions equal to datatrove's given its words",
             {"sets": sets}, ("datatrove",))
        save("rules_speed", "All rules of Gopher, C4 and FineWeb on documents of 1000 characters, one core, beside datatrove's filters with str.split", fast, ("datatrove",))


if __name__ == "__main__":
    main()
