"""Judges: MT-Bench on its real files, prompts and verdicts as FastChat has them, and measures that find planted habits."""
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.endpoint import AnswerCache
from llm_course.generate import Sampling
from llm_course.judge import (MT_TEMPLATES, answer_two_turns, compare_answers, duels, filled, fit_logistic, grade_answers, habits, judge_mt_bench, judge_of, length_controlled, longest,
                              mt_bench_pairs, mt_bench_score, mt_bench_suite, mt_bench_table, mt_prompt, parse_checks, parse_rating, parse_verdict, read_mt_bench, read_templates,
                              self_preference, settle, template_name)
from llm_course.lm import ModelLM
from llm_course.model import ModelConfig, Transformer
from llm_course.reading import DataError, UserError
from llm_course.suites import run_suite, suite_key
from llm_course.tokenizer import train_tokenizer


class StandIn:
    "A model that answers with the last message and the temperature, and remembers what it was asked."

    def __init__(self, name: str = "stand-in"):
        self.name, self.asked = name, []

    def generate(self, prompts, max_new_tokens=64, stop=(), sampling=Sampling(), seed=0):
        self.asked += [(p, sampling.temperature) for p in prompts]
        return [f"({sampling.temperature}) {p[-1]['content'][:40]}" for p in prompts]


class Grader(StandIn):
    "A judge that is a model: grades by the length of what it is shown, and cannot decide now and then."

    def generate(self, prompts, max_new_tokens=64, stop=(), sampling=Sampling(), seed=0):
        self.asked += [(p, sampling.temperature) for p in prompts]
        size = [len(p[-1]["content"]) for p in prompts]
        return ["Hard to say." if n % 7 == 0 else f"Not a [[10]], but fair. [[{1 + n % 10}]]" for n in size]


@pytest.fixture
def mt(testdata):
    folder = testdata / "eval" / "mt_bench"
    return {"questions": folder / "question.jsonl", "references": folder / "reference_answer" / "gpt-4.jsonl", "templates": folder / "judge_prompts.jsonl"}


