"""The sandbox under attack, behind each wall that works here, and HumanEval's own problems."""
import json
import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course import sandbox
from llm_course.generate import Sampling
from llm_course.reading import UserError, read_rows
from llm_course.sandbox import CHEATS, ESCAPES, base_program, grade_programs, grade_samples, pass_at_k, read_humaneval, run_program, run_tests, try_cheat, try_escape, walls
from llm_course.suites import suite_key

TESTS = "def check(candidate):\n    assert candidate(4) == 8\n    assert candidate(-3) == -6\n"
RIGHT = "def double(x):\n    return 2 * x\n"
INSIDE_ONLY = {"start another program", "a fork bomb of 100", "a signal to the judge", "make namespaces", "hold shared memory beyond the bound"}      # what the walls alone leave: it concerns only what is inside
SLOW = {"loop", "sleep, deaf to signals", "print without end", "answer without end", "recurse without end"}


@pytest.fixture(params=["bwrap", "unshare"])
def wall(request) -> str:
    if request.param not in walls():
        pytest.skip(f"{request.param} is not here, or may not make namespaces")
    return request.param


def side_by_side(f, names) -> dict:
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(f, names)))


def marked(mark: str) -> list[int]:
    "Processes with a mark among their arguments, after two seconds in which they may end."
    until = time.monotonic() + 2
    while (found := sandbox._left_behind(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def test_no_attempt_gets_out(wall):
    results = side_by_side(lambda n: try_escape(n, wall), ESCAPES)
    assert not [n for n, r in results.items() if r["escaped"]]
    assert {r["reason"] for n, r in results.items() if n in ("loop", "sleep, deaf to signals", "print without end")} == {"timed out"}


def test_the_wall_holds_without_the_filter(wall):
    "On a processor whose calls the filter does not know."
    results = side_by_side(lambda n: try_escape(n, wall, filtered=False), [n for n in ESCAPES if n not in SLOW])
    assert {n for n, r in results.items() if r["escaped"]} <= INSIDE_ONLY


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")
def test_the_filter_holds_without_a_wall():
    names = ["connect to a service of ours", "open a socket past Python", "start another program", "a fork bomb of 100", "live on after the end", "a signal to us", "a signal to us, by a file", "lower our bounds",
             "hold shared memory beyond the bound", "a signal to the judge", "trace the judge"]
    results = side_by_side(lambda n: try_escape(n, "none", allow_unsafe=True), names)
    filtered = run_program("", wall="none", allow_unsafe=True)["filtered"]
    assert filtered == (os.uname().machine in ("x86_64", "aarch64"))
    assert not filtered or not [n for n, r in results.items() if r["escaped"]]


DISTURB = {"a signal, by a file": "import fcntl, os\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())\nfcntl.fcntl(r, 10, 9)\n"
                                  "fcntl.fcntl(r, fcntl.F_SETFL, fcntl.fcntl(r, fcntl.F_GETFL) | os.O_ASYNC)\nos.write(w, b'x')",
           "no time to compute": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
           "the last turn of all": "import os\nos.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))", "another core": "import os\nos.sched_setaffinity(os.getppid(), {0})"}


@pytest.mark.parametrize("name", DISTURB)
def test_the_judge_is_left_in_peace(wall, name):
    if os.uname().machine not in ("x86_64", "aarch64"):
        pytest.skip("the filter does not know this processor")
    assert run_program(DISTURB[name], wall=wall)["reason"].startswith("PermissionError")
    quiet = "".join(f"    {line}\n" for line in DISTURB[name].splitlines())
    assert run_tests(f"try:\n{quiet}except OSError:\n    pass\n{RIGHT}", TESTS, "double", wall=wall)["passed"]


def test_honest_programs_may_ask_for_their_own_bounds(wall):
    code = "import fcntl, os, resource, threading\nt = threading.Thread(target=print, args=('t',))\nt.start(); t.join()\nr, w = os.pipe()\n"
    assert run_program(code + "print(resource.getrlimit(resource.RLIMIT_AS)[0], fcntl.fcntl(r, fcntl.F_GETFL), os.isatty(1))", wall=wall)["output"] == f"t\n{1 << 30} 0 False\n"


def test_attempts_are_real():
    "Without a wall and a filter the same attempts succeed: else the tests above would prove nothing."
    names = ["read a file of ours", "write beside it", "connect to a service of ours", "start another program", "live on after the end", "read the judge's memory", "a signal to us",
             "a signal to us, by a file", "lower our bounds", "hold shared memory beyond the bound"]
    results = side_by_side(lambda n: try_escape(n, "none", allow_unsafe=True, filtered=False), names if sys.platform == "linux" else names[:2])
    kept = {n for n, r in results.items() if not r["escaped"]}
    assert kept <= ({"read the judge's memory"} if os.geteuid() else set())       # an ordinary user may not look into a process that forbids it


def test_no_cheat_passes(wall):
    results = side_by_side(lambda n: try_cheat(n, wall), CHEATS)
    assert not [n for n, r in results.items() if r["passed"]]
    assert not [r for r in results.values() if r["reason"].startswith("no verdict")]


def test_shared_tests_can_be_cheated(wall):
    "Documented as not blocked: an object that is equal to everything, where tests and program share a process."
    assert all(try_cheat(n, wall, shared=True)["passed"] for n in ("equal to everything", "forge a reply beforehand"))
    assert not try_cheat("leave with status 0", wall, shared=True)["passed"] and run_tests(RIGHT, TESTS, "double", shared=True, wall=wall)["passed"]


@pytest.mark.parametrize("loop", ["for got, want in zip(map(candidate, (4, -3)), (8, -6)):\n        assert got == want", "assert not [y for y in map(candidate, (4, -3)) if y not in (8, -6)]"])
def test_no_exception_ends_a_loop_of_the_tests(wall, loop):
    tests = f"def check(candidate):\n    {loop}\n"
    assert run_tests(RIGHT, tests, "double", wall=wall)["passed"]
    result = run_tests("def double(x):\n    raise StopIteration\n", tests, "double", wall=wall)
    assert not result["passed"] and result["reason"].startswith("Exception: StopIteration")


def test_samples_of_two_runs_have_no_seed_in_common():
    class Model:
        name, seeds = "seeds", []
        def generate(self, prompts, seed=0, **kw):
            self.seeds.append(seed)
            return ["    pass\n" for _ in prompts]
    for seed in (0, 1, 2):
        suite = sandbox.humaneval_suite(Path(__file__).parent.parent / "data" / "mini_humaneval.jsonl", 20, sampling=Sampling(0.8), seed=seed, allow_unsafe=True)
        suite.answer(Model(), suite.items[:1])
    assert len(set(Model.seeds)) == 60


def test_what_decides_the_answers_belongs_to_their_key():
    make = lambda **kw: suite_key(sandbox.humaneval_suite(Path(__file__).parent.parent / "data" / "mini_humaneval.jsonl", allow_unsafe=True, **kw), "m")
    others = [{}, {"chat": True}, {"max_new_tokens": 9}, {"sampling": Sampling(0.5)}, {"sampling": Sampling(0.5, top_p=0.9)}, {"samples": 2, "sampling": Sampling(0.5)}, {"seed": 1}]
    assert len({make(**kw) for kw in others}) == len(others) and make() == make()


def test_nothing_outlives_a_course_that_is_killed(wall):
    mark = f"mark-{os.getpid()}-{wall}"
    task = sandbox._task("while True: pass", seconds=2.0)
    sandbox._command(wall)
    pid = os.fork()
    if not pid:
        try:
            sandbox._verdict(task, wall, mark)
        finally:
            os._exit(0)
    try:
        until = time.monotonic() + 20
        while not sandbox._left_behind(mark) and time.monotonic() < until:
            time.sleep(0.05)
        assert sandbox._left_behind(mark)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    until = time.monotonic() + 15
    while sandbox._left_behind(mark) and time.monotonic() < until:        # bwrap ends at once, unshare when the judge's clock rings
        time.sleep(0.1)
    assert not sandbox._left_behind(mark)


def test_output_is_cut_and_memory_stays(wall):
    result = run_program("while True: print('x' * 1_000_000)", seconds=0.5, wall=wall)
    assert result["reason"] == "timed out" and len(result["output"]) == 1 << 16
    assert run_program("print('é' * 3, end='')", wall=wall)["output"] == "ééé"


@pytest.mark.parametrize("seed", range(3))
def test_noise_on_the_pipes_is_no_verdict(wall, seed):
    noise = random.Random(seed).randbytes(4000)
    code = f"import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, {noise!r})\n    except OSError:\n        pass\n{RIGHT}"
    assert not run_tests(code, TESTS, "double", wall=wall, seconds=1)["passed"]


def test_a_harness_that_hangs_is_killed(monkeypatch):
    mark = f"mark-{os.getpid()}-hangs"
    monkeypatch.setattr(sandbox, "SPARE", 0.0)
    monkeypatch.setattr(sandbox, "_command", lambda wall: [sys.executable, "-I", "-S", "-c", "import time\nprint('hello')\ntime.sleep(60)"])
    start = time.monotonic()
    result = sandbox._verdict(sandbox._task("", seconds=1.5), "none", mark)
    assert not result["passed"] and result["reason"].startswith("no verdict") and time.monotonic() - start < 15 and not marked(mark)


def test_a_wall_that_breaks_is_no_verdict(monkeypatch):
    monkeypatch.setattr(sandbox, "_command", lambda wall: ["/bin/sh", "-c", "echo bwrap: no permission >&2; exit 1"])
    result = sandbox._verdict(sandbox._task(""), "bwrap")
    assert not result["passed"] and result["reason"] == "no verdict: bwrap: no permission"


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_refused(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sandbox, "walls", sandbox.walls.__wrapped__)
    if platform == "win32":
        monkeypatch.delattr(os, "fork")
    with pytest.raises(UserError, match="bubblewrap" if platform == "darwin" else "WSL"):
        run_program("print(1)")
    with pytest.raises(UserError, match="bubblewrap" if platform == "darwin" else "WSL"):
        sandbox.humaneval_suite(Path(__file__).parent.parent / "data" / "mini_humaneval.jsonl")


def test_a_wall_must_tell_right_from_wrong(monkeypatch):
    monkeypatch.setattr(sandbox, "_verdict", lambda *a: {"passed": True})
    assert sandbox.walls.__wrapped__() == ()


plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.complex_numbers(allow_nan=False),
                     lambda x: st.lists(x) | st.lists(x).map(tuple) | st.dictionaries(st.text() | st.integers(), x) | st.frozensets(st.integers(), max_size=1), max_leaves=6)


@settings(max_examples=100, deadline=None)
@given(plain)
def test_plain_data_come_back_as_they_were(value):
    got = sandbox.from_plain(json.loads(json.dumps(sandbox.to_plain(value))))
    assert got == value and repr(got) == repr(value)


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["tuple", "set", "dict", "bytes", "int", "complex", "frozenset"]), x, max_size=1), max_leaves=9))
def test_what_was_not_written_by_us_is_refused_or_harmless(value):
    try:
        got = [sandbox.from_plain(value)]
    except (ValueError, TypeError, KeyError):
        return
    while got:
        x = got.pop()
        assert type(x) in (type(None), bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)
        got += [*x, *x.values()] if isinstance(x, dict) else x if isinstance(x, (list, tuple, set, frozenset)) else []


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_papers(nck):
    n, c, k = nck
    paper = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
    assert abs(pass_at_k(n, c, k) - paper) < 1e-12


