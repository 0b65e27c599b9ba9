"""One corpus by every engine that is installed here, once in peace and once with a task killed (signal 9) and the run repeated."""
import hashlib
import shutil
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

from llm_course.corpus import CORPUS_STAGES, list_inputs, write_plan
from llm_course.engines import Engine, die_once, run_tasks
from llm_course.reading import UserError, write_jsonl
from llm_course.world import inject_mess, make_village, python_docs, village_documents

SETTINGS = {"weights": {"village": 0.7, "docs": 0.3}, "budget_bytes": 3_000_000, "max_epochs": 4.0, "near_duplicate": 0.8, "keep_fraction": {"docs": 0.95},
            "held_out": 20, "replace": False, "dataset_bytes": 10**6, "local_dir": ""}


def digest(work: Path) -> str:
    return hashlib.sha256(b"".join((work / "result" / f).read_bytes() for f in ("train.jsonl", "val.jsonl", "funnel.json"))).hexdigest()[:16]


def run(here: Path, engine: Engine, accident: bool) -> dict:
    work = here / f"{engine.name}-{engine.tasks}-{accident}"
    write_plan(work, list_inputs(here / "raw", [], []), SETTINGS, [], shard_size=200)
    stages = [(n, partial(die_once, s, work) if accident and n == "clean" else partial(s, work), d) for n, (s, d) in CORPUS_STAGES.items()]
    start, message = time.perf_counter(), None
    try:
        run_tasks(stages, engine, work / "logs", every=1)
    except UserError as e:
        message = str(e).replace(str(here), "")[:80]
        run_tasks(stages, engine, work / "logs", every=1)
    return {"engine": engine.name, "tasks": engine.tasks, "workers": engine.workers, "killed": accident, "message": message, "seconds": round(time.perf_counter() - start, 1), "digest": digest(work)}


def available(partition: str) -> list[tuple[str, int, bool]]:
    "(engine, tasks, with an accident?); Ray's executor waits for its time limit when a process inside an actor is killed, so it runs in peace only."
    runs = [("local", 1, False), ("processes", 2, False), ("processes", 3, True)]
    runs += [("datatrove", n, False) for n in (1, 2, 7)] + [("datatrove", 3, True)]
    runs += [("slurm", 3, False), ("slurm", 3, True)] if partition and shutil.which("sbatch") else []
    try:
        import ray  # noqa: F401
        runs.append(("ray", 3, False))
    except ImportError:
        pass
    return runs


if __name__ == "__main__":
    from record import arguments, save     # here, so that the worker processes do not load it
    args = arguments(__doc__, partition="")
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        docs = inject_mess(village_documents(make_village(), 2_000_000), 0.03) + python_docs(800_000)
        for source in ("village", "docs"):
            write_jsonl(here / "raw" / f"{source}.jsonl", [d for d in docs if d["source"] == source])
        rows = []
        for name, tasks, accident in available(args.partition):
            rows.append(run(here, Engine(name, tasks, 2, args.partition, "00:10:00", 1), accident))
            print(rows[-1], flush=True)
    same = len({r["digest"] for r in rows}) == 1
    print("all the same bytes" if same else "THE BYTES DIFFER")
    if args.save:
        slurm = subprocess.run(["sinfo", "--version"], capture_output=True, text=True).stdout.strip() if shutil.which("sinfo") else None
        save("engines", "One corpus by every engine, in peace and with a killed task; digest of train.jsonl, val.jsonl and funnel.json", {"documents": len(docs), "same_bytes": same, "slurm": slurm, "rows": rows}, ("datatrove", "ray"))
