"""Every stage that trains, on two processes: it ends where one process ends. One program runs them all, once alone and once as a pair."""
import json
import os
from pathlib import Path

import pytest
from commands import as_launched, wait_for
from pairs import assert_same_end
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("stages_program.py")
STAGES = ("pretrain", "sft", "reward", "dpo", "ppo", "ppo divided")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    "What one process wrote, and what two wrote."
    import stages_program
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    stages_program.all_stages(one)
    os.symlink(one / "tokenizer", two / "tokenizer")
    wait_for(as_launched(2, PROGRAM, two, ACCELERATE_USE_CPU="yes"))
    return one, two


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_end_where_one_ends(folders, stage):
    assert_same_end(folders, stage)


def test_the_stages_learn(folders):
    "The comparison would say nothing about models that do not move."
    start = load_file(folders[0] / "pretrain.safetensors")
    for stage in STAGES[1:]:
        now = load_file(folders[0] / f"{stage}.safetensors")
        moved = [float((now[k] - start[n]).abs().max()) for k in now if (n := k.removeprefix("body.").removeprefix("policy.")) in start]
        assert max(moved) > 1e-3, stage


def test_divided_answers_are_others(folders):
    "Seeds of their own give other answers than one generator for all: the choice is part of the run."
    curves = json.loads((folders[0] / "curves.json").read_text())
    assert curves["ppo"][0]["score"] != curves["ppo divided"][0]["score"]
