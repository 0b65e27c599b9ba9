"""Rows of any shape: converted unchanged, refused with a reason, or dropped and counted; never an undocumented exception, in linear time."""
import json
import time
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from llm_course.formats import (CANNOT_HOLD, KINDS, TARGETS, Report, as_text, check_messages, convert, detect_row, from_messages, losses, pair_to_kto, parse_transcript,
                                ranked_pairs, strip_template, to_messages, to_pair, to_transcript, validate)
from llm_course.reading import DataError, read_rows
from timing import assert_linear, cpu_seconds

TEXT = st.text(max_size=15) | st.sampled_from(["\n\nHuman: a", " b ", "None", "{}", "### Response:", "\n\nAssistant:"])
CALL = st.builds(lambda i, name, args: i | {"type": "function", "function": {"name": name, "arguments": args}}, st.sampled_from([{}, {"id": "c1"}]), TEXT, st.dictionaries(TEXT, TEXT, max_size=2) | st.just("{}"))
MESSAGE = st.one_of(
    st.builds(lambda role, content, more: {"role": role, "content": content} | more, st.sampled_from(["system", "user", "assistant", "tool"]), TEXT, st.sampled_from([{}, {}, {"weight": 0}, {"name": "n"}])),
    st.builds(lambda content, calls: {"role": "assistant", "content": content, "tool_calls": calls}, TEXT, st.lists(CALL, min_size=1, max_size=2)),
    st.builds(lambda content: {"role": "tool", "content": content, "tool_call_id": "c1"}, TEXT),
    st.just({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "see"}]}))
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3).map(lambda pairs: [{"role": r, "content": c} for pair in pairs for r, c in zip(("user", "assistant"), pair)])
CONVERSATION = TURNS | st.builds(lambda s, t: [{"role": "system", "content": s}, *t], TEXT, TURNS) | st.lists(MESSAGE, min_size=1, max_size=5)
EXTRA = st.dictionaries(st.sampled_from(["id", "source", "votes"]), st.integers(), max_size=2)
ANY = settings(max_examples=150, deadline=None, derandomize=True)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(CONVERSATION, EXTRA)
def test_every_pair_of_conversation_formats(messages, extra):
    "From each format that holds a conversation into each other that holds it and back: the same row."
    formats = [f for f in CANNOT_HOLD if f != "transcript" and not losses(messages, f)]
    rows = {f: from_messages(messages, f) | extra for f in formats}
    for source in formats:
        for target in formats:
            there = list(convert([rows[source]], to=target))
            assert there == [rows[target]]
            assert list(convert(there, to=source)) == [rows[source]]


@ANY
@given(CONVERSATION)
def test_a_loss_is_refused_or_counted(messages):
    for to in (f for f in CANNOT_HOLD if f != "transcript"):
        lost, report = losses(messages, to), Report()
        if lost:
            with pytest.raises(DataError, match="cannot hold"):
                list(convert([{"messages": messages}], to=to))
        made = list(convert([{"messages": messages}], to=to, lossy=True, report=report))
        assert (report.rows, report.good, report.good + len(report.bad)) == (1, len(made), 1)
        assert set(report.lost) <= set(CANNOT_HOLD[to]) and bool(lost) == bool(report.lost or report.bad)
        assert all(not losses(to_messages(r), to) for r in made)


@ANY
@given(TURNS, TEXT, TEXT, EXTRA)
def test_pairs(turns, good, bad, extra):
    pair = {"prompt": turns[:-1], "chosen": [{"role": "assistant", "content": good}], "rejected": [{"role": "assistant", "content": bad}]} | extra
    assert to_pair(pair) == pair and list(convert([pair], to="preference")) == [pair]
    full = pair | {k: pair["prompt"] + pair[k] for k in ("chosen", "rejected")}
    assert to_pair(full) == pair
    two = list(convert([pair], to="kto"))
    assert two == pair_to_kto(pair) and list(convert(two, to="kto")) == two and [r["label"] for r in two] == [True, False]
    if not losses(pair["prompt"] + pair["chosen"], "transcript") and not losses(pair["prompt"] + pair["rejected"], "transcript"):
        assert [to_pair(r) for r in convert([pair], to="transcript")] == [pair]
    else:
        with pytest.raises(DataError):
            list(convert([pair], to="transcript"))


