"""How often `decode` gets a file's text right: the labelled files of chardet's test set, whole and in short pieces.

The files were split in two by a hash of their names. The candidates of `decode` and its three numbers (margin and weights of chaos and coherence) were chosen on pieces of
one half and of texts in fourteen languages from elsewhere (parallel treebanks, Declaration of Human Rights); the figures are from the other half."""
import hashlib
import re
from collections import Counter
from pathlib import Path

from record import arguments, save, testdata

from llm_course.cleaning import wilson
from llm_course.reading import decode

FAMILIES = {"Unicode and ASCII": "utf-|ascii", "Japanese": "cp932|euc-jp|shift_jis|iso-2022-jp", "Chinese": "big5|gb2312|euc-tw", "Korean": "cp949|euc-kr|johab|iso-2022-kr",
            "Cyrillic": "ibm|koi8|maccyr|-5-|1251", "Central European": "-2-|1250", "Western European": "8859-1$|1252", "Turkish": "turkish", "Greek": "greek", "Hebrew, Arabic, Thai": "1255|1256|tis"}
CODECS = {"maccyrillic": ["mac_cyrillic"], "tis-620": ["cp874"], "gb2312": ["gb18030"], "big5": ["big5hkscs", "cp950", "big5"], "shift_jis": ["cp932", "shift_jis"], "cp949": ["cp949"], "euc-kr": ["cp949"],
          "iso-8859-1": ["cp1252", "latin-1"], "iso-2022-jp": ["iso2022_jp_2"], "iso-2022-kr": ["iso2022_kr"], "utf-8-sig": ["utf-8-sig"]}
DECLARATION = re.compile(rb"""(encoding|charset)(\s*=\s*["']?)([\w-]+)""", re.I)


def truths(folder: str, raw: bytes) -> list[str]:
    "The texts that the true codec (or one that contains it) makes of the bytes."
    name = re.sub(r"(8859-\d+|125\d)-[a-z]+$", r"\1", folder.lower())
    texts = []
    for codec in CODECS.get(name, [name]):
        try:
            texts.append(raw.decode(codec))
        except (UnicodeError, LookupError):
            pass
    return texts


def files(root: Path) -> list[dict]:
    found = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        folder, raw = path.parent.name, path.read_bytes()
        family = next(k for k, pattern in FAMILIES.items() if re.search(pattern, folder.lower()))
        half = hashlib.sha256((folder + path.name).encode()).digest()[0] % 2
        found.append({"family": family, "folder": folder, "raw": raw, "texts": truths(folder, raw), "half": "test" if half else "development"})
    return found


def right(text: str | None, texts: list[str]) -> bool:
    return text is not None and text.lstrip("\ufeff") in [t.lstrip("\ufeff") for t in texts]


def ours(raw: bytes) -> str:
    return decode(raw).text


def default_of_charset_normalizer(raw: bytes) -> str | None:
    from charset_normalizer import from_bytes
    best = from_bytes(raw).best()
    return str(best) if best else None


def resiliparse(raw: bytes) -> str | None:
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    try:
        return raw.decode(detect_encoding(raw, max_len=1 << 20))
    except (UnicodeError, LookupError, TypeError):
        return None


def score(data: list[dict], method, change=lambda raw: raw) -> dict:
    good = [right(method(change(d["raw"])), truths(d["folder"], change(d["raw"]))) for d in data]
    low, high = wilson(sum(good), len(good))
    return {"right": sum(good), "n": len(good), "low": round(low, 3), "high": round(high, 3)}


def undeclared(raw: bytes) -> bytes:
    "The file without what it says of its encoding."
    return DECLARATION.sub(lambda m: m[1] + m[2] + b"x" * len(m[3]), raw)


def pieces(text: str, codec: str, size: int, count: int = 5) -> list[str]:
    "Evenly spaced pieces of a text without its markup, each with letters outside ASCII."
    text = re.sub(r"<[^<>]*>|&\w+;", " ", text)
    text = re.sub(r"\s+", " ", text)
    found = [text[i:i + size].strip() for i in range(0, len(text) - size, max(1, (len(text) - size) // count))] if len(text) > size else []
    return [p for p in found if not p.isascii()][:count]


def by_length(data: list[dict]) -> list[dict]:
    rows = []
    for size in (8, 16, 32, 64, 128, 256, 512, 1024):
        row = {"characters": size}
        for kind in ("one byte a letter", "several bytes a letter"):
            good, n, utf8 = 0, 0, 0
            for d in data:
                if (kind[0] == "s") == (d["family"] in ("Japanese", "Chinese", "Korean")) and d["family"] != "Unicode and ASCII" and d["texts"] and "2022" not in d["folder"]:
                    name = re.sub(r"(8859-\d+|125\d)-[a-z]+$", r"\1", d["folder"].lower())
                    codec = CODECS.get(name, [name])[0]
                    for piece in pieces(d["texts"][0], codec, size):
                        raw = piece.encode(codec, "ignore")
                        got = decode(raw)
                        good, n, utf8 = good + (got.text == raw.decode(codec)), n + 1, utf8 + (got.how == "utf-8")
            row[kind] = {"right": good, "n": n, "taken for utf-8": utf8}
        rows.append(row)
    return rows


def main() -> None:
    args = arguments(__doc__)
    data = files(testdata() / "web" / "encodings")
    no_codec = [d["folder"] for d in data if not d["texts"]]
    data = [d for d in data if d["texts"]]
    test, dev = ([d for d in data if d["half"] == half] for half in ("test", "development"))
    methods = {"decode": ours, "charset-normalizer, default": default_of_charset_normalizer, "resiliparse": resiliparse}
    figures = {"files": len(data), "without_a_codec_in_python": no_codec, "development": score(dev, ours), "test": score(test, ours),
               "families": {k: score([d for d in test if d["family"] == k], ours) for k in FAMILIES if any(d["family"] == k for d in test)},
               "methods": {k: {"as they are": score(test, m), "declarations masked": score(test, m, undeclared)} for k, m in methods.items()},
               "how": dict(Counter(decode(d["raw"]).how for d in test)),
               "wrong": dict(Counter(f"{d['folder']} as {decode(d['raw']).encoding}" for d in test if not right(ours(d["raw"]), d["texts"]))),
               "by_length": by_length(test)}
    for key, value in figures.items():
        print(key, value)
    if args.save:
        save("encodings", "files of known encoding (chardet's test set) decoded: right where the text equals that of the true codec; figures from the half that no setting was chosen on",
             figures, ("charset-normalizer", "resiliparse"))


if __name__ == "__main__":
    main()
