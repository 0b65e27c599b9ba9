"""The commands that a reader meets first: doctor, a copy of the notebooks; and that each chapter's exercises have one shape."""
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm_course.cli import main
from llm_course.course import copy_notebooks, doctor

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = [p for p in sorted((ROOT / "nbs").glob("[01]*.ipynb")) if p.stem != "00_index"]


def text_of(cell: dict) -> str:
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def test_doctor_says_what_to_do(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("Python", "torch", "memory", "cores", "disk", "sandbox"))
    import shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=1000))
    assert main(["doctor"]) == 1
    assert "free some space" in capsys.readouterr().out


def test_doctor_sees_a_gpu_build_that_is_missing(monkeypatch):
    import shutil
    import torch
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    assert next(r for r in doctor() if r["what"] == "device")["state"] == "note"
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert next(r for r in doctor() if r["what"] == "torch")["state"] == "bad"


def test_a_copy_never_overwrites(tmp_path, capsys):
    assert main(["copy-notebooks", str(tmp_path / "mine")]) == 0
    (tmp_path / "mine" / "00_start.ipynb").write_text("my work")
    assert main(["copy-notebooks", str(tmp_path / "mine")]) == 2
    assert "nothing was copied" in capsys.readouterr().err and (tmp_path / "mine" / "00_start.ipynb").read_text() == "my work"
    assert main(["copy-notebooks", str(tmp_path / "empty"), "--clean"]) == 0
    assert not any(c.get("outputs") for p in (tmp_path / "empty").glob("*.ipynb") for c in json.loads(p.read_text(encoding="utf-8"))["cells"])


def test_no_notebook_needs_the_folder_of_the_repository():
    "What a chapter reads lies inside the package; so a copy elsewhere, or Colab, has it too."
    for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                assert not re.search(r"[\"'](?:\.\./)+(?:data|tests|benchmarks|configs|nbs|llm_course)", text_of(cell)), (path.stem, cell["id"])


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("[0-9]*.ipynb")), ids=lambda p: p.stem)
def test_the_first_cell_installs_what_is_missing(path):
    code = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert not code or "llm_course[course]" in text_of(code[0])


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_exercises_have_one_shape(path):
    """Three to six, numbered; each check is decorated and folded, called on something that is not filled in. What it says to
    the solution, to a wrong answer and to an empty one, the runner of the notebooks looks at."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    start = next(k for k, c in enumerate(cells) if c["cell_type"] == "markdown" and re.search(r"^## Exercises", text_of(c), re.M))
    prose = "\n".join(text_of(c) for c in cells if c["cell_type"] == "markdown")
    numbers = [int(n) for n in re.findall(r"^\*\*(\d+)\.", prose, re.M)]
    assert numbers == list(range(1, len(numbers) + 1)) and 3 <= len(numbers) <= 6, numbers
    code = [text_of(c) for c in cells if c["cell_type"] == "code"]
    checks = [name for s in code for name in re.findall(r"^@exercise\ndef (check_\w+)", s, re.M)]
    assert len(checks) >= 3, "fewer than three check themselves"
    for name in checks:
        defined = next(s for s in code if re.search(rf"^def {name}\b", s, re.M))
        assert path.stem == "00_start" or defined.startswith('#| code-fold: true\n#| code-summary: "The check"'), name
        assert any(re.search(rf"^print\({name}\(|^{name}\(", s, re.M) for s in code), f"{name} is never called for the reader"
    undecorated = [n for c in cells[start:] if c["cell_type"] == "code" for n in re.findall(r"(?<!@exercise\n)^def (check_\w+)", text_of(c), re.M)]
    assert not undecorated, undecorated
