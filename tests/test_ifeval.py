"""IFEval: Google's verdicts and lm-eval's checkers, any text, files with mistakes, and the time that a hostile answer takes."""
import importlib.util
import json
import random
import re
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.ifeval import CHECKERS, RELATIONS, arguments_of, follows, follows_loosely, grade_ifeval, ifeval_suite, loose_variants, misfit, read_ifeval, split_sentences
from llm_course.reading import DataError, UserError, write_jsonl
from llm_course.suites import run_suite
from llm_course.course import data_path
from timing import assert_linear, cpu_seconds

fuzz = settings(max_examples=60, deadline=None, derandomize=True)
MINI = data_path("mini_ifeval.jsonl")
RECORD = json.loads(data_path("runs/ifeval.json").read_text(encoding="utf-8"))["figures"]
ITEMS = read_ifeval(MINI)
ASKED = [(name, kwargs) for item in ITEMS for name, kwargs in zip(item["instruction_id_list"], item["kwargs"])]
PIECES = ["*", "**", "***", "******", "-", "[", "]", "<<", ">>", '"', "'", "\n", "\n\n", " ", "  ", ".", "!", "?", ",", "...", "P.S.", "p. p. s", "SECTION 1", "SECTION  2", "SECTION", "```", "```json", "{", "}",
          "1", "yeast", "YEAST", "oven", "water", "sea", "seas", "z", "Z", "However", "however,", "\n\n'However, ", '\n\n"However', "My answer is no.", "Is there anything else I can help with?", "STOP", "Thin", "the", "A",
          "Name a prime number between 20 and 30.", "computer", "program", "é", "ß", "\t", "_", "a-b"]


def bits(text: str, n: int) -> list[int]:
    return [int(b) for b in f"{int(text, 16):0{n}b}"]


@pytest.fixture
def answered(testdata) -> list[tuple]:
    "Key, instruction, arguments, strict and loose verdict for all instructions of IFEval, on GPT-4's answers."
    folder = testdata / "eval" / "ifeval"
    if not (folder / "gpt4_prompt_response.jsonl").exists():
        pytest.skip("no IFEval among the test data")
    answers = [json.loads(line)["response"] for line in (folder / "gpt4_prompt_response.jsonl").read_text(encoding="utf-8").splitlines()]
    out = []
    for item, answer in zip(read_ifeval(folder / "input_data.jsonl"), answers, strict=True):
        grades = grade_ifeval(item, answer)
        out += zip([item["key"]] * len(item["kwargs"]), item["instruction_id_list"], item["kwargs"], grades["instruction_strict"], grades["instruction_loose"])
    return out


def test_verdicts_are_googles_but_for_those_named(answered):
    assert len(answered) == 834 and len({a[1] for a in answered}) == 25
    found = {}
    for how, at in (("strict", 3), ("loose", 4)):
        for told, mine in zip(bits(RECORD["google"][how], 834), answered):
            if told != mine[at]:
                found.setdefault(mine[:2], []).append(how)
    named = {(d["key"], d["instruction"]): d["differs"].split(" and ") for d in RECORD["disagreements"]}
    assert found == named
    assert all(d["reason"] != "unexplained" for d in RECORD["disagreements"])
    assert len(named) <= 6


def test_published_scores_lie_where_googles_code_can_end():
    for metric, span in RECORD["scores"]["original_range"].items():
        assert span["low"] - 5e-5 <= RECORD["scores"]["published"][metric] / 100 <= span["high"] + 5e-5
        ours, theirs = RECORD["scores"]["ours"][metric], RECORD["scores"]["original"][metric]
        assert ours["low"] < theirs["value"] < ours["high"] and abs(ours["value"] - theirs["value"]) < 0.012


def test_the_record_holds_figures_and_no_text():
    texts = [v for v in re.findall(r'"([^"]*)"', json.dumps(RECORD)) if len(v.split()) > 10]
    assert texts == []
    unsteady = {i for v in RECORD["google"]["unsteady"].values() for i in v}
    assert len(unsteady) == 2


