"""Labelling as annotators meet it: a real server in a real browser that is killed and started again, a terminal, a notebook in JupyterLab."""
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import ENV
from hypothesis import given, settings
from hypothesis import strategies as st
from test_serve import browser, wait  # noqa: F401  (the fixture)

from llm_course.labelling import LabelFile, Labelling, assign, label_command, label_terminal, labelling_order, make_label_app, read_labels
from llm_course.reading import write_jsonl
from llm_course.serve import listen

EVIL = "<img src=x onerror=\"document.title='evil'\"><script>document.title='evil'</script> **bold** </pre></div>"
ITEMS = [{"id": f"tuned-{n}", "prompt": f"Question {n}?", "rubric": "Short and right.", "first": f"good {n}", "second": f"bad {n}", "systems": {"first": "harbour-7b", "second": "village-3b"}, "gold": "first"} for n in range(6)]
GUIDELINE = "True beats wrong.\nShort beats long. <b>No HTML</b>"
linux = pytest.mark.skipif(sys.platform != "linux", reason="starts processes by fork")
PROGRAM = "import sys, json; from llm_course.labelling import label_command; sys.exit(label_command(**json.loads(sys.argv[1])))"


@dataclass
class Server:
    folder: Path
    url: str
    end: Callable[[], None]
    said: list[str]
    process: subprocess.Popen | None = None

    @property
    def port(self) -> int:
        return int(re.search(r":(\d+)/", self.url)[1])

    def labels(self, name: str | None = None) -> list[dict]:
        path = self.folder / "labels.jsonl"
        return [r for r in (read_labels(path)[0] if path.exists() else []) if name in (None, r["annotator"])]

    def ask(self, path: str, body: dict | None = None) -> dict:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body and json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=20))

    def state(self, name: str) -> dict:
        return self.ask("/api/state?annotator=" + urllib.parse.quote(name))


def as_process(folder: Path, items=ITEMS, port: int = 0) -> Server:
    "The server as a user starts it."
    write_jsonl(folder / "items.jsonl", items)
    (folder / "policy.md").write_text(GUIDELINE)
    settings = {"items": str(folder / "items.jsonl"), "out": str(folder / "labels.jsonl"), "port": port, "guideline": str(folder / "policy.md")}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, json.dumps(settings)], env=ENV | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: list[str] = []
    while not (found := re.search(r"Labelling is at (\S+)", said[-1] if said else "")):
        said.append(process.stdout.readline())
        assert said[-1], said
    threading.Thread(target=lambda: said.extend(iter(process.stdout.readline, "")), daemon=True).start()
    return Server(folder, found[1], lambda: (process.kill(), process.wait()), said, process)


def make_server(folder: Path, items, **options):
    import uvicorn
    app = make_label_app(Labelling(items, folder / "labels.jsonl", **{"guideline": GUIDELINE} | options))
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))


