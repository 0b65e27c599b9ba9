"""Preference training on a tiny model, for one process or several: python preference_program.py FOLDER (see test_preference.py)."""
import copy
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from llm_course.formats import pair_to_kto
from llm_course.model import ModelConfig, Transformer
from llm_course.preference import train_preference, unpaired_examples
from llm_course.reward import pair_examples
from llm_course.step import TrainConfig
from llm_course.tokenizer import train_tokenizer
from llm_course.trainer import seed_all
from llm_course.world import make_village, preference_rows

T = 96
ARMS = {"kto single": {"kind": "kto"}, "kto pairs": {"kind": "kto", "packed": False}, "orpo": {"kind": "orpo", "prompt_loss": True}, "dpo": {"kind": "dpo", "alpha": 0.1}}


def material() -> tuple:
    "Tokenizer, starting model, single answers and pairs: the same in every process."
    pairs = preference_rows(make_village(n_people=20), 40)
    tokenizer = train_tokenizer([m["content"] for p in pairs for s in ("prompt", "chosen", "rejected") for m in p[s]], 400)
    seed_all(0)
    start = Transformer(ModelConfig(len(tokenizer), dim=32, n_layers=2, n_heads=2, max_seq_len=T))
    rows = [r for i, p in enumerate(pairs) for r in pair_to_kto(p) if r["label"] or i % 2]      # fewer undesirable ones
    return tokenizer, start, unpaired_examples(rows, tokenizer, T)[0], pair_examples(pairs, tokenizer, T)[0]


def config(**kw) -> TrainConfig:
    return TrainConfig(**({"steps": 4, "batch_size": 7, "micro_batch": 2, "lr": 3e-3, "log_every": 1, "eps": 1e-6} | kw))


def train_all(folder: Path) -> None:
    "Train by each of `ARMS`; the main process writes curves and weights below `folder`."
    torch.set_num_threads(1)
    tokenizer, start, single, pairs = material()
    curves, models = {}, {}
    for name, options in ARMS.items():
        models[name] = copy.deepcopy(start)
        history = train_preference(models[name], single if name == "kto single" else pairs, config(), tokenizer, reference=start, **options).history
        curves[name] = [{k: v for k, v in r.items() if k != "seconds"} for r in history]
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "curves.json").write_text(json.dumps(curves))
        for name, model in models.items():
            save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    train_all(Path(sys.argv[1]))