@pytest.fixture
def lm_eval_checkers(monkeypatch):
    "lm-eval's copy of Google's checkers, without what it would download, and without the rest of lm-eval, which takes long to import."
    found = importlib.util.find_spec("lm_eval")
    if found is None:
        pytest.skip("lm_eval is not installed")
    pytest.importorskip("nltk")
    folder = Path(found.origin).parent
    monkeypatch.setenv("LOCAL_RANK", "1")                                  # else it downloads a sentence splitter as soon as it is imported
    stand_ins = {name: {"__path__": [str(folder.joinpath(*name.split(".")[1:]))]} for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval")}
    stand_ins |= {"langdetect": {"LangDetectException": ValueError}, "immutabledict": {"immutabledict": dict}}
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    for name, content in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("lm_eval.tasks.ifeval.instructions_registry").INSTRUCTION_DICT
    for name in [n for n in sys.modules if n.startswith("lm_eval.tasks.ifeval.")]:
        del sys.modules[name]


NEED_DOWNLOADS = {"language:response_language", "change_case:english_capital", "change_case:english_lowercase", "length_constraints:number_sentences", "change_case:capital_word_frequency"}


def other_limits(kwargs: dict) -> list[dict]:
    "The same arguments with other numbers, and with both relations."
    numbers = [k for k, v in kwargs.items() if isinstance(v, int) and k != "nth_paragraph"]
    relations = [k for k in kwargs if k.endswith("relation")]
    least = kwargs.get("nth_paragraph", 0)
    return [kwargs | dict.fromkeys(numbers, n) | dict.fromkeys(relations, r) for n in (range(least, 5) if numbers else [0]) for r in (RELATIONS if relations else [""])]


def same_here(name: str, text: str) -> bool:
    "Texts on which we decide otherwise on purpose are left out."
    if name == "detectable_format:number_bullet_lists":
        return re.search(r"^\s*\*$", text, re.M) is None                   # a lone star joins the line after it
    if name == "length_constraints:nth_paragraph_first_word":
        return all(p.strip() for p in text.split("\n\n"))                  # it looks the paragraph up among the empty ones, too
    if name == "detectable_format:title":
        return not re.search("<<<|>>>|<< *<|> *>>", text)
    return True


def test_checkers_are_those_of_lm_eval(lm_eval_checkers):
    assert set(lm_eval_checkers) == set(CHECKERS)
    draw, compared = random.Random(0), 0
    texts = [i[k] for i in ITEMS for k in ("good", "bad")]
    texts += ["".join(draw.choice(PIECES) + draw.choice(["", " ", "\n"]) for _ in range(draw.randint(1, 12))) for _ in range(700)]
    for name, kwargs in [(name, k) for name, kwargs in ASKED if name not in NEED_DOWNLOADS for k in other_limits(kwargs)]:
        theirs = lm_eval_checkers[name](name)
        theirs.build_description(**kwargs)
        for text in texts:
            if text.strip() and same_here(name, text):
                compared += 1
                assert bool(theirs.check_following(text)) == follows(text, name, kwargs), (name, kwargs, text)
    assert compared > 10_000


@fuzz
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=15).map("".join)))
def test_any_text_gets_a_verdict(text):
    for name, kwargs in ASKED:
        strict, loose = follows(text, name, kwargs), follows_loosely(text, name, kwargs)
        assert isinstance(strict, bool) and (loose or not strict)
        assert text.strip() or not loose
    assert len(loose_variants(text)) == 8
    assert all(s == s.strip() and any(map(str.isalnum, s)) for s in split_sentences(text))


@fuzz
@given(st.lists(st.sampled_from(["The cat sleeps.", "Why not?", "Go away!", "He said (twice)."]), max_size=8))
def test_sentences_are_counted(sentences):
    assert split_sentences(" ".join(sentences)) == sentences
    assert split_sentences("\n\n".join(sentences)) == sentences


def test_the_mini_set_covers_all_types():
    assert len(ITEMS) >= 20 and {name for name, _ in ASKED} == set(CHECKERS)
    failed = set()
    for item in ITEMS:
        good, bad = grade_ifeval(item, item["good"]), grade_ifeval(item, item["bad"])
        assert good["prompt_strict"] == 1 and bad["prompt_loose"] == 0, item["id"]
        failed |= {n for n, v in zip(item["instruction_id_list"], bad["instruction_strict"]) if not v}
    assert failed == set(CHECKERS)


def test_limits_of_zero_are_limits():
    for name, kwargs, text, want in (("length_constraints:number_words", {"num_words": 0, "relation": "less than"}, "word", False),
                                     ("keywords:frequency", {"keyword": "x", "frequency": 0, "relation": "less than"}, "none", False),
                                     ("detectable_format:number_bullet_lists", {"num_bullets": 0}, "no point", True),
                                     ("detectable_format:number_bullet_lists", {"num_bullets": 0}, "* point", False),
                                     ("change_case:capital_word_frequency", {"capital_frequency": 0, "capital_relation": "at least"}, "none", True)):
        assert misfit(name, kwargs) == "" and follows(text, name, kwargs) is want


