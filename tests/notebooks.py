"""Run notebooks, as many at a time as there are cores: `python tests/notebooks.py [name …]`. Ends with one line that counts.

Each has a process of its own and does what `nbdev_test --path` does: a new namespace, nothing of this package imported. The processes are
forked from one that has loaded torch, matplotlib and nbdev, so that 48 notebooks don't load them 48 times. The longest come first: else
the last one runs alone while the other cores wait."""
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 450                                         # seconds a notebook
CORES = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
LONG = ("05_failures", "05_loop", "00a_tasks", "04_architecture", "08_dpo", "02b_quality", "05a_zero", "06_sft", "09_likelihood", "05_pretraining", "10_pipeline", "04_recipes",
        "02a_dedup", "03_bpe", "02e_engines", "01a_world", "05_curves", "07a_ppo")


def load() -> None:
    "What most notebooks need. Elsewhere than on Linux it isn't safe to fork with these loaded."
    if sys.platform == "linux":
        import accelerate, matplotlib.pyplot, nbdev.test, numpy, torch._dynamo, transformers.models.llama.modeling_llama        # noqa: E401, F401


def watch_exercises() -> list:
    "A list that fills with the checks of the exercises that a notebook defines."
    import llm_course.course as course
    found, exercise = [], course.exercise
    course.exercise = lambda check: found.append(exercise(check)) or found[-1]
    return found


def is_sound(check) -> bool:
    "Did the check of an exercise say `right` to the solution, something else to another answer, and does it refuse an empty one?"
    def empty(*args, **kw): ...
    verdicts = [str(v) for v in check.verdicts]
    faults = ["no answer was right"] * (not any(v.startswith("right") for v in verdicts)) + ["no wrong answer was shown to it"] * all(v.startswith("right") or "is still empty" in v for v in verdicts)
    faults += ["an empty answer passes"] * (str(check(empty)) == "right" or str(check(lambda *args, **kw: [None][0])) == "right")
    print(f"exercise {check.__name__}: {', '.join(faults)}") if faults else None
    return not faults


def execute(notebook: Path, output: Path) -> None:
    "In the new process: run all cells, what they print into a file, and end with status 0 if none failed."
    status = 1
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1), os.dup2(stream, 2)
        from nbdev.config import get_config
        from nbdev.test import test_nb
        sys.argv[1:] = []
        sys.path[:] = [p for p in sys.path if p != str(ROOT / "tests")]
        os.chdir(notebook.parent)
        exercises = watch_exercises()
        good, _ = test_nb(notebook, skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)
        status = int(not good or not all(map(is_sound, exercises)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def start(notebook: Path, output: Path) -> tuple[int, float]:
    "Process id, and when it began."
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        execute(notebook, output)
    return pid, time.perf_counter()


def ended(pid: int, began: float) -> tuple[bool, bool, float] | None:
    "Was it good, was it stopped, CPU seconds with all that it started; None while it runs."
    late = time.perf_counter() - began > LIMIT
    if late:
        os.kill(pid, signal.SIGKILL)
    found, status, used = os.wait4(pid, 0 if late else os.WNOHANG)
    return (status == 0 and not late, late, used.ru_utime + used.ru_stime) if found else None


def main(names: list[str]) -> int:
    notebooks = [n for n in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) if not names or n.stem in names]
    todo, running, failed, begin = sorted(notebooks, key=lambda n: LONG.index(n.stem) if n.stem in LONG else len(LONG)), {}, 0, time.perf_counter()
    load()
    with tempfile.TemporaryDirectory() as outputs:
        while todo or running:
            while todo and len(running) < CORES:
                notebook = todo.pop(0)
                running[notebook] = start(notebook, Path(outputs, notebook.stem))
            time.sleep(0.1)
            for notebook, (pid, began) in list(running.items()):
                if (end := ended(pid, began)) is None:
                    continue
                good, late, used = end
                print(f"{'ok    ' if good else 'FAILED'} {notebook.name}  {time.perf_counter() - began:.0f} s, {used:.0f} s of CPU{'  (stopped: too slow)' if late else ''}", flush=True)
                if not good:
                    print(Path(outputs, notebook.stem).read_text(errors="replace")[-6000:])
                failed += not good
                del running[notebook]
    print(f"notebooks: {len(notebooks) - failed} passed, {failed} failed in {time.perf_counter() - begin:.0f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
