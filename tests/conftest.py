import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENV = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_RANK"))} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def llm_course(*args: str, cwd: Path | str = ".", timeout: float = 300, **kw) -> subprocess.CompletedProcess:
    "The command `llm_course`, as a user starts it."
    return subprocess.run([sys.executable, "-m", "llm_course.cli", *map(str, args)], cwd=cwd, env=ENV, timeout=timeout, capture_output=True, text=True, **kw)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    "The folder of one whole run of the smallest size."
    folder = tmp_path_factory.mktemp("smoke") / "run"
    done = llm_course("run", "--size", "smoke", "--out", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder.parent / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def testdata() -> Path:
    "Real public files, where they are at hand (see LLM_COURSE_TESTDATA)."
    folder = Path(os.environ.get("LLM_COURSE_TESTDATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (folder / "MANIFEST.tsv").exists():
        pytest.skip("no test data: set LLM_COURSE_TESTDATA to its folder")
    return folder


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())
