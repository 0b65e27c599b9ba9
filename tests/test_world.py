"""The small world reads any text without falling over, in linear time, and gives the same for the same seed."""
import ast
import hashlib
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.course import data_path
from llm_course.world import (FORMS, KINDS, STYLES, answer, baselines, check_story, docstrings, fill, form_is_right, gold_reward, grade, inject_mess,
                              instruction_rows, last_mentioned, make_task, make_tasks, make_village, preference_rows, python_code, python_docs, sft_answer, split_of, story,
                              village_documents, wrong_answer)
from timing import assert_linear, cpu_seconds

VILLAGE = make_village(3, 20)
TASKS = make_tasks(VILLAGE, "test", 4, 3)
relaxed = settings(max_examples=60, deadline=None, derandomize=True)


def digest(x) -> str:
    return hashlib.sha256(json.dumps(x, ensure_ascii=False, sort_keys=True, default=vars).encode()).hexdigest()[:12]


@pytest.mark.parametrize("what, expected", {
    "village": "7cfa6aae920b", "documents": "3b440693aecd", "mess": "881754923ab4", "tasks": "3ba26794b222", "instructions": "2c8567305e1d", "pairs": "4d8123cddc2f"}.items())
def test_what_a_seed_gives_does_not_change(what, expected):
    "Records of runs are compared with each other: they must have read the same data."
    made = {"village": lambda: VILLAGE.people, "documents": lambda: village_documents(VILLAGE, 20_000, 3), "mess": lambda: inject_mess(village_documents(VILLAGE, 60_000, 3), 0.05, 3),
            "tasks": lambda: make_tasks(VILLAGE, "test", 5, 3), "instructions": lambda: instruction_rows(VILLAGE, 20, "train", 3), "pairs": lambda: preference_rows(VILLAGE, 20, "train", 3)}
    assert digest(made[what]()) == expected


@relaxed
@given(st.text(max_size=300), st.sampled_from(TASKS))
def test_any_text_can_be_graded(text, task):
    assert set(grade(task, text)) == {"right", "contains", "complete", "polite", "rude", "filler", "extra_words"}
    assert -30 < gold_reward(task, text) <= 2 and split_of(text) in ("train", "val", "test")
    assert check_story(text)["consistent"] <= check_story(text)["grammatical"]
    assert isinstance(last_mentioned(text, TASKS[0] | {"sub": "who_has"}), str)
    if task["form"]:
        assert form_is_right(task, text) in (True, False)


@relaxed
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from(STYLES))
def test_right_answers_are_right_and_wrong_ones_are_not(seed, kind, style):
    rng = random.Random(seed)
    task = make_task(kind, VILLAGE, "train", rng)
    assert grade(task, answer(task, rng))["right"] and gold_reward(task, answer(task, rng)) == 2
    assert not grade(task, wrong_answer(task, rng, style))["contains"]
    assert gold_reward(task, answer(task, rng, style)) > gold_reward(task, answer(task, rng, style, wrong=True))
    assert gold_reward(task, sft_answer(task, rng)) <= 2


@relaxed
@given(st.integers(0, 10**6))
def test_every_story_can_have_happened_and_a_spoiled_one_cannot(seed):
    text, state = story(VILLAGE, random.Random(seed))
    assert check_story(text)["consistent"]
    assert not check_story(text + " Nobody went to the moon.")["grammatical"]
    for thing in [*state.holder, *state.lying]:
        assert state.place_of(thing)


@pytest.mark.parametrize("unit", ["a ", "<", "\\", "((", "{", "\n", "é", "<a ", ". ", "One morning Ada and Ben were at the mill. "])
def test_reading_is_linear_in_the_length_of_the_text(unit):
    def seconds(n: int) -> float:
        text = unit * (n // len(unit))
        return cpu_seconds(lambda: (check_story(text), gold_reward(TASKS[0], text), split_of(text)))
    assert_linear(seconds, 1_000_000)


@relaxed
@given(st.text(max_size=200))
def test_docstrings_of_any_file_that_parses(text):
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    assert all(len(d) >= 5 for d in docstrings(tree, 5))


def test_groups_never_meet():
    train, test = make_tasks(VILLAGE, "train", 60), make_tasks(VILLAGE, "test", 60)
    assert not {t["prompt"] for t in train} & {t["prompt"] for t in test}
    assert {t.get("person") for t in train} & {t.get("person") for t in test} == {None}
    assert {t["form"] for t in train} == {None, *FORMS}
    assert max(max(s.values()) for s in baselines(train, test).values()) < 0.5


def test_the_two_real_sources_keep_their_budget():
    docs, code = python_docs(50_000), python_code(50_000)
    assert 40_000 < sum(len(d["text"].encode()) for d in docs) <= 50_000 < sum(len(d["text"].encode()) for d in code)
    assert docs == python_docs(50_000) and len({d["id"] for d in docs + code}) == len(docs + code)


def test_small_parts():
    assert fill("{N} owns a {v}.", N="Ada", v="owl") == "Ada owns an owl."
    with pytest.raises(FileNotFoundError, match="reinstall"):
        data_path("nothing.json")
    with pytest.raises(ValueError, match="n_people=3"):
        make_village(0, 3)
