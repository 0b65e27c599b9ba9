"""What the sandbox lets through, and what it costs: all attempts to escape and to cheat behind each wall that works here, and HumanEval itself.

On HumanEval (test data) the authors' solutions must pass and empty bodies fail; solutions that were spoiled at random are judged twice, by a judge apart
and by tests in the program's own process: the verdicts of honest programs must agree. `--only attempts` runs the attempts and leaves HumanEval's figures as they stand in the record."""
import ast
import json
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from record import RUNS, arguments, rounded, save, testdata

from llm_course.reading import read_rows
from llm_course.sandbox import CHEATS, ESCAPES, base_program, grade_program, grade_programs, grade_samples, read_humaneval, try_cheat, try_escape, walls

PLACES = ("none", *reversed(walls()))
STUBS = {"pass": "    pass\n", "return None": "    return None\n"}
SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Add: ast.Sub, ast.Sub: ast.Add,
         ast.Mult: ast.Add, ast.And: ast.Or, ast.Or: ast.And, ast.Mod: ast.FloorDiv, ast.FloorDiv: ast.Mod}


def spoiled(program: str, rng: random.Random) -> str:
    "The program with one operator turned into its neighbour, or one whole number changed by one."
    tree = ast.parse(program)
    places = [(n, f, i) for n in ast.walk(tree) for f, value in ast.iter_fields(n) for i, v in enumerate(value if isinstance(value, list) else [value])
              if type(v) in SWAPS or f == "value" and isinstance(n, ast.Constant) and type(v) is int]
    node, field, i = rng.choice(places)
    value = getattr(node, field)
    if isinstance(node, ast.Constant):
        node.value += rng.choice((-1, 1))
    elif isinstance(value, list):
        value[i] = SWAPS[type(value[i])]()
    else:
        setattr(node, field, SWAPS[type(value)]())
    return ast.unparse(tree)


def attempts(wall: str) -> dict:
    "Names of the attempts that got out, with and without the filter of calls."
    with ThreadPoolExecutor(4) as pool:
        return {name: [n for n, r in zip(ESCAPES, pool.map(lambda n: try_escape(n, wall, True, filtered), ESCAPES)) if r["escaped"]]
                for name, filtered in (("filtered", True), ("unfiltered", False))}


def cheats(wall: str) -> dict:
    "Names of the cheats that passed, judged from outside and in their own process."
    return {name: [n for n in CHEATS if try_cheat(n, wall, True, shared)["passed"]] for name, shared in (("apart", False), ("shared", True))}


def whole(items: list[dict], wall: str) -> dict:
    "The authors' solutions one at a time, with the time of each; empty bodies."
    times, cpu, passed = [], [], 0
    for item in items:
        start = time.perf_counter()
        result = grade_program(item, base_program(item, item["canonical_solution"]), wall=wall, allow_unsafe=True)
        times.append(1000 * (time.perf_counter() - start))
        cpu.append(1000 * result["cpu_seconds"])
        passed += result["passed"]
    empty = {name: {"passed": sum(r["passed"] for r in grade_programs([(i, base_program(i, body)) for i in items], wall=wall, allow_unsafe=True)), "n": len(items)} for name, body in STUBS.items()}
    return {"canonical": {"passed": passed, "n": len(items)}, **empty, "ms_median": statistics.median(times), "ms_p90": sorted(times)[int(0.9 * len(times))],
            "cpu_ms_median": statistics.median(cpu)}


def agreement(items: list[dict], copies: int) -> dict:
    "Spoiled solutions, judged both ways; a program that runs out of time in only one of both is named."
    rng = random.Random(0)
    pairs = [(i, program) for i in items for _ in range(copies) if (program := _try_spoil(i, rng))]
    apart, shared = (grade_programs(pairs, shared=s) for s in (False, True))
    return {"n": len(pairs), "passed_apart": sum(r["passed"] for r in apart), "passed_shared": sum(r["passed"] for r in shared),
            "agree": sum(a["passed"] == s["passed"] for a, s in zip(apart, shared)),
            "timed_out": [sum(r["reason"] == "timed out" for r in results) for results in (apart, shared)],
            "differ": [i["id"] for (i, _), a, s in zip(pairs, apart, shared) if a["passed"] != s["passed"]]}


def _try_spoil(item: dict, rng: random.Random) -> str | None:
    try:
        return spoiled(base_program(item, item["canonical_solution"]), rng) + "\n"
    except IndexError:                                      # nothing in it to be changed
        return None


def humaneval(folder: Path, copies: int) -> dict:
    "The problems behind each wall, spoiled solutions judged both ways, and the original's example."
    items = read_humaneval(folder / "HumanEval.jsonl.gz")
    example = grade_samples(read_humaneval(folder / "human_eval_example_problem.jsonl"), [r for _, r in read_rows(folder / "human_eval_example_samples.jsonl")])
    return {"walls": {w: whole(items, w) for w in PLACES}, "spoiled": agreement(items, copies),
            "example_samples": {"pass@1": example["pass@1"]["value"], "verdicts": [s["passed"] for s in example["samples"]]}}


if __name__ == "__main__":
    options = arguments(__doc__, copies=2, only="")
    figures = {"attempts": list(ESCAPES), "escapes": {w: attempts(w) for w in PLACES}, "cheats": {w: cheats(w) for w in PLACES}}
    print(figures)
    figures["humaneval"] = json.loads((RUNS / "sandbox.json").read_text(encoding="utf-8"))["figures"]["humaneval"] if options.only == "attempts" else humaneval(testdata() / "eval", options.copies)
    print(figures["humaneval"])
    if options.save:
        figures = {k: rounded(v) if k != "humaneval" else v | {"walls": rounded(v["walls"], 1)} for k, v in figures.items()}
        save("sandbox", "Attempts to escape and to cheat behind each wall; HumanEval's solutions, empty bodies and spoiled solutions", figures)
