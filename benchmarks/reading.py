"""Memory and speed of `read_rows` on files of several gigabytes, each read in a process of its own.

The files are made of one block of rows, compressed once and repeated, so that they take little space; what is read is as long as it says."""
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from record import arguments, save

# ru_maxrss of a new process is never below what its parent held when it was started; VmHWM begins anew with the program
PEAK = """
def peak():
    try:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(n, time.perf_counter() - start, peak())"""
READ = """import resource, sys, time
from llm_course.reading import read_rows
start = time.perf_counter()
n = sum(1 for _ in read_rows(sys.argv[1]))""" + PEAK
JSON_LOAD = """import gzip, json, resource, sys, time
start = time.perf_counter()
n = len(json.load(gzip.open(sys.argv[1], "rt", encoding="utf-8")))""" + PEAK


def rows(n: int) -> list[dict]:
    "Rows of about a kilobyte, with letters outside ASCII."
    return [{"id": i, "source": "made up", "text": f"Number {i}: the naïve café beside the mill was full. " * 19} for i in range(n)]


def packed(parts: dict[str, bytes], repeat: int, path: Path) -> int:
    "Write gzip members first, body * repeat, last; returns the bytes when unpacked."
    with open(path, "wb") as f:
        for name, times in (("first", 1), ("body", repeat), ("last", 1)):
            member = gzip.compress(parts.get(name, b""), 1)
            for _ in range(times):
                f.write(member)
    return len(parts.get("first", b"")) + len(parts["body"]) * repeat + len(parts.get("last", b""))


def bodies(block: list[dict]) -> dict[str, dict[str, bytes]]:
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in block).encode()
    table = "".join(f'{r["id"]},{r["source"]},"{r["text"]}"\n' for r in block).encode()
    return {"jsonl": {"body": lines}, "json": {"first": b"[\n", "body": lines.replace(b"}\n", b"},\n"), "last": b'{"id": -1}\n]'},
            "csv": {"first": b"id,source,text\n", "body": table}, "txt": {"body": "".join(r["text"] + "\n\n" for r in block).encode()}}


def parquet(block: list[dict], repeat: int, path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq
    table = pa.Table.from_pylist(block)
    with pq.ParquetWriter(path, table.schema) as w:
        for _ in range(repeat):
            w.write_table(table)
    return table.nbytes * repeat


def measure(program: str, what: str, path: Path, size: int) -> dict:
    out = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True).stdout.split()
    n, seconds, kilobytes = int(out[0]), float(out[1]), int(out[2])
    row = {"what": what, "gigabytes": round(size / 1e9, 2), "rows": n, "seconds": round(seconds, 1), "megabytes_per_second": round(size / 1e6 / seconds), "peak_mb": round(kilobytes / 1024)}
    print(row, flush=True)
    return row


def main() -> None:
    args = arguments(__doc__, gigabytes=5.0, others=1.0)
    block, found = rows(20_000), []
    with tempfile.TemporaryDirectory() as folder:
        for name, parts in bodies(block).items():
            path = Path(folder, f"big.{name}.gz")
            goal = args.gigabytes if name == "jsonl" else args.others
            size = packed(parts, max(1, round(goal * 1e9 / len(parts["body"]))), path)
            found.append(measure(READ, f"{name}.gz", path, size))
            path.unlink()
        path = Path(folder, "big.parquet")
        found.append(measure(READ, "parquet", path, parquet(block, max(1, round(args.others * 50)), path)))
        path = Path(folder, "load.json.gz")
        size = packed(bodies(block)["json"], max(1, round(args.others * 10)), path)
        found.append(measure(READ, "json.gz, a fifth", path, size))
        found.append(measure(JSON_LOAD, "the same by json.load", path, size))
    if args.save:
        save("reading", "read_rows on large files, one process each: rows, seconds, peak resident memory", {"files": found}, ("pyarrow",))


if __name__ == "__main__":
    main()