def as_thread(folder: Path, items=ITEMS, port: int = 0, **options) -> Server:
    "The same server in this process, which starts at once."
    listener, server = listen("127.0.0.1", port), make_server(folder, items, **options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()

    def end():
        server.should_exit = True
        thread.join(10)
        listener.close()
    return Server(folder, f"http://127.0.0.1:{listener.getsockname()[1]}/", end, [])


def as_fork(folder: Path, items=ITEMS, port: int = 0) -> Server:
    "The same server in a process that starts at once; `end` is SIGKILL."
    with listen("127.0.0.1", port) as listener:
        process = multiprocessing.get_context("fork").Process(target=lambda: make_server(folder, items).run(sockets=[listener]), daemon=True)
        process.start()
        return Server(folder, f"http://127.0.0.1:{listener.getsockname()[1]}/", lambda: (process.kill(), process.join()), [])


@pytest.fixture
def serve(tmp_path):
    pytest.importorskip("uvicorn")
    servers = []

    def begin(items=ITEMS, how=as_thread, **options):
        servers.append(how(tmp_path, items, **options))
        return servers[-1]
    yield begin
    for s in servers:
        s.end()


# ---- the file

@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from("AB"), st.sampled_from("xyz"), st.sampled_from(["first", "tie", None])), max_size=8), st.data())
def test_a_cut_costs_one_line_at_most(tmp_path_factory, steps, data):
    "Cut the file at any byte, go on writing: what stands is what the whole lines and the new one say."
    path = tmp_path_factory.mktemp("cut") / "labels.jsonl"
    rows = [{"id": i, "annotator": f"{a}é", **({"label": label} if label else {"undo": True})} for a, i, label in steps]
    raw = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    cut = data.draw(st.integers(0, len(raw)))
    path.write_bytes(raw[:cut])
    whole = sum(cut >= len("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows[:k + 1]).encode()) - 1 for k in range(len(rows)))

    def stands(rows):
        out = {}
        for r in rows:
            out.pop((r["annotator"], r["id"]), None)
            if "label" in r:
                out[r["annotator"], r["id"]] = r["label"]
        return list(out.items())
    file = LabelFile(path).refresh()
    assert [(k, r["label"]) for k, r in file.standing.items()] == stands(rows[:whole])
    new = {"id": "new", "annotator": "C", "label": "tie"}
    file.add(new)
    again = LabelFile(path).refresh()
    assert [(k, r["label"]) for k, r in again.standing.items()] == [(k, r["label"]) for k, r in file.standing.items()] == stands([*rows[:whole], new])
    assert len(again.problems()) <= 1 and not again.torn


def write_many(path: Path, name: str) -> None:
    file = LabelFile(path)
    for n in range(100):
        file.add({"id": str(n), "annotator": name, "label": "tie" * 300})


@linux
def test_writers_side_by_side(tmp_path):
    "Three processes append to one file at the same time: no line is lost or mixed with another."
    path, fork = tmp_path / "labels.jsonl", multiprocessing.get_context("fork")
    processes = [fork.Process(target=write_many, args=(path, name)) for name in "ABC"]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    labels, problems = read_labels(path)
    assert len(labels) == 300 and problems == []


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 7), st.data())
def test_everybody_gets_a_fair_share(n, people, data):
    items = [{"id": str(i), "prompt": "?", "first": "a", "second": "b"} | ({"gold": "tie"} if i % 10 == 9 else {}) for i in range(n)]
    overlap, seed = data.draw(st.integers(1, people)), data.draw(st.integers(0, 99))
    plain = [i["id"] for i in items if "gold" not in i]
    shared = data.draw(st.integers(0, len(plain)))
    dealt = assign(items, [f"P{k}" for k in range(people)], overlap, seed, shared)
    times = {i["id"]: sum(i["id"] in ids for ids in dealt.values()) for i in items}
    assert sorted(times[i] for i in plain) == sorted([people] * shared + [overlap] * (len(plain) - shared))
    assert all(times[i["id"]] == people for i in items if "gold" in i)
    loads = [len(ids) for ids in dealt.values()]
    assert max(loads) - min(loads) <= 1 and all(len(set(ids)) == len(ids) for ids in dealt.values())


# ---- the terminal

def test_the_terminal(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "items.jsonl", [i | {"first": "\x1b[2Jgood"} for i in ITEMS])

    def run(typed):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert label_command(tmp_path / "items.jsonl", tmp_path / "labels.jsonl", annotator="Ada", terminal=True) == 0
        return capsys.readouterr().out
    out = run("1\n2\nu\nt\nx\nq\n")
    assert "2 of 6 items labelled" in out and "\x1b" not in out and "harbour" not in out and "tuned" not in out
    assert "4 of 6 items labelled" in run("s\ns\n")              # the input ends
    assert "6 of 6 items labelled" in run("s\n" * 9)
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [r.get("label", "undo") for r in rows][2:4] == ["undo", "tie"] and len(rows) == 8 and all("seconds" in r for r in rows if "label" in r)


