"""The client for models behind an address, against our own server and against one that misbehaves."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import format_datetime
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from commands import ENV
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("openai")

from llm_course.endpoint import AnswerCache, EndpointLM, Unreadable, read_reply, request_of
from llm_course.generate import Sampling
from llm_course.judge import judge_of
from llm_course.lm import LM
from llm_course.reading import UserError

KEY = "sk-very-secret-0123456789"


class Server:
    "Answers `echo: <prompt>`, unless `moods` says otherwise for a request: a status, or cut, half, empty, error, slow, page."

    def __init__(self):
        self.moods, self.seen, self.headers, self.retry_after, self.delay = [], [], [], None, 0.0
        self.usage, self.logprobs = lambda body: (100, 50), None         # what is told of the tokens of a request; what a text gets as log-probabilities
        self.now = self.most = 0
        self.lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                outer.answer(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, h) -> None:
        body = json.loads(h.rfile.read(int(h.headers["Content-Length"])))
        with self.lock:
            self.seen.append((h.path, body))
            self.headers.append({k.lower(): v for k, v in h.headers.items()})
            mood = self.moods.pop(0) if self.moods else "good"
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(1.5 if mood == "slow" else self.delay)
        with self.lock:
            self.now -= 1
        try:
            self.reply(h, body, mood)
        except OSError:
            pass                                         # the client has gone

    def reply(self, h, body: dict, mood: str) -> None:
        if mood == "cut":
            return h.connection.close()
        text = "echo: " + (body["prompt"] if "prompt" in body else body["messages"][-1]["content"])
        choice = {"text": text, "finish_reason": "stop"} if "prompt" in body else {"message": {"content": text}, "finish_reason": "length" if mood == "length" else "stop"}
        if self.logprobs and "prompt" in body:
            choice["logprobs"] = self.logprobs
        good = json.dumps({"choices": [choice], "model": "m-2026", "usage": dict(zip(("prompt_tokens", "completion_tokens"), self.usage(body)))})
        refusal = json.dumps({"error": {"message": f"no, {h.headers.get('Authorization')}", "code": "insufficient_quota" if mood == "402 as 429" else None}})
        status = 429 if mood == "402 as 429" else int(mood) if mood.isdigit() else 200
        said = {"half": good[:40], "empty": '{"choices": []}', "error": refusal, "page": "<html>busy</html>"}.get(mood, good if status == 200 else refusal)
        h.send_response(status)
        h.send_header("Content-Type", "text/html" if mood == "page" else "application/json")
        h.send_header("Content-Length", str(len(said) + (100 if mood == "short" else 0)))
        if self.retry_after is not None:
            h.send_header("Retry-After", self.retry_after)
        if status == 307:
            h.send_header("Location", self.url + "/elsewhere")
        h.end_headers()
        h.wfile.write(said.encode())


@pytest.fixture
def server():
    s = Server()
    yield s
    s.http.shutdown()
    s.http.server_close()


def say(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def model(server: Server, **kw) -> EndpointLM:
    return EndpointLM(server.url, "m", **{"base": 0.005, **kw})


def test_every_answer_arrives_in_order_whatever_the_mood(server):
    server.moods = ["429", "cut", "500", "good", "half", "empty", "error", "page", "short", "503", "408", "502"] * 3
    lm = model(server, retries=30, concurrency=5)
    prompts = [say(f"q{i}") for i in range(25)] + [f"text {i}" for i in range(5)]
    assert lm.generate(prompts) == [f"echo: q{i}" for i in range(25)] + [f"echo: text {i}" for i in range(5)]
    counts = lm.report()["counts"]
    assert counts["requests"] == 63 and counts["failed: unreadable"] == 12 and counts["failed: connection"] == 6 and counts["failed: 429"] == 3
    assert sum(n for k, n in counts.items() if k.startswith("failed")) == 33
    assert lm.report()["models"] == ["m-2026"]


def test_no_more_at_a_time_than_allowed_and_equal_ones_once(server):
    server.delay = 0.05
    lm = model(server, concurrency=3)
    assert lm.generate([say(f"q{i % 6}") for i in range(12)]) == [f"echo: q{i % 6}" for i in range(12)]
    assert len(server.seen) == 6 and 2 <= server.most <= 3


@pytest.mark.parametrize("asked", ["0.4", "date"])
def test_waits_as_long_as_the_server_asks(server, asked):
    server.moods, server.retry_after = ["429"], asked if asked != "date" else format_datetime(datetime.now(timezone.utc) + timedelta(seconds=2), usegmt=True)
    began = time.monotonic()
    model(server).generate([say("x")])
    assert 0.35 < time.monotonic() - began < 4


def test_does_not_wait_for_an_hour(server):
    server.moods, server.retry_after = ["429"] * 9, "3600"
    with pytest.raises(UserError, match="asks to wait 3600 seconds"):
        model(server).generate([say("x")])
    assert len(server.seen) == 1


@pytest.mark.parametrize("mood", ["400", "401", "403", "404", "422", "402 as 429", "501", "307"])
def test_what_waiting_does_not_help_is_asked_once(server, mood):
    server.moods, server.retry_after = [mood] * 50, "0"
    with pytest.raises(UserError, match="refused"):
        model(server, concurrency=1).generate([say(f"q{i}") for i in range(20)])
    assert len(server.seen) == 1


def test_slow_is_a_timeout_and_tried_again(server):
    server.moods = ["slow"]
    lm = model(server, timeout=0.3)
    assert lm.generate([say("x")]) == ["echo: x"] and lm.endpoint.counts["failed: timeout"] == 1


def test_gives_up_and_says_where(server):
    server.moods = ["500"] * 99
    with pytest.raises(UserError, match=rf"{server.url}.*no answer in 3 attempts"):
        model(server, retries=2).generate([say("x")])
    with pytest.raises(UserError, match="is the server running"):
        EndpointLM("http://127.0.0.1:9/v1", "m", retries=1, base=0).generate(["x"])


def test_the_key_goes_to_the_server_and_nowhere_else(server, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("SOME_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    lm = model(server, key_variable="SOME_KEY", cache=tmp_path / "c.jsonl")
    lm.generate([say("x")])
    assert server.headers[-1]["authorization"] == f"Bearer {KEY}"
    server.moods = ["401"]
    with pytest.raises(UserError) as e:
        lm.generate([say("y")])
    out = capsys.readouterr()
    shown = [str(e.value), repr(e.value), repr(e.value.failure), repr(lm), repr(lm.endpoint), repr(vars(lm.endpoint)), json.dumps(lm.report()), (tmp_path / "c.jsonl").read_text(), out.out, out.err]
    assert not [s for s in shown if KEY in s] and "***" in shown[0]
    model(server).generate([say("x")])
    assert "another" not in server.headers[-1]["authorization"]


def test_another_draw_is_another_answer(server, tmp_path):
    warm, kw = Sampling(0.9, top_p=0.5, min_p=0.1), {"cache": tmp_path / "c.jsonl"}
    lm = model(server, **kw)
    lm.generate([say("x"), say("y"), say("x")], sampling=warm, seed=1)
    assert sorted(b["seed"] for _, b in server.seen) == [1_000_000, 1_000_000, 1_000_001]
    assert server.seen[0][1]["top_p"] == 0.5 and server.seen[0][1]["min_p"] == 0.1 and "top_k" not in server.seen[0][1]
    model(server, **kw).generate([say("x")] * 3, sampling=warm, seed=1)
    assert len(server.seen) == 4                         # the third draw of x is new
    lm.generate([say("x")], sampling=warm, seed=2)
    lm.generate([say("x")] * 2)
    assert len(server.seen) == 6 and "seed" not in server.seen[-1][1]


def test_stop_strings_and_what_was_cut_or_empty(server):
    server.moods = ["length"]
    lm = model(server)
    assert lm.generate([say("a b c d")], stop=["1", "2", "3", "4", "c"]) == ["e"]        # the fifth is not sent, and still cuts
    assert server.seen[0][1]["stop"] == ["1", "2", "3", "4"] and lm.endpoint.counts["cut at the limit"] == 1


@pytest.mark.parametrize("extra", [None, {"n": 3}, {"max_tokens": 400}], ids=str)
@pytest.mark.parametrize("word", ["word ", "渡船 "])
def test_never_spends_more_than_the_limit(server, word, extra):
    "The server counts a token for each byte of the prompt, and writes as much as it may."
    server.delay, server.moods = 0.01, ["500", "cut", "504"]
    server.usage = lambda body: (len(body["messages"][0]["content"].encode()), body["max_tokens"] * body.get("n", 1))
    prompts = [say(f"q{i} " + word * 80) for i in range(50)]
    lm = model(server, concurrency=2, price_in=1.0, price_out=1.0, limit=0.008, extra=extra)
    with pytest.raises(UserError, match="Raise the limit"):
        lm.generate(prompts, max_new_tokens=50)
    assert 0 < lm.endpoint.budget.spent <= 0.008 and lm.endpoint.budget.reserved == pytest.approx(0)
    answered = len(lm.endpoint.answers.answers)
    assert answered >= 5 and len(server.seen) - 3 == answered
    assert lm.estimate(prompts, 50)["requests"] == 50 - answered


@pytest.mark.parametrize("usage", [("10", 5), (-100_000, 5), (None, None), (1.5, True), ([], {})], ids=str)
def test_a_strange_count_of_tokens_costs_the_full_sum_and_no_answer(server, usage):
    server.usage = lambda body: usage
    lm = model(server, price_in=1.0, price_out=1.0)
    assert lm.generate([say("four")], max_new_tokens=20) == ["echo: four"]
    assert lm.endpoint.budget.spent == pytest.approx(1e-6 * (12 + (5 if usage[1] == 5 else 20)))


def test_another_form_of_probabilities_is_none(server):
    server.logprobs = {"content": [{"token": "ok", "logprob": -0.1, "top_logprobs": []}]}
    with pytest.raises(NotImplementedError, match="does not echo"):
        model(server).loglikelihood([("a", "b")] * 9)
    assert len(server.seen) == 1


def test_patience_is_with_the_server_not_with_our_own_waits(server):
    server.moods = ["503"]
    assert model(server, patience=0.001).generate([say("x")]) == ["echo: x"]


def test_what_other_services_are_told_stays_here(server, monkeypatch):
    for name, value in (("OPENAI_ORG_ID", "org-mine"), ("OPENAI_PROJECT_ID", "proj-mine"), ("OPENAI_CUSTOM_HEADERS", "X-Mine: custom-mine\nAuthorization: Bearer mine"), ("OPENAI_ADMIN_KEY", "sk-mine")):
        monkeypatch.setenv(name, value)
    model(server).generate([say("x"), "text"])
    assert len(server.headers) == 2 and "mine" not in json.dumps(server.headers)


def test_other_fields_are_another_model(server, tmp_path):
    for effort in ("low", "high", "low"):
        judge_of(model(server, extra={"effort": effort}), cache=tmp_path / "c.jsonl")("hello")
    assert [b["effort"] for _, b in server.seen] == ["low", "high"]


def test_a_line_after_a_half_written_one_is_read(tmp_path, monkeypatch):
    cache, write = AnswerCache(tmp_path / "c.jsonl"), os.write
    cache.put("a", {"text": "1"})
    with monkeypatch.context() as m:
        m.setattr(os, "write", lambda file, data: write(file, data[:10]))
        with pytest.raises(UserError, match="c.jsonl: cannot write.*Free some space"):
            cache.put("b", {"text": "2"})
    cache.put("c", {"text": "3"})
    again = AnswerCache(tmp_path / "c.jsonl")
    assert sorted(again.answers) == ["a", "c"] and again.damaged == 1


PROGRAM = """
import sys
from llm_course.endpoint import EndpointLM
lm = EndpointLM(sys.argv[1], "m", cache=sys.argv[2], concurrency=2)
lm.generate([[{"role": "user", "content": f"q{i}"}] for i in range(60)])
"""


def test_a_kill_loses_nothing_that_was_answered(server, tmp_path):
    server.delay, cache = 0.03, tmp_path / "c.jsonl"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, server.url, str(cache)], env=ENV)
    while not (cache.exists() and cache.read_bytes().count(b"\n") >= 10):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.2)
    kept, sent = AnswerCache(cache), len(server.seen)
    assert 10 <= len(kept.answers) < 60 and kept.damaged == 0
    cache.write_bytes(cache.read_bytes()[:-7])           # the machine itself may also fall, in the middle of a line
    lm = model(server, cache=cache)
    assert lm.generate([say(f"q{i}") for i in range(60)]) == [f"echo: q{i}" for i in range(60)]
    assert len(server.seen) - sent == 60 - len(kept.answers) + 1 and lm.report()["cache"]["damaged"] == 1
    assert len(AnswerCache(cache).answers) == 60


def test_several_writers_do_not_mix_their_lines(tmp_path):
    path = tmp_path / "c.jsonl"
    caches = [AnswerCache(path) for _ in range(4)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: caches[i % 4].put(f"k{i}", {"text": "x" * 20_000}), range(200)))
    again = AnswerCache(path)
    assert again.damaged == 0 and len(again.answers) == 200


def test_chat_only_servers_say_that_they_cannot(server):
    for mood, method in (("404", lambda lm: lm.generate(["a text"])), ("404", lambda lm: lm.loglikelihood([("a", "b")])), ("400", lambda lm: lm.loglikelihood([("a", "b")] * 9)),
                         ("good", lambda lm: lm.loglikelihood([("a", "b")] * 9)), ("good", lambda lm: lm.loglikelihood_rolling(["abc"]))):
        server.moods, server.seen = [mood], []
        with pytest.raises(NotImplementedError, match="^m: the server"):
            method(model(server))
        assert len(server.seen) == 1


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"llm_course\[judge\]"):
        EndpointLM("http://127.0.0.1:9/v1", "m").generate(["x"])


def test_has_what_the_protocol_asks_for(server):
    lm: LM = model(server)
    assert lm.name == "m" and all(callable(getattr(lm, n)) for n in ("generate", "loglikelihood", "loglikelihood_rolling"))


def test_our_own_server():
    pytest.importorskip("uvicorn")
    from llm_course.chat import Session
    from llm_course.generate import generate
    from llm_course.model import ModelConfig, Transformer
    from llm_course.serve import listen, make_server
    from llm_course.tokenizer import train_tokenizer
    torch.manual_seed(0)
    tok = train_tokenizer(["the ferry leaves the north pier at six"] * 20, 300)
    net = Transformer(ModelConfig(len(tok), dim=32, n_layers=1, n_heads=2, max_seq_len=128)).eval()
    web, listener = make_server(Session(net, tok, "tiny")), listen("127.0.0.1", 0)
    threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True).start()
    try:
        lm = EndpointLM(f"http://127.0.0.1:{listener.getsockname()[1]}/v1/", "tiny", concurrency=4)
        ids = [tok.chat(say(q), add_generation_prompt=True)[0] for q in ("the ferry", "the pier")]
        wanted = [tok.answer(a) for a in generate(net, ids, 12, tok.end_id, tok.pad_id)]
        assert [a.strip() for a in lm.generate([say("the ferry"), say("the pier")], 12)] == [w.strip() for w in wanted]
        drawn = [lm.generate([say("the ferry")] * 3, 12, sampling=Sampling(1.5, top_k=20), seed=s) for s in (0, 1)]
        assert len({*drawn[0], *drawn[1]}) == 6          # six draws, none like another
        assert isinstance(lm.generate(["the north"], 4)[0], str) and lm.endpoint.counts["cut at the limit"] > 0
        with pytest.raises(NotImplementedError, match="echo"):
            lm.loglikelihood([("the", " ferry")])
        with pytest.raises(UserError, match="maximum context"):
            lm.generate([say("pier " * 300)])
    finally:
        web.should_exit = True


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(
    ["choices", "message", "content", "text", "usage", "logprobs", "tokens", "text_offset", "token_logprobs", "top_logprobs"]), x, max_size=3), max_leaves=8).map(lambda x: json.dumps(x).encode()))
@settings(max_examples=300, deadline=None)
def test_any_reply_is_an_answer_or_unreadable(raw):
    for chat in (True, False):
        try:
            assert isinstance(read_reply(raw, chat)["text"], str)
        except Unreadable:
            pass


@given(st.text(max_size=20), st.floats(0.1, 2), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_keys_are_the_same_for_the_same_and_differ_by_draw(prompt, temperature, seed, sample):
    one = lambda t, *draw: request_of("u", "m", prompt, sampling=Sampling(t), draw=draw).key
    assert one(temperature, seed, sample) == one(temperature, seed, sample) != one(temperature, seed, sample + 1)
    assert one(0.0, seed, sample) == one(0.0, 0, 0) != one(temperature, seed, sample)