def test_humaneval_itself(testdata, wall):
    "All 164 solutions pass. Of empty bodies, `pass` and `return None` in turn, none does; the walls share them (`benchmarks/sandbox.py` tries all behind each)."
    items = read_humaneval(testdata / "eval" / "HumanEval.jsonl.gz")
    assert len(items) == 164
    solved = grade_programs([(i, base_program(i, i["canonical_solution"])) for i in items], wall=wall, seconds=10)
    assert not [(i["id"], r["reason"]) for i, r in zip(items, solved) if not r["passed"]]
    mine = items[walls().index(wall)::len(walls())]
    empty = grade_programs([(i, base_program(i, ("    pass", "    return None")[n % 2])) for n, i in enumerate(mine)], wall=wall, seconds=10)
    assert not [i["id"] for i, r in zip(mine, empty) if r["passed"]] and not [r for r in empty if r["reason"].startswith("no verdict")]


def test_the_originals_example(testdata, wall):
    "Its documentation gives pass@1 as 0.4999999999999999."
    problem = read_humaneval(testdata / "eval" / "human_eval_example_problem.jsonl")
    result = grade_samples(problem, [r for _, r in read_rows(testdata / "eval" / "human_eval_example_samples.jsonl")], wall=wall)
    assert result["pass@1"]["value"] == 0.4999999999999999
    assert [s["passed"] for s in result["samples"]] == [False, False, False, True, True, True]
    assert result["samples"][1]["reason"] == "timed out" and "EOF" in result["samples"][2]["reason"]


def test_the_record_is_of_these_attempts():
    record = json.loads((Path(__file__).parent.parent / "data" / "runs" / "sandbox.json").read_text(encoding="utf-8"))["figures"]
    assert record["attempts"] == list(ESCAPES)
    assert not any(record["escapes"][w]["filtered"] or record["cheats"][w]["apart"] for w in record["escapes"] if w != "none")
