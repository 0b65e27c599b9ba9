"""Everything that must hold, in three parts: generated files agree with the notebooks, notebooks run, tests pass.

Run by `make test`. Ends with one line that counts. Options: the names of parts (sync, notebooks, pytest)."""
import hashlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NOTEBOOK_LIMIT, PYTEST_LIMIT = 40 * 60, 40 * 60
CORES = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
LONG = ("run", "sandbox", "labelling", "comparison", "processes", "engines", "serve", "bad_input", "mlm", "spikes", "preference", "grpo", "ppo", "lora", "real", "filtering", "scale")      # the files that take longest
ENV = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}


def run(*command: str, limit: float = 600, **kw) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, timeout=limit, env=ENV, **kw)


def tree() -> dict[str, str]:
    "A hash of each file that git tracks or would track."
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", capture_output=True, text=True, check=True).stdout.split("\0")
    return {n: hashlib.sha256((ROOT / n).read_bytes()).hexdigest() for n in names if n and (ROOT / n).is_file()}


def sync() -> tuple[int, int]:
    "Delete what is generated, generate it again, clean the notebooks: nothing may change."
    if not (ROOT / ".git").exists():
        print("sync: skipped, this is no git checkout")
        return 0, 0
    before = tree()
    for module in (ROOT / "llm_course").glob("*.py"):
        if module.name != "__init__.py":
            module.unlink()
    ok = all(run(*c).returncode == 0 for c in ((str(BIN / "nbdev_export"),), (sys.executable, "tests/pages.py"), (sys.executable, "tests/readme.py"), (str(BIN / "nbdev_clean"),)))
    after = tree()
    changed = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    for name in changed:
        print(f"sync: {name} differs from what the notebooks give; commit what make test has just written")
    if not changed and os.environ.get("CI"):
        dirty = run("git", "status", "--porcelain", capture_output=True, text=True).stdout
        print(dirty, end="")
        ok = ok and not dirty
    return (1, 0) if ok and not changed else (0, 1)


def notebooks() -> tuple[int, int]:
    "All notebooks, each from a clean namespace, as many at a time as there are cores: see `notebooks.py`."
    process = subprocess.Popen([sys.executable, "tests/notebooks.py"], cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True, errors="replace")
    timer, line = threading.Timer(NOTEBOOK_LIMIT, process.kill), ""
    timer.start()
    for line in process.stdout:
        print(line, end="", flush=True)
    timer.cancel()
    counts = re.match(r"notebooks: (\d+) passed, (\d+) failed", line)
    passed, failed = map(int, counts.groups()) if counts else (0, 1)
    return passed, max(failed, int(process.wait() != 0))


def pytest() -> tuple[int, int]:
    """The tests of `tests/`, one file more at a time than there are cores, since many tests wait for processes of their own; the longest first:
    else the last one runs alone while the other cores wait."""
    files = sorted(ROOT.glob("tests/test_*.py"), key=lambda f: (LONG.index(f.stem[5:]) if f.stem[5:] in LONG else len(LONG), f.name))
    done = run(sys.executable, "-m", "pytest", *(str(f.relative_to(ROOT)) for f in files), "--durations=8", "-n", str(CORES + 1), "--dist", "loadfile", "--no-loadscope-reorder",
               limit=PYTEST_LIMIT, capture_output=True, text=True)
    print(done.stdout[-12_000:], done.stderr[-4000:], sep="")
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?)", done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "")}
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    return counts.get("passed", 0), max(failed, int(done.returncode != 0))


if __name__ == "__main__":
    parts = {"sync": sync, "notebooks": notebooks, "pytest": pytest}
    chosen, results = sys.argv[1:] or list(parts), []
    for name in chosen:
        try:
            results.append(parts[name]())
        except subprocess.TimeoutExpired as e:
            print(f"{name}: stopped after {e.timeout:.0f} s")
            results.append((0, 1))
    passed, failed = (sum(column) for column in zip(*results))
    print(f"{passed} passed, {failed} failed")
    sys.exit(bool(failed))