@ANY
@given(TEXT, st.lists(st.tuples(TEXT, st.integers(0, 3)), min_size=2, max_size=5))
def test_ranked(prompt, answers):
    row = {"prompt": prompt, "responses": [a for a, _ in answers], "scores": [s for _, s in answers]}
    n = sum(a != b for i, (_, a) in enumerate(answers) for _, b in answers[:i])
    report = Report()
    pairs = list(convert([row], to="preference", lossy=True, report=report))
    assert len(pairs) == n and len(report.bad) == (n == 0)
    assert all(p["scores"][0] > p["scores"][1] for p in pairs)
    assert [p["scores"][0] - p["scores"][1] for p in pairs] == sorted((p["scores"][0] - p["scores"][1] for p in pairs), reverse=True)


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUE = st.recursive(SCALAR, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.sampled_from(
    ["role", "content", "from", "value", "tool_calls", "function", "function_call", "name", "type", "text", "input", "output", "response", "annotations", "Rating"]), s, max_size=3), max_leaves=8)
ROW = st.dictionaries(st.sampled_from(["text", "messages", "conversations", "instruction", "input", "output", "prompt", "completion", "chosen", "rejected", "label", "history", "system",
                                       "instances", "responses", "scores", "rankings", "completions", "id"]), VALUE, max_size=7)
