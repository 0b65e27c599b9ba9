"""Judges of instructions and votes on preferences: any text, known values, a service that misbehaves, published figures."""
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_course.reading import UserError
from llm_course.instructions import ChatEndpoint, judge_prompt, judge_rows, parse_score, position_bias, select_diverse
from llm_course.votes import annotator_agreement, cohen_kappa, filter_pairs, krippendorff_alpha, longest_answer_baseline, pair_alpha, vote_margin
from timing import assert_linear, cpu_seconds

fuzz = settings(max_examples=80, deadline=None, derandomize=True)
ANY = st.text(max_size=80)
row = lambda q, a="a": {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}


@fuzz
@given(ANY)
def test_a_score_lies_on_the_scale(text):
    for t in (text, f"score: {text}", f"[[{text}]]", f"{text}/5"):
        s = parse_score(t)
        assert s is None or 1 <= s <= 5
    assert text in judge_prompt(row(text))


@pytest.mark.parametrize("piece", ["a ", "<", "\\", "((", "{", "\n", "é", "score ", "[[", "[[ ", "1", "1 ", "4/", "rating - ", "1-2 "])
def test_scores_are_read_in_linear_time(piece):
    def seconds(size):
        texts = [before + piece * (size // len(piece)) for before in ("", "score", "[[")]
        return cpu_seconds(lambda: [parse_score(t) for t in texts])
    assert_linear(seconds, 1_000_000)


@fuzz
@given(st.lists(st.tuples(ANY, st.one_of(st.none(), st.integers(1, 5))), max_size=12), st.floats(0.05, 1), st.one_of(st.none(), st.integers(0, 12)))
def test_selection_accounts_for_every_row(pairs, cap, n):
    rows = [row(q) | {"score": s} for q, s in pairs]
    chosen, report = select_diverse(rows, n, cap)
    gone = report["removed_rows"]["too_similar"] + report["removed_rows"]["not_needed"]
    assert len(chosen) + len(gone) == len(rows) and len(set(gone)) == len(gone)
    assert n is None or len(chosen) <= n
    assert select_diverse(chosen, n, cap)[0] == chosen


@fuzz
@given(st.lists(st.lists(st.integers(0, 1), max_size=5), max_size=12), st.floats(0, 1))
def test_filtering_pairs(votes, threshold):
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b", "votes": v} for v in votes]
    kept, report = filter_pairs(pairs, threshold)
    assert len(kept) + report["removed"]["low_agreement"] == len(pairs)
    assert filter_pairs(kept, threshold)[0] == kept
    assert all(vote_margin(p["votes"]) >= 0 for p in kept if p["votes"])
    assert np.isnan(pair_alpha(pairs)) or pair_alpha(pairs) <= 1
    assert not pairs or longest_answer_baseline(pairs) == 0.5


@fuzz
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 4))), min_size=2, max_size=40))
def test_known_values(rows):
    sk, kr = pytest.importorskip("sklearn.metrics"), pytest.importorskip("krippendorff")
    a, b = [r[0] for r in rows], [r[1] for r in rows]
    if len(set(a) | set(b)) > 1:
        for weights in (None, "linear", "quadratic"):
            assert abs(cohen_kappa(a, b, weights) - sk.cohen_kappa_score(a, b, weights=weights)) < 1e-9
    columns = list(zip(*rows))
    table = np.array([[np.nan if v is None else v for v in c] for c in columns], float)
    for level in ("nominal", "ordinal", "interval"):
        ours = krippendorff_alpha(columns, level)
        if not np.isnan(ours):
            assert abs(ours - kr.alpha(table, level_of_measurement=level)) < 1e-9
    for report in annotator_agreement(rows):
        assert report["compared"] <= report["votes"] <= len(rows)


@fuzz
@given(st.lists(st.tuples(st.sampled_from("ABCx"), st.sampled_from("ABCx")), min_size=1, max_size=20))
def test_position_bias_shares(verdicts):
    r = position_bias([f for f, _ in verdicts], [b for _, b in verdicts])
    assert 0 <= r["consistent"] + r["first"] + r["second"] <= 1 + 1e-9


class Service(BaseHTTPRequestHandler):
    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        self.server.seen.append((prompt, self.headers.get("Authorization")))
        n = sum(p == prompt for p, _ in self.server.seen)
        if prompt == "slow":
            time.sleep(0.6)
        status = {"busy": 429 if n < 3 else 200, "denied": 401, "moved": 307, "broken": 500}.get(prompt, 200)
        body = b"<html>" if prompt == "html" else json.dumps({"choices": [{"message": {"content": "[[4]]"}}]}).encode()
        try:
            self.send_response(status)
            self.send_header("Retry-After", "0") if status == 429 else None
            self.send_header("Location", "http://example.org/") if status == 307 else None
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            pass  # the client gave up

    def log_message(self, *args):
        pass


@pytest.fixture
def service():
    server = HTTPServer(("127.0.0.1", 0), Service)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_endpoint(service, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret\n")
    judge = ChatEndpoint(f"http://127.0.0.1:{service.server_port}/v1/", "m", "A_KEY", timeout=5, retries=2, wait=0.01)
    assert judge("x") == "[[4]]" and service.seen == [("x", "Bearer secret")]
    assert judge("busy") == "[[4]]" and len(service.seen) == 4
    for prompt, words, calls in [("denied", "status 401", 1), ("moved", "status 307", 1), ("html", "no chat completion", 1), ("broken", "3 attempts", 3)]:
        before = len(service.seen)
        with pytest.raises(UserError, match=words) as e:
            judge(prompt)
        assert len(service.seen) - before == calls and "secret" not in str(e.value)
    with pytest.raises(UserError, match="1 attempts"):
        ChatEndpoint(judge.url, "m", "A_KEY", timeout=0.2, retries=0)("slow")
    kept, report = judge_rows([row("q"), row("r")], judge)
    assert report["scores"] == {4.0: 2} and len(kept) == 2


@pytest.mark.parametrize("url", ["", "localhost:1/v1", "file:///etc/passwd", "ftp://x/y", "http://example.org/v1"])
def test_endpoint_refuses_addresses(url, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    with pytest.raises(UserError):
        ChatEndpoint(url, "m", "A_KEY", retries=0)("x")


def test_published_agreement(testdata, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    sys.modules.pop("agreement", None)
    import agreement
    votes = {}
    for i, r in enumerate(agreement.read(testdata / "pref/mt_bench_votes/human.jsonl")):
        if r["judge"].startswith("expert"):
            item, winner = agreement.ordered(r)
            votes.setdefault(item, {})[r["judge"], i] = winner
    gpt4 = dict(agreement.ordered(r) for r in agreement.read(testdata / "pref/mt_bench_votes/gpt4_pair.jsonl"))
    for turn in (1, 2):
        for who, pairs in agreement.comparisons(votes, gpt4, turn).items():
            for setup, kept in (("ties count", pairs), ("no ties", [p for p in pairs if "tie" not in p[:2]])):
                share, n = agreement.PUBLISHED[who][f"turn {turn}, {setup}"]
                assert len(kept) == n and abs(np.mean([a == b for a, b, _ in kept]) - share) < 0.0051
