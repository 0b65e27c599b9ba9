"""The site, as far as it can be checked without Quarto: processed notebooks, links and anchors, references, what is made from the notebooks."""
import html
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from pages import NBS, ROOT, api_page, curve_svg, head, llms_txt, notebooks, open_links, page_of

pandoc = pytest.importorskip("pypandoc")
NOTEBOOKS = notebooks()


def text_of(cell: dict) -> str:
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def processed(path: Path) -> list[dict]:
    "The cells that go to Quarto, after nbdev's processors."
    from nbdev.process import NBProcessor
    from nbdev.processors import FilterDefaults
    book = NBProcessor(path, procs=FilterDefaults().procs())
    book.process()
    return [c for c in book.nb.cells if c.get("source") is not None]


@pytest.fixture(scope="module")
def site() -> dict[str, list[dict]]:
    return {p.name: processed(p) for p in NOTEBOOKS}


@pytest.fixture(scope="module")
def anchors(site) -> dict[str, set[str]]:
    "The ids of each page's headings, as pandoc makes them, which is what renders the site."
    found = {}
    for name, cells in site.items():
        text = "\n\n".join(text_of(c) for c in cells if c["cell_type"] == "markdown")
        found[name] = set(re.findall(r'<(?:h[1-6]|section|div|span)[^>]*\bid="([^"]+)"', pandoc.convert_text(text, "html", format="markdown", extra_args=["--mathjax"])))
    return found


def links(cells: list[dict]):
    for cell in cells:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"```.*?```|`[^`\n]*`", "", text_of(cell), flags=re.S)
            yield from re.findall(r"\]\(([^)\s]+)\)", text)
            yield from re.findall(r'(?:src|href)="([^"]+)"', text)


def test_every_internal_link_and_anchor_resolves(site, anchors):
    broken = []
    for name, cells in site.items():
        for target in links(cells):
            if re.match(r"https?:|mailto:", target):
                continue
            file, _, anchor = target.partition("#")
            if file and not (NBS / file).exists():
                broken.append((name, target, "no such file"))
            elif anchor and html.unescape(anchor) not in anchors.get(file or name, set()):
                broken.append((name, target, "no such heading"))
    assert not broken, broken


def test_pages_named_elsewhere_exist():
    pages = {page_of(p) for p in NOTEBOOKS}
    assert len(pages) == len(NOTEBOOKS), "two notebooks would have the same page"
    named = re.findall(r"https://llm-course\.github\.io/llm_course/(\S+?\.html)", (ROOT / "llms.txt").read_text()) + re.findall(r"\]\(/(\S+?\.html)\)", (ROOT / "404.qmd").read_text())
    assert set(named) <= pages | {"index.html"} and len(set(named)) >= len(NOTEBOOKS)
    config = yaml.safe_load((ROOT / "_quarto.yml").read_text())
    for file in re.findall(r"nbs/[\w./]+", json.dumps(config)):
        assert (ROOT / file).exists() or file == "nbs/", file


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_goes_to_quarto_is_clean(site, path):
    "No directive of nbdev is left, boxes are closed, the source of the package is shown, and the page is light."
    cells, source = site[path.name], json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join(text_of(c) for c in cells if c["cell_type"] != "raw")
    assert not re.search(r"^#\|\s*(exports?|hide|default_exp)\b", text, re.M)
    depth = 0
    for line in re.findall(r"^:::+.*$", "\n".join(text_of(c) for c in cells if c["cell_type"] == "markdown"), re.M):
        depth += 1 if re.match(r":::+\s*\{", line) else -1
        assert depth >= 0, line
    assert depth == 0, "a box is not closed"
    for cell in source:
        if cell["cell_type"] == "code" and text_of(cell).startswith("#| exports"):
            body = text_of(cell).partition("\n")[2].strip()
            assert body in text, f"the site does not show: {body[:80]}"
    assert sum(len(json.dumps(c.get("outputs", []))) + len(text_of(c)) for c in cells) < 1_500_000


