"""Verdicts of Google's own checkers (google-research, folder instruction_following_eval) on recorded answers, for `ifeval.py --verdicts`.

Runs in an environment of its own, with absl-py, immutabledict, langdetect, nltk and nltk's punkt_tab (NLTK_DATA), and needs nothing of llm_course:
    python benchmarks/ifeval_google.py CODE PROMPTS ANSWERS OUT
CODE is the folder that holds `instruction_following_eval`, OUT a new JSON file. Their code draws at random in places, so it is run once with seed 0
and 20 times more with other seeds: verdicts that ever change are `unsteady`."""
import json
import random
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

RUNS = 21


def verdicts(main, rows: list[dict], answers: list[str], seed: int) -> dict[str, list[list[bool]]]:
    "Strict and loose verdicts of the instructions of each prompt."
    import langdetect
    langdetect.DetectorFactory.seed = seed
    random.seed(seed)
    out: dict[str, list[list[bool]]] = {"strict": [], "loose": []}
    for row, answer in zip(rows, answers):
        for how, check in (("strict", main.test_instruction_following_strict), ("loose", main.test_instruction_following_loose)):
            out[how].append(check(SimpleNamespace(**row), {row["prompt"]: answer}).follow_instruction_list)
    return out


def counts(run: dict) -> dict[str, int]:
    "How many prompts and instructions were followed."
    return {f"{level}_{how}": sum(map(f, run[how])) for how in run for level, f in (("prompt", all), ("instruction", sum))}


def main(code: str, prompts: str, answers: str, out: str) -> None:
    sys.path.insert(0, code)
    from instruction_following_eval import evaluation_main, instructions_util
    read = lambda path: [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    rows, given = read(prompts), read(answers)       # in the same order; one prompt has been mended by a character since the answers were made
    assert len(rows) == len(given) and all(r["prompt"][:40] == a["prompt"][:40] for r, a in zip(rows, given))
    texts = [a["response"] for a in given]
    runs = [verdicts(evaluation_main, rows, texts, seed) for seed in range(RUNS)]
    flat = [{how: [v for vs in run[how] for v in vs] for how in run} for run in runs]
    unsteady = {how: [i for i, first in enumerate(flat[0][how]) if any(f[how][i] != first for f in flat)] for how in flat[0]}
    Path(out).write_text(json.dumps(flat[0] | {"unsteady": unsteady, "counts": [counts(run) for run in runs],
                                               "sentences": [instructions_util.count_sentences(t) for t in texts],
                                               "versions": {p: version(p) for p in ("nltk", "langdetect")}}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
