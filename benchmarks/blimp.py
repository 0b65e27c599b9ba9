"""BLiMP's minimal pairs (the paradigms of the test data) by the models of laptop runs, and by the same model before any training; and, for each paradigm, how often the
right sentence is the one of fewer tokens (ties count one half).

Needs finished runs, for instance `llm_course run --size laptop` and `llm_course run --size laptop --set seed=1 --out runs/laptop_seed1`; their
folders are given with commas between them. Answers are kept in runs/blimp_eval."""
from pathlib import Path

import torch

from llm_course.benchmarks import blimp_suite
from llm_course.hub import load_model
from llm_course.lm import ModelLM
from llm_course.model import Transformer
from llm_course.suites import run_suite
from llm_course.tokenizer import Tokenizer
from record import arguments, command_of, rounded, save, testdata

STAGES = ("untrained", "base", "sft", "ppo", "dpo")


def main():
    options, rows = arguments(__doc__, runs="runs/laptop,runs/laptop_seed1"), []
    suite = blimp_suite(testdata() / "eval" / "blimp")
    for run in map(Path, options.runs.split(",")):
        for stage in STAGES:
            model, tokenizer = load_model(run / ("base" if stage == "untrained" else stage)), Tokenizer.load(run / "base")
            if stage == "untrained":
                torch.manual_seed(0)
                model = Transformer(model.config)
            sizes = {}
            for i in suite.items:
                good, bad = (len(tokenizer.encode(i[k])) for k in ("good", "bad"))
                sizes.setdefault(i["uid"], []).append((good < bad) + (good == bad) / 2)
            result = run_suite(ModelLM(model.eval(), tokenizer, name=f"{run.name}-{stage}", batch_size=64), suite, "runs/blimp_eval", batch_size=256)
            rows.append({"run": command_of(run), "stage": stage, **result["metrics"]["acc"], "by": {k: v["value"] for k, v in result["by"].items()}, "shorter": {k: sum(v) / len(v) for k, v in sizes.items()}})
            print({k: v for k, v in rows[-1].items() if k not in ("run", "by", "shorter")}, flush=True)
    if options.save:
        save("blimp", f"accuracy on BLiMP, {len(suite.items)} pairs of {len(rows[0]['by'])} paradigms; stages of laptop runs", rounded({"rows": rows}), packages=("tokenizers",))


if __name__ == "__main__":
    main()
