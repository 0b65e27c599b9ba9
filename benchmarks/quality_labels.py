"""Quality scores against people: 250 web pages that people labelled good or bad (DCLM), scored by classifiers with different positives.

Nothing is chosen on the labels: the classifier's settings are its defaults, and every choice of positives that was tried is reported."""
import json
import re

import numpy as np
from record import arguments, save, testdata

from llm_course.classifier import QualityClassifier, auc, bootstrap_interval, kept_curve
from llm_course.quality import KneserNey, lm_tokens
from llm_course.reading import read_rows

STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
SHARES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def passages(text: str, size: int = 2000) -> list[str]:
    "A long text in passages of some `size` characters, cut between lines."
    out, part = [], ""
    for line in text.splitlines():
        part += line + "\n"
        if len(part) >= size:
            out.append(part)
            part = ""
    return out


def without_marks(text: str) -> str:
    "WikiText without its tokenizer's marks, which would give it away."
    text = re.sub(r" @([-,.])@ ", r"\1", text).replace("<unk>", "")
    return re.sub(r" +([.,;:!?')])", r"\1", re.sub(r"^ *=.*=\s*$", "", text, flags=re.M))


def positives(data) -> dict[str, list[str]]:
    "The sets of good examples: name -> texts."
    read = lambda *names: [t for n in names for t in passages((data / n).read_text(encoding="utf-8", errors="replace"))]
    rows = lambda name: [row for _, row in read_rows(data / name)]
    wiki = [t for n in ("valid", "test") for t in passages(without_marks((data / f"pretrain/wikitext-2/{n}.txt").read_text(encoding="utf-8")))]
    answers = [r["output"] for r in rows("instruct/alpaca_en_demo.json")] + [r["response"] for r in rows("instruct/dolly_hhrlhf_small.jsonl")]
    long_answers = [r["chosen"]["value"] for r in rows("pref/dpo_en_demo.json")]
    return {"Wikipedia (WikiText-2)": wiki, "pages that Wikipedia cites (CS336)": read("web/cs336/high_quality_wiki_reference.txt"),
            "novels (Gutenberg)": read(*(f"pretrain/gutenberg/{n}.txt" for n in ("austen-emma", "melville-moby_dick", "carroll-alice", "bryant-stories"))),
            "short answers (Alpaca, Dolly)": answers, "long answers (chosen in preference pairs)": long_answers,
            "children's stories (TinyStories)": read("pretrain/tinystories_excerpt.txt")}


def rules_passed(text: str) -> int:
    "How many of six Gopher quality rules a text passes, and its share of letters as the seventh."
    words = text.split()
    if not words:
        return 0
    lines, mean = text.splitlines(), np.mean([len(w) for w in words])
    return sum([50 <= len(words) <= 100_000, 3 <= mean <= 10, text.count("#") / len(words) <= 0.1, (text.count("...") + text.count("…")) / len(words) <= 0.1,
                np.mean([s.rstrip().endswith(("...", "…")) for s in lines]) <= 0.3, len(STOP_WORDS & {w.lower() for w in words}) >= 2,
                np.mean([any(c.isalpha() for c in w) for w in words]) >= 0.8])


def auc_same_length(labels, scores, strata) -> float:
    "AUC over the pairs of a good and a bad text from the same stratum of length."
    right = pairs = 0.0
    for s in np.unique(strata):
        at = strata == s
        n = int(labels[at].sum()) * int((1 - labels[at]).sum())
        right, pairs = right + (n * auc(labels[at], scores[at]) if n else 0), pairs + n
    return right / pairs if pairs else float("nan")


def cross_validated(texts, labels, folds: int = 10) -> np.ndarray:
    "Scores of each text by a classifier trained on the other folds' human labels."
    fold = np.random.default_rng(0).permutation(len(texts)) % folds
    scores = np.zeros(len(texts))
    for k in range(folds):
        train = np.flatnonzero(fold != k)
        scores[fold == k] = QualityClassifier().fit([texts[i] for i in train], labels[train]).logits([texts[i] for i in np.flatnonzero(fold == k)])
    return scores


def main():
    options = arguments(__doc__, resamples=2000)
    data = testdata()
    rows = [json.loads(line) for line in (data / "web/dclm_quality_labels.jsonl").read_text(encoding="utf-8").splitlines()]
    texts, labels = [r["text"] for r in rows], np.array([r["label"] for r in rows])
    negatives = [r["text"] for _, r in read_rows(data / "web/c4_demo.jsonl")]
    overheard = passages((data / "pretrain/messy_webtext/overheard.txt").read_text(encoding="utf-8", errors="replace"))
    length = np.array([len(t) for t in texts])
    strata = np.searchsorted(np.percentile(length, [20, 40, 60, 80]), length)
    good = positives(data)
    fitted = lambda examples, rest, **kw: QualityClassifier(**kw).fit(examples + rest, [1] * len(examples) + [0] * len(rest)).logits(texts)
    scores = {f"classifier: {name}": fitted(examples, negatives + overheard) for name, examples in good.items()}
    model = KneserNey().fit(good["Wikipedia (WikiText-2)"])
    scores["perplexity under WikiText-2 (lower is better)"] = -np.log(model.perplexities(texts))
    scores["rules passed (Gopher quality)"] = np.array([rules_passed(t) for t in texts], float)
    scores["length in characters"] = length.astype(float)
    scores["classifier: the labels themselves, cross-validated"] = cross_validated(texts, labels)
    out = {}
    for name, s in scores.items():
        out[name] = {"auc": bootstrap_interval(auc, labels, s, resamples=options.resamples),
                     "auc_same_length": bootstrap_interval(auc_same_length, labels, s, strata, resamples=options.resamples)}
        if name.removeprefix("classifier: ") in good:
            out[name]["examples"] = len(good[name.removeprefix("classifier: ")])
        print(f"{name:55} {out[name]['auc']['value']:.3f} {out[name]['auc']['low']:.3f} {out[name]['auc']['high']:.3f}   {out[name]['auc_same_length']['value']:.3f}")
    kept = {n: [float(kept_curve(labels, s)["precision"][max(0, round(x * len(labels)) - 1)]) for x in SHARES] for n, s in scores.items()}
    change = {name: {"only C4 as negatives": auc(labels, fitted(e, negatives)), **{f"C={c}": auc(labels, fitted(e, negatives + overheard, C=c)) for c in (0.1, 10.0, 100.0)},
                     "at most 600 characters of each text": auc(labels, fitted([t[:600] for t in e], [t[:600] for t in negatives + overheard]))} for name, e in good.items()}
    for name, c in change.items():
        print(name, {k: round(v, 3) for k, v in c.items()})
    figures = {"n": len(labels), "good": int(labels.sum()), "median_characters": {"good": float(np.median(length[labels == 1])), "bad": float(np.median(length[labels == 0]))},
               "negatives": f"{len(negatives)} pages of C4, {len(overheard)} passages of overheard talk", "tokens_of_the_reference": sum(len(lm_tokens(t)) for t in good["Wikipedia (WikiText-2)"]),
               "scores": out, "kept_shares": SHARES, "kept": kept, "sensitivity_auc": change}
    if options.save:
        save("quality_labels", "AUC of quality scores against 250 human labels (DCLM), 95 % bootstrap intervals", figures, ("scikit-learn",))


if __name__ == "__main__":
    main()