def test_keys_of_an_item_labelled_elsewhere_are_dropped(tmp_path, capsys):
    "Half an answer is given; in another window the same item is labelled. The key must not count for the next item."
    work = lambda: Labelling(ITEMS, tmp_path / "labels.jsonl", strength=True)
    other, typed, asked = work(), iter(["1", "3", "q"]), []

    def ask(text):
        if not asked:
            other.say("Ada", other.state("Ada")["task"]["token"], ["2", "3"], 1.0)
        asked.append(text)
        return next(typed)
    label_terminal(work(), "Ada", ask)
    assert len(read_labels(tmp_path / "labels.jsonl")[0]) == 1 and len(asked) == 3
    assert all("1 of 6" in text or "2 of 6" in text for text in asked[:2]) and "another window" in capsys.readouterr().out


# ---- the server

@linux
def test_what_was_acknowledged_survives_kill_9(serve, tmp_path):
    "Killed in the middle of a stream of labels: each one that was answered is there, and the next start says what it found. Ctrl-C ends it."
    many = [ITEMS[0] | {"id": str(n)} for n in range(400)]
    many[0] |= {"first": "I am Harbour-7B."}
    server, names, answered = serve(many, as_fork), ("Ada", "Ben", "Zoë"), []

    def label(name):
        try:
            state = server.state(name)
            while state["task"]:
                state = server.ask("/api/label", {"annotator": name, "token": state["task"]["token"], "keys": ["1"], "seconds": 2})
                answered.append((name, state["done"]))
        except OSError:
            pass
    threads = [threading.Thread(target=label, args=(name,)) for name in names]
    for t in threads:
        t.start()
    wait(lambda: {name for name, done in answered if done > 15} == set(names))
    server.end()
    for t in threads:
        t.join()
    for name in names:
        assert max(done for who, done in answered if who == name) <= len(server.labels(name)) < 400
    with open(tmp_path / "labels.jsonl", "ab") as f:
        f.write(b'{"id": "5", "annotator": "Zo\xc3')
    before = len(server.labels())
    again = serve(many, as_process)
    assert any("half-written line" in line for line in again.said) and f"{before} labels so far" in again.said[-1]
    assert any(line.startswith("warning: the name of a system stands in the texts of 1 items, for instance '0'") for line in again.said)
    assert again.state("Ada")["done"] == len(again.labels("Ada"))
    again.process.send_signal(signal.SIGINT)
    assert again.process.wait(timeout=20) == 130


def test_the_server_tells_nothing_about_the_systems(serve):
    server = serve()
    state = server.state("Ada")
    text = json.dumps(state) + json.dumps(server.ask("/api/label", {"annotator": "Ada", "token": state["task"]["token"], "keys": ["t"], "seconds": 1}))
    assert not re.search("tuned|harbour|village|gold|swap", text)


# ---- the page, in a browser

class Page:
    def __init__(self, browser, server: Server, name: str = "Ada", begin: bool = True):
        self.b, self.server = browser, server
        browser.get("about:blank")
        browser.get(server.url.partition("#")[0] + f"#{name}")
        wait(lambda: self.css("#start")[0].is_displayed() or self.css("#ask")[0].text or self.css("#end")[0].is_displayed())
        if begin and self.css("#start")[0].is_displayed():
            self.css("#who button")[0].click()
            wait(lambda: self.css("#ask")[0].text)

    def css(self, selector: str) -> list:
        return self.b.find_elements("css selector", selector)

    def key(self, key: str) -> None:
        time.sleep(0.3)                     # a second key at once is taken for a slip
        self.css("body")[0].send_keys(key)

    def count(self) -> str:
        return self.css("#count")[0].text

    def label(self, key: str, count: str) -> None:
        self.key(key)
        wait(lambda: self.count() == count)

    def shot(self, name: str) -> None:
        if folder := os.environ.get("LLM_COURSE_SHOTS"):
            self.b.save_screenshot(f"{folder}/{name}.png")


def sides(name: str, items=ITEMS) -> list[tuple[dict, bool]]:
    return labelling_order(items, name)