WRONG = [({"instruction_id_list": ["keywords:exists"]}, "nearest one known is 'keywords:existence'"), ({"kwargs": [{}]}, "takes keywords; found none"),
         ({"kwargs": [{"keywords": ["a"], "n": 1}]}, "found keywords, n"), ({"kwargs": [{"keywords": None}]}, "found none"), ({"kwargs": [{"keywords": []}]}, "at least one"),
         ({"kwargs": []}, "same length"), ({"kwargs": {}}, "must be lists"), ({"kwargs": ["x"]}, "found 'x'"), ({"prompt": " "}, "not blank"), ({"instruction_id_list": [7]}, "instruction 7 is unknown"),
         ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"a": 0}]}, "takes no arguments; found a"),
         ({"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "zh-cn"}]}, "ISO 639"),
         ({"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "xx"}]}, "that the language detector knows, such as 'de', not 'xx'"),
         ({"instruction_id_list": ["detectable_format:number_bullet_lists"], "kwargs": [{"num_bullets": -1}]}, "0 or more, not -1"), ({"key": 1}, "a second time")]


@pytest.mark.parametrize("change, said", WRONG, ids=[w[1] for w in WRONG])
def test_a_mistake_is_named_with_file_and_line(tmp_path, change, said):
    path = tmp_path / "items.jsonl"
    row = {"key": 2, "prompt": "Say yeast.", "instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": ["yeast"]}]}
    write_jsonl(path, [row | {"key": 1}, row | change])
    with pytest.raises(DataError) as e:
        ifeval_suite(path)
    assert f"{path}:2: " in str(e.value) and said in str(e.value)
    assert isinstance(e.value, UserError) and e.value.remedy


@pytest.mark.parametrize("lacking", ["key", "prompt", "instruction_id_list", "kwargs"])
def test_what_is_missing_is_named(tmp_path, lacking):
    path = tmp_path / "items.jsonl"
    write_jsonl(path, [{k: v for k, v in ITEMS[0].items() if k != lacking}])
    with pytest.raises(DataError, match=f"{lacking} is missing"):
        read_ifeval(path)


def test_the_layout_of_hugging_face(tmp_path):
    path, every = tmp_path / "items.jsonl", {name: None for n in CHECKERS for name in arguments_of(n)}
    rows = [{k: v for k, v in i.items() if k not in ("id", "good", "bad")} for i in ITEMS]
    write_jsonl(path, [r | {"kwargs": [every | k for k in r["kwargs"]]} for r in rows])
    assert [i["kwargs"] for i in read_ifeval(path)] == [i["kwargs"] for i in ITEMS]


def test_the_suite_asks_in_messages(tmp_path):
    class Parrot:
        name = "parrot"
        def generate(self, prompts, max_new_tokens=64, stop=(), **kw):
            assert all(p[-1]["role"] == "user" for p in prompts) and max_new_tokens == 1280
            return [p[-1]["content"] for p in prompts]
    suite = ifeval_suite(MINI)
    result = run_suite(Parrot(), suite, tmp_path)
    scores = [row["scores"] for row in result["items"]]
    assert [len(s["instruction_loose"]) for s in scores] == [len(i["kwargs"]) for i in suite.items]
    assert 0 < sum(s["prompt_strict"] for s in scores) < len(scores)
    assert result == run_suite(Parrot(), suite, tmp_path) and set(result["by"]) == set(CHECKERS)


@pytest.mark.parametrize("limit, most", [({}, 1280), ({"context": 256}, 128), ({"max_len": 2048}, 1024), ({"context": 8192}, 1280)])
def test_the_prompt_keeps_its_room(limit, most):
    class Small:
        name = "small"
        def generate(self, prompts, max_new_tokens=64, **kw):
            assert max_new_tokens == most
            return ["yes"] * len(prompts)
    lm = Small()
    vars(lm).update(limit)
    suite = ifeval_suite(MINI)
    assert len(suite.answer(lm, suite.items)) == len(suite.items)


@pytest.mark.parametrize("piece", ["[", "*", "* ", "<<", "<", ">>", ".", ". ", "!\"", "\n", " \n", "p.", "SECTION ", "-", "```", "'", "(", "A.", "a-", "{", "z"])
def test_a_hostile_answer_takes_linear_time(piece):
    def seconds(size):
        text = piece * (size // len(piece))
        return cpu_seconds(lambda: [CHECKERS[name](text, **kwargs) for name, kwargs in ASKED if "english" not in name and "language" not in name])
    assert_linear(seconds, 100_000)
