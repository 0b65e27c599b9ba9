"""Bytes of any kind become text, in linear time and without an exception."""
import time

import pytest
from hypothesis import given, settings, strategies as st

from llm_course.reading import codec_of, decode

LABELS = st.none() | st.sampled_from(["latin1", "utf-8", "utf-16", "gb2312", "shift_jis", "euc-kr", "iso-2022-jp", "rot13", "unicode_escape", "idna", "undefined"]) | st.text(max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=300), LABELS)
def test_any_bytes(raw, declared):
    got = decode(raw, declared)
    got.text.encode("utf-8")                 # no lone surrogate
    assert got.replaced <= max(1, len(raw)) and (got.replaced == 0 or got.how in ("bom", "damaged utf-8", "fallback"))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=100))
def test_utf8_and_marks(text):
    text = text.encode("utf-8", "ignore").decode()
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        assert decode(text.encode(encoding)).text == text
    if not any(c in text for c in "\0\x1b\ufeff"):
        assert (decode(text.encode()).text, decode(text.encode()).how) == (text, "utf-8")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=30))
def test_any_label(label):
    codec = codec_of(label)
    assert codec is None or "a".encode(codec)


@pytest.mark.parametrize("unit", [b"a ", b"<", b"\\", b"((", b"\n", "é".encode(), b"\xe9", b"\xff\xfe", b"\0", b"\x1b$", b"\x81", b"a\0", b"\xc3", "я".encode("cp1251")])
def test_linear_time(unit):
    def seconds(megabytes):
        raw = b"x" + unit * (megabytes * 10**6 // len(unit))
        times = []
        for _ in range(2):
            start = time.perf_counter()
            decode(raw)
            times.append(time.perf_counter() - start)
        return min(times)
    one, two = seconds(1), seconds(2)
    assert one < 2 and two < 3 * one + 0.1
