"""Score the repairs of the cleaning chapter on real files: declared encodings, mojibake, boilerplate lines, personal data."""
import json
import re
import time
from collections import Counter
from pathlib import Path

import ftfy
from html_extraction import all_text, load, shingles
from record import arguments, save, testdata

from llm_course.cleaning import BOILERPLATE, PROSE_STEPS, STEPS, clean_text, declared_encoding, decode_page, drop_boilerplate, fix_mojibake, mask_kinds
from llm_course.cleaning import wilson
from llm_course.reading import codec_of, decode

KIND_NAMES = {"email": "email", "phone_number": "phone", "ip_address": "ip"}


def share(k: int, n: int) -> dict:
    "A share with its 95 % interval."
    low, high = wilson(k, n)
    return {"right": k, "n": n, "low": round(low, 4), "high": round(high, 4)}


def encodings(data: Path) -> dict:
    "Files whose encoding is known by their folder, decoded in three ways; a file that its folder's codec cannot read is left out and counted."
    truth, left_out = [], Counter()
    for path in sorted((data / "web/encodings").glob("*/*")):
        label = path.parent.name
        codec = codec_of(label) or codec_of(re.sub(r"-[a-z]+$", "", label))
        try:
            raw = path.read_bytes()
            truth.append((raw, raw.decode("utf-16" if label == "UTF-16" else "utf-32" if label == "UTF-32" else codec or "no codec").lstrip("\ufeff")))
        except (UnicodeError, LookupError):
            left_out[label] += 1
    declared = [(declared_encoding(raw), raw, text) for raw, text in truth]
    ways = {"UTF-8, replacing what does not fit": lambda raw: raw.decode("utf-8", "replace").lstrip("\ufeff"), "as declared, else UTF-8": lambda raw: raw.decode(declared_encoding(raw) or "utf-8", "replace").lstrip("\ufeff"),
            "decode, ignoring declarations": lambda raw: decode(raw).text.lstrip("\ufeff"), "decode_page": lambda raw: decode_page(raw).text.lstrip("\ufeff")}
    return {"files": len(truth), "left_out": dict(left_out), "declared": sum(d is not None for d, _, _ in declared),
            "declared_right": sum(d is not None and raw.decode(d, "replace").lstrip("\ufeff") == text for d, raw, text in declared),
            "methods": [{"how": how} | share(sum(f(raw) == text for raw, text in truth), len(truth)) for how, f in ways.items()]}


def mojibake(data: Path, articles: list[str]) -> list[dict]:
    "ftfy's collection from the wild; and lines changed in articles that are sound."
    cases = json.loads((data / "web/mojibake/ftfy-in-the-wild.json").read_text("utf-8"))
    lines = [line for a in articles for line in a.split("\n") if line.strip()]
    out = []
    for name, f in (("fix_mojibake", lambda t: fix_mojibake(t)[0]), ("ftfy.fix_text, defaults", ftfy.fix_text), ("encode cp1252, decode UTF-8", undo)):
        right = sum(f(c["original"]) == c.get("fixed-encoding", c["fixed"]) for c in cases)
        out.append({"function": name} | share(right, len(cases)) | {"changed": sum(f(line) != line for line in lines), "lines": len(lines)})
    return out


def undo(text: str) -> str:
    "One layer of cp1252, all or nothing."
    try:
        return text.encode("cp1252").decode("utf-8")
    except UnicodeError:
        return text


def boilerplate(pages: list[tuple[str, str]]) -> dict:
    "Lines of articles that the list removes (errors), and lines of the same pages outside the article (hits)."
    content = [line for _, article in pages for line in article.split("\n") if line.strip()]
    removed = lambda line: drop_boilerplate(f"{line}\nsomething else.")[1] == 1
    other = [line for page, article in pages for line in {x.strip() for x in all_text(page).split("\n")} if line and not shingles(line, 1).keys() <= shingles(article, 1).keys()]
    wrong = [line for line in content if removed(line)]
    c, o = share(len(wrong), len(content)), share(sum(map(removed, other)), len(other))
    return {"content_removed": c["right"], "content_lines": c["n"], "content_low": c["low"], "content_high": c["high"], "other_removed": o["right"], "other_lines": o["n"],
            "other_low": o["low"], "other_high": o["high"], "phrases": dict(Counter(BOILERPLATE.search(line)[0].lower() for line in wrong).most_common())}


def pii(data: Path, articles: list[str]) -> dict:
    "Marked personal data that is masked whole, by kind; matches in ordinary articles."
    marked = {}
    for path in sorted((data / "web/pii").glob("*.txt")):
        text = path.read_text("utf-8")
        for kind in sorted(set(re.findall(r"<([a-z_]+)>", text))):
            values = re.findall(rf"<{kind}>(.*?)</{kind}>", text)
            plain = re.sub(r"</?[a-z_]+>", "", text)
            left = mask_kinds(plain)[0]
            marked[kind.replace("_", " ")] = {"masked": sum(v not in left for v in values), "n": len(values)}
    _, counts = mask_kinds("\n".join(articles))
    return {"marked": marked, "articles": counts, "articles_characters": sum(map(len, articles))}


def speed(articles: list[str]) -> dict:
    "Megabytes of articles a second, each step and the whole chain, the best of three."
    size = sum(len(a.encode()) for a in articles) / 1e6
    out = {}
    for name, f in [(name, STEPS[name]) for name in PROSE_STEPS] + [("whole chain", clean_text), ("ftfy.fix_text, defaults", ftfy.fix_text)]:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            for a in articles:
                f(a)
            times.append(time.perf_counter() - start)
        out[name] = round(size / min(times), 1)
    return out


if __name__ == "__main__":
    options = arguments(__doc__)
    data = testdata()
    dev, test = load(data)
    pages = [v for k, v in (dev | test).items() if len(k) == 64]
    articles = [article for _, article in pages]
    figures = {"encodings": encodings(data), "mojibake": mojibake(data, articles), "boilerplate": boilerplate(pages), "pii": pii(data, articles), "megabytes_per_second": speed(articles)}
    print(json.dumps(figures, indent=1, ensure_ascii=False))
    if options.save:
        save("cleaning", "Repairs on real files: encodings of chardet's test files, ftfy's mojibake in the wild, 91 labelled news pages, marked personal data", figures, ("ftfy", "charset-normalizer", "pylatexenc"))
