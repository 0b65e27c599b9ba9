"""The corpus on every engine that this machine has, with real processes killed: the same bytes."""
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ENV, llm_course
from llm_course.engines import Engine, run_tasks

SMALL = ["--size", "smoke", "--set", "data.village_bytes=400000", "data.docs_bytes=60000", "data.code_bytes=60000"]
FILES = ("train.jsonl", "val.jsonl", "conversations.jsonl", "pairs.jsonl", "unpaired.jsonl", "tasks.jsonl", "funnel.json")


def digest(corpus: Path) -> str:
    return hashlib.sha256(b"".join((corpus / f).read_bytes() for f in FILES)).hexdigest()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> str:
    "The corpus of one process, as its hash."
    folder = tmp_path_factory.mktemp("plain")
    done = llm_course("prepare", *SMALL, "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return digest(folder / "run" / "corpus")


@pytest.mark.parametrize("engine,tasks", [("processes", 2), ("datatrove", 1), ("datatrove", 7)])
def test_engines_make_the_same_bytes(engine, tasks, plain, tmp_path):
    if engine == "datatrove":
        pytest.importorskip("datatrove")
    done = llm_course("prepare", *SMALL, "--out", tmp_path / "run", "--engine", engine, "--tasks", tasks, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "run" / "corpus") == plain
    assert not (tmp_path / "run" / "corpus" / "work").exists()


@pytest.mark.parametrize("engine", ["local", "processes"])
def test_the_whole_program_is_killed_and_started_again(engine, plain, tmp_path):
    arguments = ["prepare", *SMALL, "--out", str(tmp_path / "run"), "--engine", engine, "--tasks", "3"]
    process = subprocess.Popen([sys.executable, "-m", "llm_course.cli", *arguments], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    work, deadline = tmp_path / "run" / ".corpus.partial" / "work", time.time() + 60
    while not (work / "clean").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "corpus").exists()
    again = llm_course(*arguments, timeout=200)
    assert again.returncode == 0, again.stderr
    assert "going on where it was stopped" in again.stdout
    assert digest(tmp_path / "run" / "corpus") == plain


def test_a_missing_extra_is_named(tmp_path):
    (tmp_path / "datatrove").mkdir()
    (tmp_path / "datatrove" / "__init__.py").write_text("raise ImportError('as if it were not installed')")
    done = subprocess.run([sys.executable, "-m", "llm_course.cli", "prepare", *SMALL, "--out", str(tmp_path / "run"), "--engine", "datatrove"],
                          env=ENV | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).resolve().parents[1]}"}, capture_output=True, text=True)
    assert done.returncode == 2 and 'pip install "llm_course[scale]"' in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments,message", [(["--engine", "spark"], "unknown engine 'spark'"), (["--engine", "slurm"], "--partition"), (["--engine", "local", "--tasks", "0"], "at least one task"),
                                               (["--engine", "ray", "--time", "soon"], "HH:MM:SS")])
def test_bad_engines(arguments, message, tmp_path):
    done = llm_course("prepare", *SMALL, "--out", tmp_path / "run", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_bad_row_found_by_a_worker_is_told(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "Good."}\n{"text": \n')
    done = llm_course("prepare", *SMALL, "--data", tmp_path / "bad.jsonl", "--out", tmp_path / "run", "--engine", "processes", "--tasks", "2")
    assert done.returncode == 2 and "bad.jsonl:2" in done.stderr and "Traceback" not in done.stderr


def test_many_short_tasks_end_well(tmp_path):
    "Several processes that end at the same moment: each exit code is read by the one who waits for it."
    run_tasks([("nothing", max, True)], Engine("processes", tasks=150, workers=4), tmp_path / "logs")