def test_keys_undo_and_what_is_stored(browser, serve):
    server = serve()
    page = Page(browser, server, begin=False)
    assert GUIDELINE in page.css("#policy-text")[0].text and page.css("#annotator")[0].get_attribute("value") == "Ada"
    page.shot("start")
    page.css("#who button")[0].click()
    wait(lambda: page.css("#ask")[0].text == "Which answer is better?")
    page.label("1", "1 of 6")
    page.label("t", "2 of 6")
    page.key("x")                           # no such key
    page.key("\ue009" + "2")                # Ctrl + 2 belongs to the browser
    page.label("u", "1 of 6")
    assert "undone" in page.css("#note")[0].text
    page.label("2", "2 of 6")
    page.label("S", "3 of 6")
    time.sleep(0.3)
    page.css("#options button")[0].click()  # the mouse does the same
    wait(lambda: page.count() == "4 of 6")
    time.sleep(0.3)
    page.css("#undo")[0].click()
    wait(lambda: page.count() == "3 of 6")
    page.key("g")
    wait(lambda: page.css("#panel")[0].is_displayed())
    assert "True beats wrong." in page.css("#panel-text")[0].text
    page.key("1")                           # while the guideline is open no key labels
    page.key("g")
    wait(lambda: not page.css("#panel")[0].is_displayed())
    (a, swap_a), (b, swap_b), (c, _) = sides("Ada")[:3]
    labels = server.labels()
    assert [(r["id"], r["label"], r["swapped"]) for r in labels] == [(a["id"], ("first", "second")[swap_a], swap_a), (b["id"], ("second", "first")[swap_b], swap_b), (c["id"], "skip", labels[2]["swapped"])]
    assert all(0.2 < r["seconds"] < 60 and len(r["policy"]) == 8 and r["time"] for r in labels)
    for n in (4, 5, 6):
        page.label("1", f"{n} of 6")
    assert page.css("#end")[0].is_displayed() and not page.css("#task")[0].is_displayed()
    page.shot("end")
    page.label("u", "5 of 6")
    assert page.css("#task")[0].is_displayed() and not page.css("#end")[0].is_displayed()
    assert not [e for e in browser.get_log("browser") if e["level"] == "SEVERE"]


def test_a_slip_labels_one_item(browser, serve):
    server = serve()
    page = Page(browser, server)
    time.sleep(0.3)
    page.css("body")[0].send_keys("111")    # three presses within a few milliseconds
    wait(lambda: page.count() == "1 of 6")
    time.sleep(0.3)
    assert page.count() == "1 of 6" and len(server.labels()) == 1


@linux
def test_resume_after_kill_9_and_a_closed_window(browser, serve):
    server = serve(how=as_fork)
    page = Page(browser, server)
    page.label("1", "1 of 6")
    server.end()                            # SIGKILL
    page.key("2")
    wait(lambda: page.css("#again")[0].is_displayed())
    assert "not stored" in page.css("#note")[0].text
    page.shot("gone")
    page.key("1")                           # nothing more is taken while one waits
    server = serve(port=server.port)
    page.css("#again")[0].click()
    wait(lambda: page.count() == "2 of 6")
    (_, _), (b, swap_b) = sides("Ada")[:2]
    assert server.labels()[1]["label"] == ("second", "first")[swap_b]
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.close()
    browser.switch_to.window(first)
    page = Page(browser, server, begin=False)            # goes on at once, without the start page
    wait(lambda: page.count() == "2 of 6")
    page.label("t", "3 of 6")


def test_two_annotators_at_the_same_time(browser, serve):
    server = serve()
    ada = Page(browser, server, "Ada")
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    try:
        ben = Page(browser, server, "Ben B%C3%A9")
        second = browser.current_window_handle
        for n in range(1, 4):
            browser.switch_to.window(first)
            ada.label("1", f"{n} of 6")
            browser.switch_to.window(second)
            ben.label("2", f"{n} of 6")
        assert [r["id"] for r in server.labels("Ada")] == [i["id"] for i, _ in sides("Ada")[:3]]
        assert [r["id"] for r in server.labels("Ben Bé")] == [i["id"] for i, _ in sides("Ben Bé")[:3]]
        page = Page(browser, server, "Ada")              # the same person in a second window
        page.label("1", "4 of 6")
        browser.switch_to.window(first)
        ada.key("t")                                     # contradicts what was said in the other window
        wait(lambda: "labelled already" in ada.css("#note")[0].text)
        assert ada.count() == "4 of 6" and len(server.labels("Ada")) == 4
        ada.label("t", "5 of 6")
    finally:
        browser.switch_to.window(second)
        browser.close()
        browser.switch_to.window(first)


