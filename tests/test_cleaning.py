"""The repairs on any text and on real files: no exception, idempotent, linear time, and the scores of the records."""
import importlib.util
import json
import re

import pytest
from hypothesis import given, settings, strategies as st

from llm_course.cleaning import (CODE_STEPS, EXTRACTORS, PROSE_STEPS, STEPS, Page, basic_clean, clean_text, decode_page, declared_encoding, drop_control, fix_mojibake,
                                 hidden_characters, html_to_text, latex_to_text, looks_like_html, looks_like_latex, main_text, mask_kinds, repair_scores)
from llm_course.reading import UserError
from timing import assert_linear, cpu_seconds

PIECES = ["<p>", "</p>", "<", ">", "<div class='menu'>", "<script>", "</script>", "<!--", "-->", "<pre>", "<a href=x>", "</a>", "&lt;", "&#", "&#99999999999;", "&amp;", "\\textbf{", "\\begin{", "\\end{x}", "\\[",
          "}", "$", "a@b.cd", "+1 234 5678 90", "10.0.0.1", "2001:db8::1", "We use cookies", "\n", "\r\n", "\x0c", "\u2028", "Ã©", "â€™", "\udc80", "\ud83d", "\ude00", "\u200d", "\u200c", "👩", "ي", "\ufeff", "\u00ad", "e\u0301",
          "\U0001f3f4", "\U000e0067", "\U000e007f", "\u00a0", " ", "word "]
texts = st.text(alphabet=st.characters(), max_size=200) | st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
LONG = ["a ", "<", "\\", "((", "{", "\n", "é", "<a ", "<!--", "<script", "<a ='", "</p>", "<p>x", "<div>", "&#9", "<?", "@", "a@", "a.", "1-", "1.", "+1 ", "(123) ", "a:", "1::", "$", "\\(", "\\[", "\\emph{", "\\emph{a} ",
        "\\begin{x}", "\u200d", "Ã©", "â€", "We use cookies\n", "\x1b[", "\U0001f3f4\U000e0067", "\ud83d", "version ", "<html><p>"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(texts)
def test_any_text_is_cleaned_once_and_for_all(text):
    for steps in (PROSE_STEPS, CODE_STEPS):
        once, changes = clean_text(text, steps)
        assert clean_text(once, steps) == (once, {})
        assert all(n > 0 for n in changes.values())
        assert (once == text) or changes, "a change that was not counted"


@pytest.mark.parametrize("name", [n for n in STEPS if n not in ("html", "latex")])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts)
def test_each_step_is_idempotent_and_counts(name, text):
    once, n = STEPS[name](text)
    assert (n == 0) == (once == text)
    assert STEPS[name](once) == (once, 0)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts)
def test_other_functions_take_any_text(text):
    basic_clean(text)
    hidden_characters(text)
    main_text(text)
    looks_like_html(text), looks_like_latex(text)
    for math in ("keep", "text", "drop"):
        latex_to_text(text, math)
    once, _ = mask_kinds(text, private_ips=False)
    assert mask_kinds(once, private_ips=False)[1] == {}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.binary(max_size=200) | st.lists(st.sampled_from([b"<meta charset=", b"utf-8", b"koi8-r", b"'", b">", b"\xff", b"\xc3\xa9", b"<?xml encoding='", b"\x00", b"<!--"]), max_size=10).map(b"".join))
def test_any_bytes_are_decoded(raw):
    assert isinstance(decode_page(raw).text, str)
    declared_encoding(raw, raw.decode("latin-1"))


@pytest.mark.parametrize("piece", LONG)
def test_time_is_linear(piece):
    def seconds(size):
        text = piece * (size // len(piece))
        return cpu_seconds(lambda: (clean_text(text), main_text(text), hidden_characters(text)))
    assert_linear(seconds, 1_000_000, most=16)


@pytest.mark.parametrize("piece", [b"<meta ", b"<meta charset=", b"<!--", b"<?xml "])
def test_declarations_are_looked_for_in_linear_time(piece):
    assert_linear(lambda n: cpu_seconds(decode_page, piece * n), 200_000)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "resiliparse.extract.html2text", None)
    with pytest.raises(UserError, match=r"llm_course\[web\]"):
        main_text("<p>a</p>", "fast")
    with pytest.raises(UserError, match="stdlib, fast, careful"):
        main_text("<p>a</p>", "best")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(texts)
