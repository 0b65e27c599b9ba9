"""BPE and Unigram, trained on English only and on seven languages evenly: bytes per token, tokens per word and premium over English on
parallel sentences, prose and code that were held back; and compression against the size of the vocabulary."""
import json
import time
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from llm_course.tokenizer import SPECIAL_TOKENS, Tokenizer
from llm_course.unigram import WORDS_WITH_MARKS, count_words, pre_tokenizer, ratio_interval, text_sizes, train_unigram, train_unigram_tokenizer, unigram_tokenizer
from record import arguments, save, testdata

LANGUAGES = ("en", "de", "ru", "ar", "hi", "ko", "zh")
SIZES, CURVE = (2048, 8192), (300, 512, 1024, 2048, 4096, 8192, 16384)


def held_back(number: int) -> bool:
    "Three of ten blocks of twenty sentences: neighbours, which often come from one article, stay together."
    return number // 20 % 10 in (3, 6, 9)


def sentences(folder: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    "Parallel sentences by language, to train on and held back: the same numbers in each language."
    texts = {lang: (folder / f"{lang}.txt").read_text(encoding="utf-8").splitlines() for lang in LANGUAGES}
    part = lambda back: {lang: [t for n, t in enumerate(lines) if held_back(n) == back] for lang, lines in texts.items()}
    return part(False), part(True)


def paragraphs(path: Path, at_least: int = 200) -> list[str]:
    return [t for t in path.read_text(encoding="utf-8").splitlines() if len(t) >= at_least]


def up_to(texts: list[str], n_bytes: int) -> list[str]:
    "Texts from the beginning, until `n_bytes` are reached."
    out, size = [], 0
    for text in texts:
        if size >= n_bytes:
            break
        out.append(text)
        size += len(text.encode())
    return out


def library_trainer(model, trainer, vocab_size: int, texts: list[str], pattern: str = "") -> Tokenizer:
    "A tokenizer trained by a trainer of `tokenizers`, with the frame that all share."
    fast = FastTokenizer(model())
    fast.pre_tokenizer, fast.decoder = pre_tokenizer(pattern), decoders.ByteLevel()
    fast.train_from_iterator(texts, trainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return Tokenizer(fast)


KINDS = {
    "bpe": lambda texts, v: library_trainer(models.BPE, trainers.BpeTrainer, v, texts),
    "unigram": lambda texts, v: train_unigram_tokenizer(texts, v),
    "unigram, trainer of tokenizers": lambda texts, v: library_trainer(models.Unigram, trainers.UnigramTrainer, v, texts),
    "bpe, marks in words": lambda texts, v: library_trainer(models.BPE, trainers.BpeTrainer, v, texts, WORDS_WITH_MARKS),
    "unigram, marks in words": lambda texts, v: train_unigram_tokenizer(texts, v, WORDS_WITH_MARKS),
}


def rounded(ratio: tuple[float, float, float]) -> dict:
    return dict(zip(("value", "low", "high"), (round(x, 4) for x in ratio)))


def compression(tokenizer: Tokenizer, texts: list[str]) -> dict:
    tokens = text_sizes(texts, "token", tokenizer)
    return {"n": len(texts), "bytes_per_token": rounded(ratio_interval(text_sizes(texts, "byte"), tokens))}


def by_language(tokenizer: Tokenizer, texts: dict[str, list[str]]) -> dict:
    "Compression, fertility (tokens per word; per character for Chinese) and premium over English of each language."
    out, english = {}, text_sizes(texts["en"], "token", tokenizer)
    for lang, lines in texts.items():
        tokens = text_sizes(lines, "token", tokenizer)
        unit = "character" if lang == "zh" else "word"
        per_token = rounded(ratio_interval(text_sizes(lines, "character"), tokens))
        out[lang] = compression(tokenizer, lines) | {"characters_per_token": per_token, "per": unit, "fertility": rounded(ratio_interval(tokens, text_sizes(lines, unit))),
                                                     "premium": rounded(ratio_interval(tokens, english))}
    return out


def compare(train: dict[str, list[str]], back: dict[str, list[str]], prose: list[str], code: list[str], seconds: dict) -> list[dict]:
    rows = []
    for kind, make in KINDS.items():
        for trained_on, texts in train.items():
            for size in SIZES:
                if ("trainer" in kind and size > min(SIZES)) or ("marks" in kind and trained_on == "english"):
                    continue
                start = time.perf_counter()
                tokenizer = make(texts, size)
                seconds[f"{kind}, {trained_on}, {size}"] = round(time.perf_counter() - start, 2)
                rows.append({"kind": kind, "trained_on": trained_on, "vocab_size": size, "tokens": len(tokenizer), "languages": by_language(tokenizer, back),
                             "prose": compression(tokenizer, prose), "code": compression(tokenizer, code)})
                print(kind, trained_on, size, {k: v["premium"]["value"] for k, v in rows[-1]["languages"].items()}, rows[-1]["code"]["bytes_per_token"], flush=True)
    return rows


def curve(train: list[str], prose: list[str], seconds: dict) -> list[dict]:
    rows = []
    for size in CURVE:
        for kind in ("bpe", "unigram", "unigram, trainer of tokenizers"):
            start = time.perf_counter()
            tokenizer = KINDS[kind](train, size)
            seconds[f"{kind}, prose, {size}"] = round(time.perf_counter() - start, 2)
            rows.append({"kind": kind, "vocab_size": size, "tokens": len(tokenizer)} | compression(tokenizer, prose))
            print(rows[-1], flush=True)
    return rows


def seeds(wiki: list[str]) -> list[dict]:
    "How many first pieces are best for 2,048 tokens? On a development part of the training text, never on test text."
    words, rows, cut = count_words(wiki[:600], pre_tokenizer()), [], pre_tokenizer()
    for factor in (2, 3, 5, 10, 25):
        scores = train_unigram(words, 2048 - len(SPECIAL_TOKENS), pre_tokenizers.ByteLevel.alphabet(), seeds=factor)
        tokenizer = unigram_tokenizer(scores, cut)
        rows.append({"seeds": factor, "trained_on": compression(tokenizer, wiki[:150]), "development": compression(tokenizer, wiki[900:1050])})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    args = arguments(__doc__)
    folder = testdata()
    learn, back = sentences(folder / "multilingual" / "pud")
    wiki = paragraphs(folder / "pretrain" / "wikitext-2" / "valid.txt")
    prose = paragraphs(folder / "pretrain" / "wikitext-2" / "test.txt")[:300]
    code = [json.loads(line)["text"] for line in (folder / "code" / "thealgorithms.jsonl").open(encoding="utf-8")][:200]
    mixture = [t for lang in LANGUAGES for t in learn[lang]]
    n_bytes = sum(len(t.encode()) for t in mixture)
    train, seconds = {"english": up_to(learn["en"] + wiki, n_bytes), "seven languages": mixture}, {}
    figures = {"split": "blocks of 20 sentence numbers, those numbered 3, 6 and 9 of each ten held back, in all languages alike",
               "train_bytes": {k: sum(len(t.encode()) for t in v) for k, v in train.items()}, "wiki_bytes": sum(len(t.encode()) for t in wiki),
               "compare": compare(train, back, prose, code, seconds), "curve": curve(wiki, prose, seconds), "seeds": seeds(wiki), "seconds": seconds}
    if args.save:
        save("fertility", __doc__.replace("\n", " "), figures, ("tokenizers",))


if __name__ == "__main__":
    main()
