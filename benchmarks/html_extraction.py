"""Score ways to find a page's main text on labelled pages: precision, recall and F1 of 4-shingles, with bootstrap intervals, and pages a second.

Settings of the course's extractor were chosen on the development part only (pages of Readability and half of the articles)."""
import gzip
import hashlib
import json
import re
import time
from collections import Counter
from functools import partial
from html import unescape
from pathlib import Path

import numpy as np
from record import arguments, save, testdata

from llm_course.cleaning import INLINE, TOKEN, Page, main_text
from llm_course.reading import UserError


def all_text(html: str) -> str:
    "The baseline: every tag becomes a line end, scripts and comments go."
    return unescape(TOKEN.sub(lambda m: "" if (m["tag"] or "").lower() in INLINE | {"a"} else "\n", html))


def shingles(text: str, n: int = 4) -> Counter:
    "Runs of `n` words, as Scrapinghub's article extraction benchmark cuts them."
    words = re.findall(r"\w+", text)
    return Counter(tuple(words[i:i + n]) for i in range(max(1, len(words) - n + 1)) if words)


def page_score(true: str, found: str) -> tuple[float, float]:
    "Precision (nan where nothing was extracted) and recall of one page."
    a, b = shingles(true), shingles(found)
    both = sum((a & b).values())
    return both / sum(b.values()) if b else np.nan, both / sum(a.values()) if a else np.nan


def f1(scores: np.ndarray) -> np.ndarray:
    "Precision, recall and F1 of the means over pages (the last axis but one)."
    p, r = np.moveaxis(np.nanmean(scores, axis=-2), -1, 0)
    return np.stack([p, r, 2 * p * r / (p + r)], -1)


def draws(n: int, times: int = 2000) -> np.ndarray:
    "Pages drawn with replacement, the same for all extractors."
    return np.random.default_rng(0).integers(0, n, (times, n))


def is_dev(name: str) -> bool:
    "Half of the articles, by a hash of their name."
    return hashlib.sha256(name.encode()).digest()[0] % 2 == 0


def load(data: Path) -> tuple[dict, dict]:
    "`name -> (page, main text)` of the development part and of the part held back."
    truth = json.loads((data / "web/article_html/ground-truth.json").read_text("utf-8"))
    articles = {k: (gzip.open(data / f"web/article_html/{k}.html.gz").read().decode("utf-8", "replace"), v["articleBody"]) for k, v in truth.items()}
    readability = {p.name: ((p / "source.html").read_text("utf-8"), all_text((p / "expected.html").read_text("utf-8"))) for p in sorted((data / "web/readability").iterdir())}
    return readability | {k: v for k, v in articles.items() if is_dev(k)}, {k: v for k, v in articles.items() if not is_dev(k)}


def extractors() -> dict:
    "Those that are installed."
    found = {"all text": all_text}
    for name, label in (("stdlib", "ours"), ("fast", "resiliparse"), ("careful", "trafilatura")):
        try:
            main_text("<p>a</p>", name)
            found[label] = partial(main_text, extractor=name)
            if name == "careful":
                from trafilatura import extract
                found["trafilatura, precision"] = lambda html: extract(html, include_comments=False, favor_precision=True) or ""  # as FineWeb
        except UserError as e:
            print(e)
    return found


def speeds(found: dict, pages: list[str], repetitions: int) -> dict[str, float]:
    "Pages a second of each, the best of some repetitions; they take turns, so that a busy moment does not hit one alone."
    best = dict.fromkeys(found, np.inf)
    for _ in range(repetitions):
        for name, f in found.items():
            start = time.perf_counter()
            for page in pages:
                f(page)
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: len(pages) / seconds for name, seconds in best.items()}


def table(pages: dict, repetitions: int) -> tuple[list[dict], dict]:
    "Rows of figures, and the scores of each page for comparisons."
    rows, scores, found = [], {}, extractors()
    speed = speeds(found, [page for page, _ in pages.values()], repetitions)
    for name, f in found.items():
        scores[name] = np.array([page_score(true, f(page)) for page, true in pages.values()])
        p, r, f1_ = f1(scores[name])
        low, high = np.quantile(f1(scores[name][draws(len(pages))])[:, 2], [0.025, 0.975])
        rows.append({"extractor": name, "precision": p, "recall": r, "f1": f1_, "f1_low": low, "f1_high": high, "empty": int(np.isnan(scores[name][:, 0]).sum()),
                     "pages_per_second": speed[name]})
        print(f"{name:24} P {p:.3f} R {r:.3f} F1 {f1_:.3f} ({low:.3f} to {high:.3f}) {rows[-1]['pages_per_second']:.0f} pages/s")
    return rows, scores


def differences(scores: dict) -> list[dict]:
    "F1 of ours minus another's, with a paired bootstrap."
    out, picks = [], draws(len(scores["ours"]))
    for name in sorted(scores.keys() - {"ours"}):
        boot = f1(scores["ours"][picks])[:, 2] - f1(scores[name][picks])[:, 2]
        low, high = np.quantile(boot, [0.025, 0.975])
        out.append({"a": "ours", "b": name, "difference": f1(scores["ours"])[2] - f1(scores[name])[2], "low": low, "high": high})
    return out


def blocks(pages: dict) -> dict:
    "Of blocks by length and link density: how many, and the share whose words are nearly all in the article."
    lengths, densities = [0, 20, 40, 80, 160, 320, np.inf], [0, 0.01, 1 / 3, 2 / 3, 1.01]
    n, inside = np.zeros((4, 6), int), np.zeros((4, 6))
    for page, article in pages.values():
        known = shingles(article)
        for b in Page(page).blocks:
            own = shingles(b.text)
            i, j = np.searchsorted(densities, min(1.0, b.linked / len(b.text)), "right") - 1, np.searchsorted(lengths, len(b.text), "right") - 1
            n[i, j] += 1
            inside[i, j] += bool(own) and sum((own & known).values()) >= 0.8 * sum(own.values())
    return {"lengths": ["< 20", "20–39", "40–79", "80–159", "160–319", "≥ 320"], "densities": ["none", "up to ⅓", "⅓ to ⅔", "over ⅔"],
            "n": n.tolist(), "in_article": np.round(inside / np.maximum(n, 1), 3).tolist()}


if __name__ == "__main__":
    options = arguments(__doc__, repetitions=5)
    dev, test = load(testdata())
    dev_rows, _ = table(dev, 1)
    rows, scores = table(test, options.repetitions)
    plain = lambda x: {k: round(float(v), 4) if isinstance(v, float) else v for k, v in x.items()}
    figures = {"n_dev": len(dev), "n_test": len(test), "mean_bytes": round(np.mean([len(p.encode()) for p, _ in test.values()])),
               "dev": [{k: v for k, v in plain(r).items() if k != "pages_per_second"} for r in dev_rows], "test": [plain(r) for r in rows], "blocks": blocks({k: v for k, v in dev.items() if len(k) == 64}), "differences": [plain(d) for d in differences(scores)]}
    if options.save:
        save("html_extraction", "Main text of labelled pages: precision, recall, F1 of 4-shingles; settings of ours chosen on the development part", figures, ("resiliparse", "trafilatura"))