def test_html_is_text_and_nothing_is_loaded_from_elsewhere(browser, serve):
    server = serve([i | {"prompt": EVIL, "rubric": EVIL, "first": EVIL, "second": EVIL} for i in ITEMS])
    page = Page(browser, server, "%3Cimg%20src=x%20onerror=alert(1)%3E")
    page.label("1", "1 of 6")
    assert "evil" not in browser.title and not page.css("main img, main script, header img, b")
    assert [e.text for e in page.css(".answer")] == [EVIL, EVIL] and page.css("#prompt")[0].text == EVIL
    assert browser.execute_script("return performance.getEntriesByType('resource').every(r => r.name.startsWith(location.origin))")
    browser.execute_script("const s = document.createElement('script'); s.textContent = 'document.title = \"evil\"'; document.body.append(s)")
    assert "evil" not in browser.title                   # the content security policy
    html = (Path(__file__).resolve().parent.parent / "data" / "label.html").read_text()
    assert "http:" not in html and "https:" not in html and "innerHTML" not in html


def test_strength_and_criteria(browser, serve):
    single = {"id": "one", "prompt": "Two and two?", "answer": "Four.", "criteria": {"Is it true?": "yes/no", "How clear is it?": "1-5"}}
    server = serve([ITEMS[0], single], strength=True)
    page = Page(browser, server)
    for _ in range(2):
        if page.css("#ask")[0].text == "Which answer is better?":
            page.key("1")
            wait(lambda: page.css("#ask")[0].text == "How much better?")
            page.key("u")
            wait(lambda: page.css("#ask")[0].text == "Which answer is better?")
            page.key("2")
            page.key("3")
        else:
            page.key("n")
            wait(lambda: page.css("#ask")[0].text == "How clear is it?")
            page.shot("criteria")
            page.key("4")
        time.sleep(0.5)
    by_id = {r["id"]: r for r in server.labels()}
    assert by_id["tuned-0"]["strength"] == 3 and by_id["one"]["label"] == {"Is it true?": "no", "How clear is it?": 4} and page.css("#end")[0].is_displayed()


LONG = "\n\n".join(f"Paragraph {n}. " + "The ferry leaves the north pier at eight, and comes back at noon if the wind allows it. " * 6 for n in range(12))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width, height", [(1200, 800), (375, 667), (320, 568)])
def test_layout(browser, serve, scheme, width, height):
    "Everything is within reach, long texts scroll, and say so; keys scroll a text that has the focus."
    server = serve([{"id": "long", "prompt": "Tell me about the ferry, in as many words as you like. " * 3, "rubric": "True, and complete.", "first": LONG, "second": "It leaves at eight.\n\n- **north pier**\n- " + "x" * 300}])
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        page = Page(browser, server, begin=False)
        page.shot(f"start-{scheme}-{width}")
        page.css("#who button")[0].click()
        wait(lambda: page.css("#ask")[0].text)
        page.shot(f"pair-{scheme}-{width}")
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth && document.body.scrollHeight <= window.innerHeight")
        for box in browser.execute_script("return [...document.querySelectorAll('#options button, #undo, #policy')].map(b => b.getBoundingClientRect())"):
            assert 0 <= box["left"] and box["right"] <= width and 0 <= box["top"] and box["bottom"] <= height
        long = next(a for a in page.css(".card") if "Paragraph 0" in a.text)
        if width > 600:
            assert "more below" in long.text
            text = long.find_element("css selector", ".answer")
            browser.execute_script("arguments[0].focus()", text)
            text.send_keys("\ue010")                     # End
            wait(lambda: "more below" not in long.text)
        else:
            assert browser.execute_script("const m = document.getElementById('scroll'); return m.scrollHeight > m.clientHeight")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# ---- the widget, in JupyterLab