def test_exported_cells_are_shown():
    "With `#| export` nbdev takes the source off the page."
    assert not [p.stem for p in NOTEBOOKS for c in json.loads(p.read_text(encoding="utf-8"))["cells"] if re.match(r"#\|\s*export\b", text_of(c))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_pictures_have_a_text(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if any("image/png" in o.get("data", {}) or "image/svg+xml" in o.get("data", {}) for o in cell.get("outputs", [])):
            alt = re.search(r'^#\| fig-alt: "?(.{30,}?)"?$', text_of(cell), re.M)
            assert alt, f"cell {cell['id']} has a picture without fig-alt"


def entries() -> dict[str, str]:
    return dict(re.findall(r"^@\w+\{([\w-]+),\n(.*?)^\}", (NBS / "references.bib").read_text(encoding="utf-8"), re.M | re.S))


def test_references_agree_with_the_lists_of_the_chapters():
    "Each key is defined, each entry is used, and arXiv number and year are those of the chapter's line."
    bib, used = entries(), set()
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "markdown":
                continue
            for line in re.findall(r"^- .*\[@[\w-]+\]$", text_of(cell), re.M):
                key = re.search(r"\[@([\w-]+)\]$", line)[1]
                used.add(key)
                assert key in bib, (path.stem, key)
                for number in re.findall(r"arXiv[: ]+(\d{4}\.\d{4,5})", line)[:1]:
                    assert f"eprint = {{{number}}}" in bib[key], (path.stem, key, number)
    assert used == set(bib), f"not cited: {sorted(set(bib) - used)[:5]}"


def test_each_work_in_go_further_has_a_key():
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown" and "## Go further" in text_of(cell):
                for line in text_of(cell).split("## Go further")[1].split("\n"):
                    assert "arXiv" not in line or re.search(r"\[@[\w-]+\]$", line), (path.stem, line[:80])


def test_pandoc_reads_the_references():
    page = pandoc.convert_text("---\nnocite: '@*'\n---\n", "html", format="markdown", extra_args=["--citeproc", f"--bibliography={NBS / 'references.bib'}"])
    assert page.count('class="csl-entry"') == len(entries())


def test_what_is_made_from_the_notebooks_is_up_to_date():
    assert (ROOT / "llms.txt").read_text(encoding="utf-8") == llms_txt()
    assert (NBS / "37_api.ipynb").read_text(encoding="utf-8") == api_page()
    assert (NBS / "open_links.html").read_text(encoding="utf-8") == open_links()
    assert (NBS / "laptop_curve.svg").read_text(encoding="utf-8") == curve_svg()


def test_the_api_page_has_every_public_name():
    page = (NBS / "37_api.ipynb").read_text(encoding="utf-8")
    for path in (ROOT / "llm_course").glob("[a-z]*.py"):
        assert f"## llm_course.{path.stem}" in page
    assert page.count('"### ') > 500


def test_titles_are_different():
    assert len({head(p)[0] for p in NOTEBOOKS}) == len(NOTEBOOKS)


def test_hosting_files_are_readable():
    for path in [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff", ROOT / "_quarto.yml"]:
        assert yaml.safe_load(path.read_text(encoding="utf-8")), path
    version = re.search(r"^version = (.+)$", (ROOT / "settings.ini").read_text(), re.M)[1]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    assert {"3.10", "3.11", "3.12", "3.13"} <= set(jobs["whole"]["strategy"]["matrix"]["python"])


def test_the_wheel_has_all_and_works_elsewhere(tmp_path):
    "Notebooks, data and settings are inside; unpacked alone, it finds them from another folder."
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT], check=True, capture_output=True, text=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "alone")
    assert {f"llm_course/nbs/{p.name}" for p in NOTEBOOKS} <= names
    assert {f"llm_course/data/runs/{p.name}" for p in (ROOT / "data" / "runs").glob("*.json")} <= names
    assert {"llm_course/data/village.json", "llm_course/configs/slurm.sh", "llm_course/nbs/chain.svg"} <= names
    code = "from llm_course.cli import main; import sys, llm_course; assert 'alone' in llm_course.__file__; sys.exit(main(['copy-notebooks', 'mine', '--clean']))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "alone"), "PATH": ""}, check=True)
    assert len(list((tmp_path / "mine").glob("*.ipynb"))) == len(NOTEBOOKS)
