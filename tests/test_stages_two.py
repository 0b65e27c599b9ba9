"""Every stage that trains, on two processes: it ends where one process ends. One program runs them all, once alone and once as a pair."""
import json
import os
from pathlib import Path

import pytest
from commands import as_launched
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
    pair = as_launched(2, PROGRAM, two, ACCELERATE_USE_CPU="yes")
    try:
        for process in pair:
            said, _ = process.communicate(timeout=200)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in pair:
            process.kill()
    return one, two


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_end_where_one_ends(folders, stage):
    one, two = (json.loads((f / "curves.json").read_text())[stage] for f in folders)
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        assert all(abs(a[k] - b[k]) < 1e-4 for k in a if k != "tokens"), (a, b)
    before, after = (load_file(f / f"{stage}.safetensors") for f in folders)
    assert before.keys() == after.keys()
    assert max(float((before[k] - after[k]).abs().max()) for k in before) < 1e-4


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
