"""Peak memory of preparing a corpus, in memory and in shards, for corpora of growing size; each in a process of its own."""
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llm_course.corpus import CORPUS_STAGES, list_inputs, refine, write_plan
from llm_course.reading import read_rows, write_jsonl
from llm_course.world import make_village, village_documents

SETTINGS = {"weights": {"village": 1.0}, "budget_bytes": 10**12, "max_epochs": 1.0, "near_duplicate": 0.8, "keep_fraction": {}, "held_out": 20, "replace": False,
            "dataset_bytes": 10**12, "local_dir": ""}
SHARD = 2000


def plain(raw: Path, work: Path) -> None:
    refine([row | {"source": "village"} for _, row in read_rows(raw / "village.jsonl")])


def sharded(raw: Path, work: Path) -> None:
    write_plan(work, list_inputs(raw, [], []), SETTINGS, [], shard_size=SHARD)
    for stage, _ in CORPUS_STAGES.values():
        stage(work)


def peak() -> float:
    "Largest resident set of this process so far, in MB. (Linux; getrusage would include what the parent held when it forked.)"
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def child(how: str, folder: Path) -> None:
    "What a process of its own does: one preparation; prints the peak of its memory above that of the imports, in MB, and the seconds."
    start, before = time.perf_counter(), peak()
    {"plain": plain, "sharded": sharded}[how](folder / "raw", folder / "work")
    print(json.dumps({"mb": round(peak() - before, 1), "imports_mb": round(before, 1), "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], Path(sys.argv[3]))
        sys.exit()
    from record import arguments, save
    args, rows = arguments(__doc__, largest=40_000_000), []
    for size in (args.largest // 8, args.largest // 4, args.largest // 2, args.largest):
        with tempfile.TemporaryDirectory() as name:
            docs = village_documents(make_village(n_people=160), size)
            write_jsonl(Path(name) / "raw" / "village.jsonl", docs)
            for how in ("plain", "sharded"):
                done = subprocess.run([sys.executable, __file__, "child", how, name], capture_output=True, text=True, check=True)
                rows.append({"how": how, "mb_of_text": round(size / 1e6, 1), "documents": len(docs)} | json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
    if args.save:
        save("corpus_memory", "Peak memory (resident set above that after the imports) of preparing a corpus in memory and in shards", {"shard_documents": SHARD, "rows": rows})