LIKELY = st.sampled_from([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {"instruction": "a", "output": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"},
                          {"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}, {"instruction": "a", "instances": [{"input": "b", "output": "c"}]}])


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.builds(lambda a, b: a | b, LIKELY | st.just({}), ROW))
def test_any_row(row):
    before = repr(row)
    report = validate([("here", row)])
    assert report.rows == 1 == report.good + len(report.bad) and isinstance(report.summary(), str)
    for to in TARGETS:
        report = Report()
        list(convert([row], to=to, lossy=True, report=report))
        assert report.good + len(report.bad) == 1
        try:
            made = list(convert([row], to=to))
            assert all(KINDS.get((detect_row(m) or detect_row(row)).name) for m in made)
        except DataError:
            pass
    assert repr(row) == before, "a row was changed in place"


@ANY
@given(st.text(max_size=60))
def test_any_text(text):
    try:
        messages = parse_transcript(text)
        if not losses(messages, "transcript"):
            assert parse_transcript(to_transcript(messages)) == messages
    except DataError:
        pass
    assert strip_template(strip_template({"prompt": text, "completion": ""})) == strip_template({"prompt": text, "completion": ""})


@ANY
@given(CONVERSATION)
def test_as_text_is_for_the_tokenizer(messages):
    assert isinstance(check_messages(messages), str)
    try:
        plain = as_text(messages)
    except DataError:
        return
    assert as_text(plain) == plain and all(set(m) == {"role", "content"} and isinstance(m["content"], str) for m in plain)
    assert [m["role"] for m in plain] == [m["role"] for m in messages]


@pytest.mark.parametrize("unit", ["a ", "<", "\\", "((", "{", "[", "\n", "é", "\n\nHuman:", "\n\nAssistant: ", "### Response:", "### Instruction:", "\n### Input:", '"'])
def test_linear_time(unit):
    def seconds(n):
        text = unit * (n // (5 if unit[0] == "\n" else 1) // len(unit))                       # a tenth of a megabyte of marks is ten thousand messages
        rows = [{"text": text}, {"prompt": "\n\nHuman:" + text, "completion": text}, {"prompt": "Below is an instruction ### Instruction:" + text + "### Response:", "completion": text},
                {"chosen": "\n\nHuman: a\n\nAssistant:" + text, "rejected": "\n\nHuman: a\n\nAssistant: b"}, {"conversations": [{"from": "human", "value": text}, {"from": "function_call", "value": text}]}]
        return cpu_seconds(lambda: (validate(map(strip_template, rows)), [list(convert(map(strip_template, rows), to=to, lossy=True, report=Report())) for to in ("messages", "alpaca", "transcript", "kto")]))
    assert_linear(seconds, 2_000_000, most=20)


FILES = {   # file -> rows, format, rows fit for training
    "instruct/alpaca_en_demo.json": (999, "alpaca", 999), "instruct/alpaca_eval.jsonl": (805, "alpaca", 805), "instruct/alpaca_zh_demo.json": (1000, "alpaca", 1000),
    "instruct/dolly_hhrlhf_small.jsonl": (1000, "prompt_completion", 1000), "instruct/glaive_toolcall_en_demo.json": (300, "vicuna", 300), "instruct/identity.json": (91, "alpaca", 91),
    "instruct/rasbt_instruction-data.json": (1100, "alpaca", 1100), "instruct/seed_tasks.jsonl": (175, "self_instruct", 175), "instruct/vicuna_dummy_conversation.json": (500, "vicuna", 500),
    "pref/dpo_en_demo.json": (300, "preference", 300), "pref/dpo_zh_demo.json": (300, "preference", 300), "pref/hh_harmless-base_test.jsonl.gz": (2312, "preference", 2299),
    "pref/kto_en_demo.json": (300, "kto", 300), "pref/rasbt_instruction-data-with-preference.json": (1100, "preference", 1094),
    "pref/mt_bench_votes/gpt4_pair.jsonl": (2400, None, 0), "pref/mt_bench_votes/human.jsonl": (3355, None, 0)}


def test_the_list_of_files_is_whole(testdata):
    assert sorted(str(p.relative_to(testdata)) for part in ("instruct", "pref") for p in (testdata / part).rglob("*.json*")) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_real_file(name, testdata):
    n, fmt, good = FILES[name]
    rows = list(read_rows(testdata / name))
    assert len(rows) == n and Counter(d and d.name for d in (detect_row(r) for _, r in rows)) == {fmt: n}
    assert validate(testdata / name).good == good
    if fmt is None:
        with pytest.raises(DataError, match="votes without the answers"):
            list(convert(rows))
        return
    target = {"pair": "preference", "kto": "kto"}.get(KINDS[fmt], "messages")
    made = list(convert(rows, to=target))
    assert len(made) == n and not [r for r in made if "\udfff" in json.dumps(r)]
    if target == "messages" and fmt not in ("alpaca", "self_instruct"):
        back = [{"response" if k == "completion" and "response" in row else k: v for k, v in r.items()} for r, (_, row) in zip(convert(made, to=fmt), rows)]
        assert back == [row for _, row in rows]


def test_tool_calls_of_a_real_set(testdata):
    made = list(convert(read_rows(testdata / "instruct/glaive_toolcall_en_demo.json")))
    calls = [c for r in made for m in r["messages"] for c in m.get("tool_calls", [])]
    assert len(calls) == 211 and all(isinstance(c["function"]["arguments"], dict) for c in calls)
    assert all(not check_messages(as_text(r["messages"])) for r in made)


def test_broken_lines_stand_in_the_report(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "outp\n{"instruction": "a", "output": ""}\n{"instruction": "c", "output": "d"}\n')
    (tmp_path / "b.json").write_text('[{"instruction": "a", "output": "b"}, {"instr')
    report = validate(tmp_path)
    assert (report.rows, report.good) == (6, 3) and [w.split("/")[-1].split(":")[0] for w, _ in report.bad] == ["a.jsonl", "a.jsonl", "b.json"]
    assert [w.split(":")[-1] for w, _ in report.bad[:2]] == ["2", "3"] and "3 of 6 rows are good" in report.summary()
    with pytest.raises(DataError, match="no such file"):
        validate(tmp_path / "c.jsonl")
