"""What the site and the reader rely on, checked without rendering anything."""
import ast
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def cells(path: Path) -> list[dict]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c | {"source": c["source"] if isinstance(c["source"], str) else "".join(c["source"])} for c in found]


def is_chapter(path: Path) -> bool:
    "Chapters have the numbers 00 to 10; what comes after is guides and reference."
    return path.stem != "00_index" and path.stem[:2] <= "10"


def test_all_chapters_are_there():
    numbers = {p.stem.split("_")[0] for p in NOTEBOOKS}
    assert {"00", "00a", "01", "01a", "02", "02a", "02b", "02c", "03", "04", "04a", "04b", "05", "05a", "06", "07", "07a", "08", "09", "09a", "09b", "10"} <= numbers


def test_the_sidebar_lists_each_notebook_once():
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    listed = re.findall(r"nbs/\w+\.ipynb", json.dumps(config["website"]["sidebar"]))
    assert sorted(listed) == [f"nbs/{p.name}" for p in NOTEBOOKS]
    assert [f"nbs/{p.name}" for p in NOTEBOOKS][0] == listed[0] == "nbs/00_index.ipynb"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_shape(path):
    found = cells(path)
    assert found[0]["cell_type"] == "markdown" and re.match(r"# \S[^\n]*\n\n> \S", found[0]["source"]), "title and one-line subtitle"
    assert path.stat().st_size < 1_000_000
    for n, cell in enumerate(found):
        assert cell["source"].strip(), f"cell {n} is empty"
        assert cell["source"].strip() != "---", f"cell {n}: a bare rule stops the site; use ***"
        for out in cell.get("outputs", []):
            assert out["output_type"] != "error", f"cell {n} failed when it was saved"
            assert out.get("name") != "stderr", f"cell {n} wrote to standard error"
    if is_chapter(path):
        text = "\n".join(c["source"] for c in found if c["cell_type"] == "markdown")
        for part in ("In this chapter", "## Summary", "## Exercises", "## Go further"):
            assert part in text, f"no {part}"
        assert any("#| default_exp" in c["source"] for c in found)


def speaks(source: str) -> bool:
    "Does a cell leave something to be seen for certain: a print or a display at its top level, or a figure?"
    tree = ast.parse("\n".join(line for line in source.split("\n") if not line.startswith(("%", "!"))))
    name = lambda call: getattr(call.func, "id", getattr(call.func, "attr", ""))
    calls = [c for node in tree.body if isinstance(node, (ast.Expr, ast.Assign)) for c in ast.walk(node) if isinstance(c, ast.Call)]
    shown = [node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    return any(name(c) == "subplots" for c in calls) or any(name(c) == "print" for c in shown) or bool(shown) and name(shown[-1]) in ("Markdown", "HTML", "show_chat", "show_task")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_to_be_seen_was_saved(path):
    "A reader of the site sees only what the last run from top to bottom left in the file."
    code = [(n, c) for n, c in enumerate(cells(path)) if c["cell_type"] == "code" and not re.search(r"^#\|\s*(exports?|eval: false)\b", c["source"], re.M)]
    assert not [n for n, c in code if speaks(c["source"]) and not c["outputs"]]


def test_each_entry_of_the_box_is_a_paragraph():
    "What you will build, need, and how long it takes: pandoc, which renders the site, joins lines that no blank line parts."
    pandoc = pytest.importorskip("pypandoc")
    boxes = {p.stem: re.search(r"^::: {\.callout-note}\n## In this chapter\n.*?^:::$", "\n".join(c["source"] for c in cells(p)), re.M | re.S)[0] for p in NOTEBOOKS if is_chapter(p)}
    rendered = pandoc.convert_text("\n\n".join(f"# {name}\n\n{box}" for name, box in boxes.items()), "html", format="markdown")
    joined = [name for name, html in re.findall(r"<h1[^>]*>(\w+)</h1>(.*?)(?=<h1|\Z)", rendered, re.S)
              if len(found := re.findall(r"<p><strong>(You will build|You need|Takes)</strong>", html)) != 3 or len(set(found)) != 3]
    assert rendered.count("<h1") == len(boxes) and not joined, joined


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_resolve(path):
    for cell in cells(path):
        for target in re.findall(r"\]\(([^)\s]+)\)", cell["source"]) if cell["cell_type"] == "markdown" else []:
            if not target.startswith(("http", "#", "mailto")):
                assert (path.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "llm_course").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_exports_are_documented_used_and_tested(path):
    "Each exported name has a docstring (constants excepted), and stands in a cell of its notebook that is not exported."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    source = re.search(r"File to edit: \.\./(nbs/\w+\.ipynb)", path.read_text(encoding="utf-8"))
    notebook = cells(ROOT / source[1])
    free = "\n".join(c["source"] for c in notebook if c["cell_type"] == "code" and not re.search(r"^#\|\s*exports?\b", c["source"], re.M))
    exported = "\n".join(c["source"] for c in notebook if re.search(r"^#\|\s*exports?\b", c["source"], re.M))
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
            if isinstance(node, ast.FunctionDef):
                untyped = [a.arg for a in node.args.args + node.args.kwonlyargs if a.annotation is None and a.arg not in ("self", "model", "closure", "figure", "tokenizer", "sampling")]
                assert not untyped, f"{node.name}: {untyped} have no type"
            assert re.search(rf"\b{node.name}\b", free) or len(re.findall(rf"\b{node.name}\b", exported)) > 1, f"{node.name} is never used"


def test_no_function_is_too_long():
    long = []
    for path in (ROOT / "llm_course").glob("[a-z]*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50:
                long.append(f"{path.name}:{node.name}")
    assert not long


def test_records_name_their_command():
    "Each record says what it is and how it was made; a script that it names is in the repository; no record is large, none holds texts."
    for path in sorted((ROOT / "data" / "runs").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record.get("command"), path.name
        for script in re.findall(r"benchmarks/\w+\.py", record["command"]):
            assert (ROOT / script).exists(), (path.name, script)
        assert path.stat().st_size < 200_000, path.name