CELL = """import json
from pathlib import Path
from llm_course.labelling import Labelling, LabelWidget
LabelWidget(Labelling([json.loads(line) for line in open("items.jsonl")], "labels.jsonl", guideline="True beats wrong."), "Ada")"""


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab on a notebook with two cells."
    if not os.environ.get("LLM_COURSE_LAB"):
        pytest.skip("the widget was not tried in JupyterLab, which takes half a minute: set LLM_COURSE_LAB=1")
    pytest.importorskip("jupyterlab")
    write_jsonl(tmp_path / "items.jsonl", [ITEMS[0] | {"first": EVIL}, *ITEMS[1:]])
    cells = [{"cell_type": "code", "id": f"cell{n}", "metadata": {}, "outputs": [], "execution_count": None, "source": source} for n, source in enumerate((CELL, "'the second cell'"))]
    (tmp_path / "people.ipynb").write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}))
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    themes = tmp_path / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension" / "themes.jupyterlab-settings"
    themes.parent.mkdir(parents=True)
    themes.write_text(json.dumps({"theme": "JupyterLab Dark"}))
    folders = {f"JUPYTER_{k}_DIR": str(tmp_path / k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")} | {"IPYTHONDIR": str(tmp_path / "ipython")}
    options = ("--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate")
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=ENV | folders, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def up():
        assert process.poll() is None, "JupyterLab ended"
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5).status == 200
        except OSError:
            return False
    wait(up, 120)
    yield f"http://127.0.0.1:{port}/lab/tree/people.ipynb?reset"
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()


def test_the_widget_in_jupyterlab(browser, lab, tmp_path):
    "Run the cell, click a button, press keys in the field, reach a button with Tab; JupyterLab's own shortcuts stay away. Run with LLM_COURSE_LAB=1."
    from selenium.common.exceptions import WebDriverException
    css = lambda selector: browser.find_elements("css selector", selector)
    labels = lambda: read_labels(tmp_path / "labels.jsonl")[0] if (tmp_path / "labels.jsonl").exists() else []
    button = lambda text: next(b for b in css(".widget-button") if b.text == text)
    browser.get(lab)

    def ran():
        "Click into the first cell and press Shift + Enter, until it runs: JupyterLab draws its first page several times."
        try:
            if css(".jp-Notebook .jp-InputPrompt")[0].text not in ("", "[ ]:"):
                return True
            next(e for e in css(".jp-Notebook .cm-line") if e.is_displayed()).click()
            browser.switch_to.active_element.send_keys("\ue008\ue007\ue000")
        except (WebDriverException, IndexError, StopIteration):
            pass
        time.sleep(1)
    wait(ran, 60)
    wait(lambda: css(".widget-button"), 90)
    button("Answer 1 [1]").click()
    wait(lambda: len(labels()) == 1)
    wait(lambda: browser.switch_to.active_element.tag_name == "input")        # the cursor goes to the field
    browser.switch_to.active_element.send_keys("t")
    wait(lambda: len(labels()) == 2)
    browser.switch_to.active_element.send_keys("u")
    wait(lambda: len(labels()) == 1)
    browser.switch_to.active_element.send_keys("2s")                          # fast: both count, and once
    wait(lambda: len(labels()) == 3)
    browser.switch_to.active_element.send_keys("dd")                          # would delete a cell in JupyterLab's command mode
    time.sleep(1)
    assert len(labels()) == 3
    if folder := os.environ.get("LLM_COURSE_SHOTS"):
        browser.save_screenshot(f"{folder}/lab.png")
    browser.switch_to.active_element.send_keys("\ue008\ue004\ue000")         # Shift + Tab: back to the last button, Undo
    assert browser.switch_to.active_element.text == "Undo [u]"
    browser.switch_to.active_element.send_keys(" ")
    wait(lambda: len(labels()) == 2)
    for n in range(3, 7):
        button("Tie [t]").click()
        wait(lambda: len(labels()) == n)
    wait(lambda: "Thank you" in css(".jp-OutputArea")[0].text)
    assert len(css(".jp-Notebook .jp-Cell")) == 2 and "evil" not in browser.title
    assert [r["id"] for r in labels()] == [i["id"] for i, _ in sides("Ada")]