def test_the_80_questions(mt):
    items = read_mt_bench(mt["questions"], mt["references"])
    assert Counter(i["category"] for i in items) == {c: 10 for c in ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")}
    assert Counter(i["temperature"] for i in items) == {0.0: 40, 0.7: 20, 0.1: 20}
    assert {i["category"] for i in items if i["reference"]} == {"math", "reasoning", "coding"} and sum(bool(i["reference"]) for i in items) == 30
    assert len({i["id"] for i in items}) == 80 and not any(i["reference"] for i in read_mt_bench(mt["questions"]))


@pytest.mark.parametrize("original", [True, False], ids=["FastChat's prompts", "ours"])
def test_every_prompt_is_filled_as_str_format_would(mt, original):
    templates = read_templates(mt["templates"]) if original else MT_TEMPLATES
    used = set()
    for item in read_mt_bench(mt["questions"], mt["references"]):
        for turn in (1, 2):
            for answers in ([["one {answer}", "two {question_1}"]], [["a {0}", "b }"], ["c {ref_answer_1}", "d"]]):
                name = template_name(len(answers) == 2, item["reference"] is not None, turn)
                used.add(name)
                single = dict(zip(("answer", "answer_1", "answer_2"), (answers[0][0], *answers[0])))
                both = {f"answer_{k}{t}": a[n] for k, a in zip("ab", answers) for t, n in (("", 0), ("_1", 0), ("_2", 1))} if len(answers) == 2 else {}
                reference = {f"ref_answer_{n}": r for n, r in enumerate(item["reference"] or [], 1)}
                expected = templates[name]["prompt_template"].format(question=item["turns"][0], question_1=item["turns"][0], question_2=item["turns"][1], **single, **both, **reference)
                system, user = mt_prompt(item, answers, turn, templates)
                assert user == {"role": "user", "content": expected} and system == {"role": "system", "content": templates[name]["system_prompt"]}
    assert used == set(MT_TEMPLATES)


def test_our_prompts_are_our_own(mt):
    words = lambda t: re.findall(r"\w+", (t["system_prompt"] + " " + t["prompt_template"]).lower())
    grams = lambda t: {tuple(w[i:i + 8]) for w in [words(t)] for i in range(len(w) - 7)}
    theirs = set().union(*map(grams, read_templates(mt["templates"]).values()))
    assert not [name for name, t in MT_TEMPLATES.items() if grams(t) & theirs]


def test_the_suite_from_end_to_end(mt):
    judge = judge_of(Grader("grader"))
    suite = mt_bench_suite(mt["questions"], judge, mt["references"], max_new_tokens=32)
    lm = StandIn()
    outputs = suite.answer(lm, suite.items)
    assert len(lm.asked) == 160 and [len(p) for p, _ in lm.asked[:1] + lm.asked[-1:]] == [1, 3]
    for item, output in zip(suite.items, outputs):
        assert output["turns"] == [f"({item['temperature']}) {t[:40]}" for t in item["turns"]]
    assert judge.asked == 160 and {t for _, t in judge.lm.asked} == {0.0}
    scores = [suite.score(i, o) for i, o in zip(suite.items, outputs)]
    failures = sum(2 * s["unreadable"] for s in scores)
    table = mt_bench_table(suite.items, outputs)
    assert 0 < failures < 60 and table["unreadable"] == failures
    assert table["turn 1"]["n"] + table["turn 2"]["n"] == 160 - failures and set(table) >= {"math", "roleplay", "all"}
    assert json.loads(json.dumps(outputs)) == outputs
    assert suite.texts(suite.items[0]) == suite.items[0]["turns"] and suite.main == "score"


def test_run_as_any_suite_and_started_again(mt, tmp_path):
    suite = mt_bench_suite(mt["questions"], judge_of(Grader("grader")), mt["references"], max_new_tokens=32)
    result = run_suite(StandIn(), suite, tmp_path, limit=16)
    assert result["unanswered"] == 0 and len(result["by"]) == 8 and 1 <= result["metrics"]["score"]["value"] <= 10
    assert result["metrics"]["score"]["missing"] == sum(i["scores"]["score"] is None for i in result["items"])
    again = StandIn()
    assert run_suite(again, suite, tmp_path, limit=16)["metrics"] == result["metrics"] and not again.asked
    other = mt_bench_suite(mt["questions"], judge_of(Grader("another")), mt["references"], max_new_tokens=32)
    with pytest.raises(UserError, match="another folder"):
        run_suite(again, other, tmp_path, limit=16)


def test_what_decides_the_grades_belongs_to_the_key(mt):
    make = lambda judge, **kw: suite_key(mt_bench_suite(mt["questions"], judge, mt["references"], **kw), "m")
    one, longer, warm, seeded, other = Grader("a"), {"max_new_tokens": 9}, {"sampling": Sampling(1.0)}, {"seed": 1}, Grader("a")
    other.key = "a with other weights"
    keys = [make(judge_of(one)), *(make(judge_of(one, **kw)) for kw in (longer, warm, seeded)), make(judge_of(other)), make(judge_of(one), templates=mt["templates"]),
            make(judge_of(one), max_new_tokens=9), make(judge_of(one), seed=1)]
    assert len(set(keys)) == len(keys) and keys[0] == make(judge_of(Grader("a")))


def test_the_table_counts_each_grade_once():
    items = [{"id": str(n), "category": "a"} for n in (1, 2)]
    outputs = [{"judgements": ["[[10]]", "none"]}, {"judgements": ["[[2]]", "[[2]]"]}]
    table = mt_bench_table(items, outputs)
    assert table["all"]["value"] == pytest.approx(14 / 3) == table["a"]["value"] and table["all"]["n"] == 3 and table["unreadable"] == 1     # FastChat's mean


def test_turns_of_a_question_are_one_observation():
    items = [{"id": str(n), "turns": ["q", "r"], "reference": None, "category": "a"} for n in range(80)]
    answers = [[{"turns": [f"{name} {n}", f"{name} {n}"]} for n in range(80)] for name in ("one", "two")]
    def judge(prompt):
        "One or the other wins both turns of a question."
        best = "one" if int(re.search(r"(?:one|two) (\d+)", prompt)[1]) % 2 else "two"
        return "[[A]]" if prompt.index("one ") < prompt.index("two ") and best == "one" or prompt.index("two ") < prompt.index("one ") and best == "two" else "[[B]]"
    result = mt_bench_pairs(items, *answers, judge)
    width = lambda r: r["win_rate"]["high"] - r["win_rate"]["low"]
    assert result["all"]["win_rate"]["n"] == 80 and result["all"]["win_rate"]["value"] == 0.5 and width(result["all"]) == pytest.approx(width(result["turn 1"]))


def test_an_error_loses_at_most_64_answers(tmp_path):
    class Breaks(Grader):
        "Gives up at its 70th prompt."
        def generate(self, prompts, **kw):
            if len(self.asked) + len(prompts) >= 70:
                raise RuntimeError("out of memory")
            return super().generate(prompts, **kw)
    cache, prompts = tmp_path / "c.jsonl", [f"prompt {n}" for n in range(100)]
    with pytest.raises(RuntimeError):
        judge_of(Breaks("one"), cache=cache).many(prompts)
    assert len(AnswerCache(cache).answers) == 64
    again = judge_of(Grader("one"), cache=cache)
    assert len(again.many(prompts)) == 100 and again.asked == 36


def test_a_local_model_judges_and_is_judged(mt):
    tok = train_tokenizer(["which answer is better [[A]] or [[B]] and why " * 4], 300)
    lm = ModelLM(Transformer(ModelConfig(len(tok), dim=32, n_layers=1, n_heads=2, max_seq_len=256)), tok)
    items = read_mt_bench(mt["questions"], mt["references"])[::20]
    outputs = judge_mt_bench(items, answer_two_turns(lm, items, 8), judge_of(lm, 8))
    assert mt_bench_table(items, outputs)["unreadable"] == 2 * len(items) and [len(o["turns"]) for o in outputs] == [2] * len(items)


def test_as_fastchat_counts_where_it_drops(mt):
    "FastChat: first match, -1 for a failure, mean of what is not -1."
    suite = mt_bench_suite(mt["questions"], judge_of(Grader()), mt["references"], mt["templates"])
    outputs = suite.answer(StandIn(), suite.items)
    def theirs(text):
        found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
        return float(found[1]) if found else -1
    wanted = [theirs(t) for o in outputs for t in o["judgements"]]
    ours = [g for i, o in zip(suite.items, outputs) for s in [suite.score(i, o)] for g in (s["turn_1"], s["turn_2"])]
    assert ours == [None if g == -1 else g for g in wanted] and wanted.count(-1) > 0
    last = [g for i, o in zip(suite.items, outputs) for g in (mt_bench_score(i, o)["score"] or [])]
    assert {g for g in ours if g} == {10.0} and np.mean(last) < 10                        # the first number is not the grade


def test_duels_on_mt_bench(mt):
    items = read_mt_bench(mt["questions"], mt["references"])
    outputs = answer_two_turns(StandIn(), items)
    longer = [o | {"turns": [t + " and more of it" for t in o["turns"]]} for o in outputs]
    def by_length(prompt):
        a, b = re.split(r"=== (?:Conversation with Assistant|Answer of) B ===", prompt)
        a = re.split(r"=== (?:Conversation with Assistant|Answer of) A ===", a)[1]
        return "[[A]]" if len(a) > len(b) else "[[B]]"
    result = mt_bench_pairs(items, outputs, longer, by_length)
    assert [result[k]["win_rate"]["value"] for k in ("turn 1", "turn 2", "all")] == [0.0, 0.0, 0.0]
    assert result["all"]["inconsistent"]["value"] == 0 and len(result["all"]["verdicts"]) == 160
    silent = mt_bench_pairs(items, outputs, longer, lambda p: "Both." if "Reference" in p else "[[B]]")
    assert silent["turn 2"]["parse_failures"] == 30 and silent["all"]["always_second"]["value"] == 1.0


def test_bad_files_are_named(mt, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "category": "math", "turns": ["a", 2]}\n')
    with pytest.raises(DataError, match=r"q\.jsonl.*two texts"):
        read_mt_bench(tmp_path / "q.jsonl")
    (tmp_path / "p.jsonl").write_text("".join(line for line in mt["templates"].read_text().splitlines(True) if '"pair-v2"' not in line))
    with pytest.raises(DataError, match="no prompt named pair-v2"):
        read_templates(tmp_path / "p.jsonl")


def test_a_judge_asks_nothing_twice(tmp_path):
    cache = tmp_path / "judge.jsonl"
    judge = judge_of(Grader("one"), cache=cache)
    said = judge.many(["a", "bb", "a", [{"role": "system", "content": "s"}, {"role": "user", "content": "ccc"}]])
    assert judge.asked == 3 and said[0] == said[2] == judge("a")
    assert judge_of(Grader("one"), cache=cache).many(["bb", "a"]) == [said[1], said[0]]
    again, other, warm = judge_of(Grader("one"), cache=cache), judge_of(Grader("two"), cache=cache), judge_of(Grader("one"), sampling=Sampling(1.0), cache=cache)
    for j in (again, other, warm):
        j("a")
    assert (again.asked, other.asked, warm.asked) == (0, 1, 1) and len(AnswerCache(cache).answers) == 5


def test_a_judge_behind_an_address(tmp_path):
    pytest.importorskip("openai")
    from test_endpoint import Server, model
    server = Server()
    items = [{"prompt": f"question {n} [[{n}]]", "rubric": "none"} for n in (1, 2, 9)]
    server.moods = ["500", "empty"]
    template = "{prompt}{rubric}{answer}"
    graded = grade_answers(items, ["x"] * 3, judge_of(model(server, retries=9)), template)
    assert graded["scores"] == [1.0, 2.0, None] and graded["parse_failures"] == 1
    server.http.shutdown()
    server.http.server_close()


VERDICTS = st.sampled_from(["A", "B", "tie", None])


@given(st.lists(st.tuples(VERDICTS, VERDICTS), max_size=30))
@settings(max_examples=200, deadline=None)
def test_exchanging_the_systems_turns_everything_round(orders):
    one, two = duels(orders), duels([(b, a) for a, b in orders])           # the other system first: the second order is then the first
    turned = {"first": "second", "second": "first", "tie": "tie", None: None}
    assert two["verdicts"] == [turned[v] for v in one["verdicts"]]
    assert all(one[k] == two[k] for k in ("inconsistent", "first_place", "always_first", "always_second", "parse_failures"))
    assert one["parse_failures"] == sum(None in o for o in orders) == one["preferences"].count(None)
    assert one["win_rate"]["value"] is None or one["win_rate"]["value"] == pytest.approx(1 - two["win_rate"]["value"])


@given(st.text(alphabet="ABC[]1yesno: 5.", max_size=60))
@settings(max_examples=300, deadline=None)
def test_what_is_read_stands_there(text):
    verdict, grade, checks = parse_verdict(text), parse_rating(text), parse_checks(text, 2)
    assert verdict is None or text.rfind(f"[[{'C' if verdict == 'tie' else verdict}") >= 0 or "[[ " in text
    assert grade is None or 1 <= grade <= 10
    assert len(checks) == 2 and set(checks) <= {True, False, None}


@given(st.dictionaries(st.sampled_from(["prompt", "a", "b", "rubric"]), st.text(alphabet="{}ab prompt", max_size=12)))
@settings(max_examples=100, deadline=None)
def test_filled_never_fills_twice(slots):
    parts = ["{prompt}", "|", "{a}", "|", "{b}", "|", "{other}"]
    assert filled("".join(parts), **slots) == "".join(slots.get(p[1:-1], p) if p.startswith("{") else p for p in parts)


def planted(n: int, seed: int, place: float = 0.0, length: float = 0.0, better: float = 0.0, longer: float = 0.0):
    "Raw verdicts of a judge with planted habits, qualities, lengths."
    g = np.random.default_rng(seed)
    quality, gap = g.normal(better, 1, n), g.normal(longer, 1.5, n)
    draw = lambda z: ["A" if u < 1 / (1 + np.exp(-x)) else "B" for u, x in zip(g.random(n), z)]
    one, two = draw(2 * quality + length * gap + place), draw(-2 * quality - length * gap + place)
    return list(zip(one, two)), quality, gap


def test_intervals_of_habits_cover_what_was_planted():
    "Over 40 judges, 95 % intervals should miss about two times in forty; more than eight would be a fault."
    missed = Counter()
    for seed in range(40):
        rng = random.Random(seed)
        true = {"place": rng.uniform(-1, 1), "length": rng.uniform(-1, 1)}
        orders, quality, gap = planted(200, seed, **true)
        found = habits(orders, {"quality": quality, "length": gap}, resamples=60)
        missed.update(k for k in true if not found[k]["low"] <= true[k] <= found[k]["high"])
    assert max(missed.values(), default=0) <= 8, missed


def test_at_equal_length_the_longer_of_two_equals_is_no_better():
    orders, _, gap = planted(3000, 0, length=0.6, longer=1.0)
    found = length_controlled(duels(orders)["preferences"], 300 + 100 * gap, np.full(3000, 300), resamples=30)
    assert found["raw"]["low"] > 0.55 and abs(found["value"] - 0.5) < 0.04 and found["length_weight"]["low"] > 0


def test_length_control_as_sklearn_fits_it():
    sklearn = pytest.importorskip("sklearn.linear_model")
    g = np.random.default_rng(3)
    p, gap = g.random(400), g.normal(size=400)
    x = np.column_stack([np.tanh(gap / gap.std(ddof=1)), np.ones(400)])
    twice = sklearn.LogisticRegression(C=1000.0, fit_intercept=False, tol=1e-12, max_iter=1000).fit(np.vstack([x, x]), np.repeat([1, 0], 400), sample_weight=np.concatenate([p, 1 - p]))
    assert fit_logistic(x, p) == pytest.approx(twice.coef_[0], abs=1e-4)
    found = length_controlled(p.tolist(), gap, np.zeros(400), resamples=2)
    assert found["value"] == pytest.approx(1 / (1 + np.exp(-twice.coef_[0][1])), abs=1e-4)


def test_weights_of_the_bootstrap_are_repeated_rows():
    g = np.random.default_rng(4)
    x, y, count = g.normal(size=(50, 2)), g.random(50), g.integers(0, 4, 50)
    assert fit_logistic(x, y, count.astype(float)) == pytest.approx(fit_logistic(np.repeat(x, count, 0), np.repeat(y, count)), abs=1e-8)


def test_self_preference_counts_each_way():
    judge = ["first", "first", "second", "tie", None, "second"]
    people = ["first", "second", "first", "first", "first", "second"]
    own = ["first", "first", "first", "first", "first", "second"]
    s = self_preference(judge, people, own)
    assert s["judge"]["value"] == pytest.approx((1 + 1 + 0 + 0.5 + 1) / 5) and s["people"]["value"] == pytest.approx(4 / 5) and s["left_out"] == 1
    assert (s["against_people"]["value"], s["against_people"]["n"]) == (1.0, 1) and (s["against_own"]["value"], s["against_own"]["n"]) == (0.25, 4)


def test_settle_is_what_the_chapter_says():
    assert settle("A", "B") == "first" and settle("A", "A") == "tie" and settle("tie", "B") == "tie" and settle(None, None) is None
    assert compare_answers([{"prompt": "?"}], ["long {a}"], ["x"], longest)["verdicts"] == ["first"]
    with pytest.raises(UserError):
        judge_mt_bench([], [], longest) or longest("no form")
