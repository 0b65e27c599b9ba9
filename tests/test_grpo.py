"""GRPO and its kin: killed, on two processes, and what must hold for any rewards. Started as a program it is the run that several processes share."""
import json
import os
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from commands import as_launched, wait_for
from pairs import assert_same_end
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_course.grpo import ADVANTAGES, LOSS_TYPES, METHODS, GRPOConfig, answer_weights, group_advantages, group_stats, train_grpo, verified_scorer, task_prompts
from llm_course.reading import UserError
from llm_course.step import TrainConfig
from llm_course.tokenizer import train_tokenizer
from llm_course.trainer import sum_over_processes  # noqa: F401  (loaded before processes are started)
from llm_course.world import answer, make_tasks, make_village
from safetensors.torch import save_file
from test_ppo import digest, killed_often, lives, told, train  # noqa: F401  (lives is a fixture)

RUNS = {**{name: ("grpo", METHODS[name]) for name in METHODS}, "grpo, twice": ("grpo", {"loss_type": "grpo", "clip_high": 0.3}), "bnpo": ("grpo", {"loss_type": "bnpo"}), "divided": ("grpo", {"divide": True}),
        "ppo after, adaptive": ("ppo", {"score_at": "after"}), "ppo whitened, k3": ("ppo", {"whiten_rewards": True, "kl_estimator": "k3", "divide": True})}


def all_runs(folder: Path) -> None:
    "Every method, a few steps, with shares that are not equal: weights and curves."
    torch.set_num_threads(1)
    curves = {}
    for name, (kind, options) in RUNS.items():
        trainer = train(kind, steps=6, **options)
        curves[name] = told(trainer.history)
        weights = trainer.weights()
        if int(os.environ.get("RANK", "0")) == 0:
            save_file(weights, folder / f"{name}.safetensors")
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "curves.json").write_text(json.dumps(curves))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    all_runs(one)
    wait_for(as_launched(2, Path(__file__), two, ACCELERATE_USE_CPU="yes"))
    return one, two


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_end_where_one_ends(folders, name):
    assert_same_end(folders, name)


def test_killed_at_random_moments_it_ends_as_if_nothing_had_been(lives, tmp_path):  # noqa: F811
    reached = killed_often("grpo", tmp_path, lives)
    whole = train("grpo")
    assert (tmp_path / "end").read_text() == digest(whole), reached
    assert told(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())) == told(whole.history), reached


# ---- what holds for any rewards

rewards = st.tuples(st.integers(1, 4), st.integers(2, 6)).flatmap(
    lambda shape: st.tuples(st.just(shape[1]), st.lists(st.floats(-5, 5), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])))


@settings(max_examples=80, deadline=None)
@given(rewards, st.floats(-3, 3))
def test_advantages_of_any_rewards(case, shift):
    group, values = case
    r = torch.tensor(values, dtype=torch.float64)
    for kind in ADVANTAGES:
        a = group_advantages(r, group, kind)
        assert torch.isfinite(a).all() and abs(a.sum()) < 1e-6
        assert torch.allclose(a, group_advantages(r + shift, group, kind), atol=1e-3), f"{kind}: a constant must not matter"
    assert torch.allclose(group_advantages(r, group, "rloo"), group / (group - 1) * group_advantages(r, group, "dr_grpo"), atol=1e-9)
    alike = r.view(-1, group).std(1) == 0
    for kind in ("rloo", "grpo", "dr_grpo"):
        assert (group_advantages(r, group, kind).view(-1, group)[alike].abs() < 1e-9).all()


def test_what_is_refused():
    with pytest.raises(UserError, match="groups of 3"):
        group_advantages(torch.zeros(4), 3)
    with pytest.raises(UserError, match="groups of 1"):
        group_advantages(torch.zeros(4), 1, "rloo")
    with pytest.raises(UserError, match="unknown"):
        group_advantages(torch.zeros(4), 2, "ppo")
    with pytest.raises(UserError, match="loss_type"):
        answer_weights(torch.ones(2, 3), "sum", 5)
    for change in ({"group": 1}, {"advantage": "best"}, {"loss_type": "mean"}, {"kl_in": "both"}, {"temperature": 0.0}):
        with pytest.raises(UserError, match=next(iter(change))):
            GRPOConfig(**change)
    with pytest.raises(UserError, match="prompts"):
        train_grpo(None, [], None, TrainConfig(1), GRPOConfig(), None)


def test_weights_in_parts_add_up_to_the_whole():
    "A step that is divided gives the mean over the whole: sums and divisors are taken over the rows of a generation."
    mask = (torch.arange(7) < torch.tensor([7, 2, 1, 5, 3, 3])[:, None]).double()
    loss = torch.randn(6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind in LOSS_TYPES:
        weights, divisor = answer_weights(mask, kind, 9)
        whole = (loss * weights).sum() / divisor.sum()
        parts = [((loss * weights)[rows].sum(), divisor[rows].sum()) for rows in ([0, 3], [1], [2, 4, 5])]
        assert torch.allclose(whole, sum(a for a, _ in parts) / sum(b for _, b in parts))
    total = (loss * mask).sum()
    assert torch.allclose((loss * answer_weights(mask, "dapo", 9)[0]).sum() / answer_weights(mask, "dapo", 9)[1].sum(), total / mask.sum())
    assert torch.allclose((loss * answer_weights(mask, "dr_grpo", 9)[0]).sum() / answer_weights(mask, "dr_grpo", 9)[1].sum(), total / 54)


def test_group_statistics_count_groups_that_teach_nothing():
    stats = group_stats(torch.tensor([1, 1, 0, 0, 1, 0, 1, 1.0]), 2)
    assert (stats["frac_reward_zero_std"], stats["groups/all_right"], stats["groups/all_wrong"], stats["reward"]) == (0.75, 0.5, 0.25, 0.625)


def test_the_verifier_wants_the_right_answer_and_its_end():
    village = make_village(n_people=20)
    tasks = make_tasks(village, "train", 5, kinds=("counting", "reading"))
    tokenizer = train_tokenizer([t["prompt"] for t in tasks], 400)
    score, prompts = verified_scorer(tasks, tokenizer), task_prompts(tasks, tokenizer)
    import random
    said = lambda t, **kw: tokenizer.encode(" " + answer(t, random.Random(0), "plain", **kw))
    right, wrong = [said(t) for t in tasks], [said(t, wrong=True) for t in tasks]
    assert score(prompts, [a + [tokenizer.end_id] for a in right]) == [1.0] * len(tasks)
    assert score(prompts, right) == [0.0] * len(tasks), "an answer that does not end is not finished"
    assert score(prompts, [a + [tokenizer.end_id] for a in wrong]) == [0.0] * len(tasks)


if __name__ == "__main__":
    all_runs(Path(sys.argv[1]))
