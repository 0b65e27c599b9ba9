"""Measures, rules and screens: any text, in linear time; and decisions equal to datatrove's filters, given the same words."""
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from llm_course.filtering import (C4_ANY_END, C4_RULES, CHAINS, FINEWEB_RULES, GOPHER_QUALITY, GOPHER_REPETITION, c4_clean, clean_documents, conversation_findings, decide,
                                  failures, funnel, language, pair_findings, rule, screen_conversations, screen_pairs, tag, tag_documents)
from llm_course.reading import UserError
from llm_course.world import python_code, python_docs
from timing import assert_linear, cpu_seconds

ANY = st.text(alphabet=st.characters(), max_size=300)
PIECES = ("the cat sat on the mat.", "the", "and", "\n", "\n\n", "\n\n\n", " ", "•", "\n- a", "...", "…\n", "#", "##", "wood", "mill stands here!", "12", "a", "»", "{", "lorem ipsum dolor sit.",
          "JavaScript is on.", "privacy policy of ours.", "[1]", "[edit]", '"No."', "said he?", "\u2028", "\x0b", "x" * 1001, "１", "Ωμέγα;", "internationalisation", "Of course, they have to be there.")
WEBBY = st.lists(st.sampled_from(PIECES), max_size=100).map(" ".join)


def made_up_page(rng: random.Random) -> str:
    "Fresh words in sentences and lines, mixed with a few of the pieces above: long enough for every rule to be the one that decides."
    few, mess = rng.sample(PIECES, rng.randint(1, 4)), rng.choice((0, 0.02, 0.1, 0.3))
    size, parts = rng.choice((1, 3, 5, 5, 5, 12)), []
    for i in range(rng.choice((20, 80, 200, 400))):
        fresh = "".join(rng.choices("aeioubcdlmnrst", k=max(1, size + rng.randint(-2, 3))))
        parts.append(rng.choice(few) if rng.random() < mess else rng.choice(("the", "of", "to", "with")) if rng.random() < 0.1 else fresh)
        parts.append(rng.choices((" ", ". ", ".\n", "\n", "\n\n"), (30, 3, 1, 1, 1))[0])
    page = "".join(parts)
    return page + rng.choice(("", "", page[:len(page) // 4], "\n" + page.split("\n")[0]))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ANY)
def test_any_text(text):
    tags = tag(text)
    assert all(math.isfinite(v) for v in tags.values())
    shares = [k for k in tags if k.startswith(("dup_", "bullet", "ellipsis_", "alphabetic", "line_punct", "short", "letters", "english", "foreign", "distinct"))]
    assert all(0 <= tags[k] <= 1 for k in shares)
    language(text)
    for chain in CHAINS:
        kept, report = clean_documents([{"text": text}], chain_of=lambda d: chain)
        assert len(kept) + sum(report["removed"].values()) == 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ANY, st.booleans())
def test_c4_lines_are_clean_the_second_time(text, any_end):
    once = c4_clean("\n".join(text.split()) + "\n" + text, any_end)[0]
    kept, dropped = c4_clean(once, any_end)
    assert kept == once and not dropped


JSONISH = st.recursive(st.none() | st.booleans() | st.integers() | ANY, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "messages", "x"]), inner), max_leaves=6)
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"])}, optional={"content": JSONISH, "tool_calls": st.just([{}])}), max_size=4) | JSONISH


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(MESSAGES, max_size=4))
def test_screens_take_anything_and_account_for_every_row(values):
    for rows, screen in (([{"messages": v} for v in values], screen_conversations), ([{"prompt": v, "chosen": w, "rejected": v} for v, w in zip(values, values[::-1])], screen_pairs)):
        kept, report = screen(rows)
        assert len(kept) == report["rows_out"] == report["rows_in"] - sum(report["removed"].values())
        gone = {i for r in report["removed_rows"].values() for i in r}
        assert kept == [r for i, r in enumerate(rows) if i not in gone]
        again, second = screen(kept)
        assert again == kept and not second["removed"]
    screen_conversations(values)
    screen_pairs(values)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(WEBBY, max_size=8))
def test_columns_decide_as_rows_do_and_the_funnel_adds_up(texts):
    docs, rules = [{"text": t} for t in texts], GOPHER_QUALITY | GOPHER_REPETITION | C4_RULES | FINEWEB_RULES
    failed = failures(tag_documents(docs), rules)
    rows = [decide(tag(t), rules) for t in texts]
    assert rows == [[n for n in failed if failed[n][i]] for i in range(len(texts))]
    found = funnel(failed)
    assert found["kept"] == sum(not r for r in rows) and sum(r["first"] for r in found["rules"].values()) == len(texts) - found["kept"]
    for name in rules:
        assert funnel({n: f for n, f in failed.items() if n != name})["kept"] == found["kept"] + found["rules"][name]["only"]


@pytest.mark.parametrize("piece", ["a ", "<", "\\", "((", "{", "\n", "é", "<a ", ".", ". ", "a.'\"", "[1", "```", "Human:\n", "x" * 999 + " "])
def test_linear_time(piece):
    def seconds(size):
        text = piece * (size // len(piece))
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        return cpu_seconds(lambda: (tag(text), conversation_findings(chat), pair_findings({"prompt": chat[:1], "chosen": chat[1:], "rejected": chat[1:]})))
    assert_linear(seconds, 400_000)


def reference_agrees(texts):
    pytest.importorskip("datatrove", reason="the library to agree with is not installed")
    from datatrove.data import Document
    with pytest.MonkeyPatch.context() as patch:      # not for longer: a script there has the name of a module of Python's own
        patch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
        from rules import reference
    differ, reasons = [], Counter()
    for name, (step, rules) in reference().items():
        for text in texts:
            doc = Document(text=text, id="0")
            result = step.filter(doc)
            reasons[name, result[1] if isinstance(result, tuple) else "kept"] += 1
            theirs = (result[0] if isinstance(result, tuple) else result) is True
            if theirs != (not decide(tag(text, ("lines", "repetition", "c4")), rules)):
                differ.append((name, result, text[:80]))
            if theirs and name.startswith("C4"):
                assert doc.text == c4_clean(text, any_end="anyhow" in name)[0]
    return differ, reasons


@settings(max_examples=60, deadline=None, derandomize=True)
@given(WEBBY)
def test_same_decisions_as_datatrove_on_odd_pages(text):
    assert not reference_agrees([text] if text.strip() else [])[0]


def test_same_decisions_as_datatrove_on_made_up_pages():
    rng = random.Random(0)
    differ, reasons = reference_agrees([made_up_page(rng) for _ in range(800)])
    assert not differ
    assert len(reasons) >= 24, sorted(reasons)


def test_same_decisions_as_datatrove_on_documentation_and_code():
    assert not reference_agrees([d["text"] for d in python_docs(300_000) + python_code(60_000)])[0]


def test_same_decisions_as_datatrove_on_web_pages(testdata):
    texts = [json.loads(line)["text"] for name in ("c4_demo", "dclm_quality_labels") for line in (testdata / "web" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(texts) == 550 and not reference_agrees(texts)[0]


def test_languages_of_real_sentences(testdata):
    for path in sorted((testdata / "multilingual" / "langid").glob("*.txt")):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:50]
        assert sum(language(line)[0] == path.stem for line in lines) >= 45, path.stem


def test_unknown_names_are_refused():
    for call in (lambda: tag("x", ["colour"]), lambda: clean_documents([{"text": "x"}], chain_of=lambda d: "x"), lambda: screen_pairs([], drop=["x"])):
        with pytest.raises(UserError, match="no "):
            call()
    assert rule("words", low=1)["high"] == math.inf
