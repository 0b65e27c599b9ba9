"""What every benchmark script shares: the folder of real files, and records with command, hardware and versions."""
import argparse
import json
import os
import shlex
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llm_course.reading import write_json
from llm_course.pipeline import environment

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "data" / "runs"


def testdata() -> Path:
    "The folder of real public files (see LLM_COURSE_TESTDATA); ends the program where there is none."
    folder = Path(os.environ.get("LLM_COURSE_TESTDATA", ROOT.parent / "shared" / "data"))
    if not (folder / "MANIFEST.tsv").exists():
        sys.exit("no test data: set LLM_COURSE_TESTDATA to its folder")
    return folder


def installed(*names: str) -> dict[str, str | None]:
    "Versions of packages, None where one is missing."
    def find(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None
    return {n: find(n) for n in names}


def save(name: str, what: str, figures: dict, packages: tuple[str, ...] = ()) -> Path:
    "Write `data/runs/<name>.json`: what was measured, by which command, on what, and the figures. Figures only, no rows of data."
    env = environment()
    env["packages"] = {k: v for k, v in env["packages"].items() if k in ("llm_course", "numpy", "torch")} | installed(*packages)
    path = RUNS / f"{name}.json"
    write_json(path, {"what": what, "command": f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
                      "date": date.today().isoformat(), "environment": env, "figures": figures})
    print(f"written: {path.relative_to(ROOT)}")
    return path


def rounded(value, digits: int = 4):
    "Figures with as many digits as they deserve; small ones keep theirs."
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v, digits) for v in value]
    return round(value, digits) if isinstance(value, float) and abs(value) >= 0.01 else value


def command_of(run: Path) -> str:
    "The command that made a run, without its folder and without --update: what decides the result."
    words = shlex.split(json.loads((run / "config.json").read_text(encoding="utf-8"))["command"])
    where = words.index("--out") if "--out" in words else len(words)
    return shlex.join(["llm_course", *(w for w in words[1:where] + words[where + 2:] if w != "--update")])


def arguments(doc: str, **extra) -> argparse.Namespace:
    "Command-line arguments of a benchmark: `--save` writes the record; `extra` adds options by name and default."
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--save", action="store_true", help="write the record into data/runs/")
    for name, default in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default: {default}")
    return parser.parse_args()
