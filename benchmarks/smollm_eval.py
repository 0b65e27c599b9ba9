"""SmolLM2-135M-Instruct (GGUF, Q4_1) on the course's suites: the reference row of the tables.

Needs the file (see llm_course.gguf_io.find_smollm2) and the benchmarks of the test data. Answers are kept in runs/smollm_eval, so it can be
stopped and started again; `--only` runs some suites."""
import time
from dataclasses import replace
from pathlib import Path

from llm_course.benchmarks import blimp_suite, completion_suite, gsm8k_suite, mmlu_suite
from llm_course.gguf_io import find_smollm2, from_gguf
from llm_course.ifeval import ifeval_suite
from llm_course.lm import ModelLM
from llm_course.sandbox import humaneval_suite
from llm_course.suites import Suite, run_suite, shipped_suites
from record import arguments, rounded, save, testdata


def mmlu_cloze(folder: Path) -> Suite:
    "MMLU without letters or examples: which answer, written out, is the likeliest after the question?"
    items = mmlu_suite(folder / "mmlu" / "test", folder / "mmlu" / "dev").items
    return completion_suite([{"id": i["id"], "pairs": [(f"Question: {i['question']}\nAnswer:", f" {c}") for c in i["choices"]], "gold": i["answer"]} for i in items], "mmlu_cloze")


def recipes(folder: Path) -> dict:
    "Each suite with how many of its items are asked (0: all)."
    core = lambda name: lambda: completion_suite(folder / "core" / f"{name}.jsonl")
    return {"blimp": (lambda: blimp_suite(folder / "blimp"), 0), "mmlu": (lambda: mmlu_suite(folder / "mmlu" / "test", folder / "mmlu" / "dev"), 700), "mmlu_cloze": (lambda: mmlu_cloze(folder), 700),
            **{n: (core(n), 500) for n in ("arc_easy", "arc_challenge", "piqa", "openbook_qa", "lambada_openai")}, "winogrande": (core("winogrande"), 0), "copa": (core("copa"), 0),
            "gsm8k": (lambda: gsm8k_suite(folder / "gsm8k" / "test_first700.jsonl", folder / "gsm8k" / "train_1000.jsonl", 5), 100),
            "ifeval": (lambda: ifeval_suite(folder / "ifeval" / "input_data.jsonl"), 200),
            "gsm8k_chat": (lambda: gsm8k_suite(folder / "gsm8k" / "test_first700.jsonl", chat=True, name="gsm8k_chat"), 100),
            "humaneval": (lambda: humaneval_suite(folder / "HumanEval.jsonl.gz"), 0),
            "humaneval_chat": (lambda: replace(humaneval_suite(folder / "HumanEval.jsonl.gz", chat=True), name="humaneval_chat"), 0),
            **{name: ((lambda s: lambda: s)(s), 0) for name, s in shipped_suites().items()}}


def main():
    options = arguments(__doc__, only="", batch_size=16)
    lm = ModelLM(*from_gguf(find_smollm2()), batch_size=options.batch_size, name="SmolLM2-135M-Instruct-Q4_1", context=2048)
    figures = {}
    for name, (make, limit) in recipes(testdata() / "eval").items():
        if options.only and name not in options.only.split(","):
            continue
        start, suite = time.perf_counter(), make()
        result = run_suite(lm, suite, "runs/smollm_eval", limit or None, 16, say=lambda t: print(t, f"{time.perf_counter() - start:.0f} s", flush=True))
        figures[name] = {"main": result["main"], "chance": result["chance"], "asked": result["n"], "of": len(suite.items), "metrics": result["metrics"], "by": result["by"]}
        print(name, {k: (v["value"], v["low"], v["high"]) for k, v in result["metrics"].items()}, flush=True)
    if options.save:
        save("smollm_eval", "SmolLM2-135M-Instruct, 4-bit, on the course's suites; context 2048, greedy", rounded(figures), packages=("gguf", "tokenizers"))


if __name__ == "__main__":
    main()