def test_the_libraries_take_any_text(text):
    for name in EXTRACTORS:
        try:
            assert isinstance(main_text(text, name), str)
        except UserError as e:
            assert "llm_course[web]" in str(e)


def test_blocks_of_a_page_hold_its_words():
    page = "<html><body><div><p>one <b>two</b></p><ul><li>three<li><a href=x>four</a></ul></div></body></html>"
    assert [b.text for b in Page(page).blocks] == ["one two", "three", "four"]
    assert " ".join(b.text for b in Page(page).blocks).split() == re.sub(r"<[^>]*>", " ", page).split()


def test_a_deep_page():
    assert main_text("<div>" * 20_000 + "deep" + "</div>" * 20_000) == "deep"


def test_a_fragment_keeps_its_lines():
    post = "One <b>a</b>.\n\nTwo <i>b</i>:\n\n    <em>c</em> = 1\n"
    assert html_to_text(post) == ("One a.\n\nTwo b:\n\n    c = 1", 1)
    assert html_to_text(f"<html><body><nav>Menu</nav><p>{post}</p></body></html>") == ("One a. Two b: c = 1", 1)


@pytest.mark.parametrize("text", ["npm i react@18.2.0", "logo@2x.png", "section 4.2.1.3", "version 10.2.0.1", "OID 1.3.6.1"])
def test_numbers_that_are_nobodys(text):
    assert mask_kinds(text) == (text, {})


def test_separators_that_carry_meaning_stay():
    for text in ("\u1829\u180e\u1820", "\u0645\u06cc\u200c\u062e", "\U0001f469\u200d\U0001f680"):
        assert drop_control(text) == (text, 0)
    assert drop_control("a\u180eb") == ("ab", 1)


def test_scores_of_nothing():
    assert repair_scores([], {"html": "html"})["html"]["n"] == 0


# On real files


def benchmark(name, testdata):
    import sys
    from pathlib import Path
    folder = Path(__file__).parent.parent / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(folder))


def test_main_text_of_labelled_pages(testdata):
    bench = benchmark("html_extraction", testdata)
    import numpy as np
    dev, test = bench.load(testdata)
    scores = np.array([bench.page_score(true, main_text(page)) for page, true in test.values()])
    baseline = np.array([bench.page_score(true, bench.all_text(page)) for page, true in test.values()])
    assert bench.f1(scores)[2] > 0.93 and bench.f1(baseline)[2] < 0.75


def test_mojibake_in_the_wild(testdata):
    cases = json.loads((testdata / "web/mojibake/ftfy-in-the-wild.json").read_text("utf-8"))
    right = [fix_mojibake(c["original"])[0] == c.get("fixed-encoding", c["fixed"]) for c in cases]
    assert sum(right) / len(right) >= 0.95


def test_pages_in_many_encodings(testdata):
    files = [p for p in sorted((testdata / "web/encodings").glob("*/*")) if p.parent.name.startswith(("windows", "iso-8859", "KOI8", "utf-8", "SHIFT", "Big5", "EUC-KR", "EUC-JP"))]
    good = [decode_page(p.read_bytes()).replaced == 0 for p in files]
    assert sum(good) / len(good) > 0.95


def test_marked_personal_data(testdata):
    for file, kind, least in (("emails", "email", 3), ("ip_address", "ip", 2), ("phone_numbers", "phone", 4)):
        plain = re.sub(r"</?[a-z_]+>", "", (testdata / f"web/pii/{file}.txt").read_text("utf-8"))
        assert mask_kinds(plain)[1].get(kind, 0) >= least


def test_real_pages_are_clean_after_one_pass(testdata):
    for path in sorted((testdata / "web/readability").iterdir()):
        text, changes = clean_text((path / "source.html").read_text("utf-8"))
        assert changes["html"] and clean_text(text) == (text, {}) and not hidden_characters(text).get("control")
        assert html_to_text(text) == (text, 0)
        assert drop_control(text) == (text, 0)
