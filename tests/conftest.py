import json
import os
from pathlib import Path

import pytest
from commands import ENV, fresh_llm_course  # noqa: F401  (ENV for the tests)

SMOKE = ("--size", "smoke", "--set", "pretrain.tokens=100e3")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Path:
    "The folder of one whole run of the smallest size, with half of its pretraining."
    folder = tmp_path_factory.mktemp("smoke") / "run"
    done = fresh_llm_course("run", *SMOKE, "--out", folder)
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
