"""Bytes of any kind become text, files of any kind become rows: no exception but DataError, linear time, constant memory."""
import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from llm_course import reading
from llm_course.reading import DataError, codec_of, decode, read_rows
from timing import assert_linear, cpu_seconds

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
    assert_linear(lambda n: cpu_seconds(decode, b"x" + unit * (n // len(unit))), 2_000_000)


def peak_megabytes(path) -> tuple[int, float]:
    "Rows of a file and the peak memory, in MB, of a process that reads it."
    program = """import sys; from llm_course.reading import read_rows
n = sum(1 for _ in read_rows(sys.argv[1]))
print(n, next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024)"""
    out = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True).stdout.split()
    return int(out[0]), float(out[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("ending, first, last", [("jsonl", b"", b""), ("json", b"[", b'{"text": "end"}]'), ("csv", b"text,n\n", b""), ("txt", b"", b"")])
def test_200_megabytes_in_constant_memory(ending, first, last, tmp_path):
    line = {"jsonl": '{"text": "%s"}\n', "json": '{"text": "%s"},', "csv": '"%s",1\n', "txt": "%s\n\n"}[ending] % ("naïve and long, " * 60)
    body = gzip.compress(line.encode() * 10_000, 1)
    path = tmp_path / f"a.{ending}.gz"
    path.write_bytes(gzip.compress(first) + body * 21 + gzip.compress(last))
    n, peak = peak_megabytes(path)
    assert n >= (210_000 if ending != "txt" else 9_000) and peak < 100


def test_a_line_of_100_megabytes(tmp_path):
    path = tmp_path / "long.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "') + gzip.compress(b"a b " * 2_500_000, 1) * 10 + gzip.compress(b'"}\n{"text": "after"}'))
    assert [len(row["text"]) for _, row in read_rows(path)] == [100_000_000, 5]


@pytest.mark.parametrize("name, start", [("a.jsonl", '{"text": "'), ("a.json", '[{"text": "'), ("a.csv", 'text\n"')])
def test_a_line_beyond_the_limit(name, start, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST", 1 << 21)
    (tmp_path / name).write_text(start + "x" * (1 << 24))
    with pytest.raises(DataError, match="of more than 2 MB|field larger"):
        list(read_rows(tmp_path / name))


ROWS = [{"id": i, "text": f"naïve {i} 水車 " * (i % 9)} for i in range(400)]


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_a_cut_file_gives_its_rows_and_then_an_error(ending, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    body = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS * 20).encode()
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}[ending](body)
    path = tmp_path / f"a.jsonl.{ending}"
    for keep in (len(packed) - 1, len(packed) // 2, 5):
        path.write_bytes(packed[:keep])
        got = []
        with pytest.raises(DataError, match="damaged or cut off"):
            for _, row in read_rows(path):
                got.append(row)
        assert got == (ROWS * 20)[:len(got)]
    path.write_bytes(packed)
    assert [r for _, r in read_rows(path)] == ROWS * 20


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "gb18030", "cp932", "big5hkscs", "euc_jp", "iso2022_jp"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "txt"])
def test_encodings_in_a_stream(encoding, ending, tmp_path):
    text = "水車小屋は川の向こうにあります。古い橋を渡って、毎朝パンを買いに行きます。" if encoding in ("cp932", "euc_jp", "iso2022_jp") else "水車在河的對岸。我每天早上走過舊橋去買麵包，然後回家。" if encoding == "big5hkscs" else "水车在河的对岸。我每天早上走过旧桥去买面包，然后回家。"
    rows = [{"text": f"{text} {i}"} for i in range(9000)]
    body = {"jsonl": "\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "json": json.dumps(rows, ensure_ascii=False), "txt": "\n".join(r["text"] for r in rows)}[ending]
    (tmp_path / f"a.{ending}").write_bytes(body.encode(encoding))
    got = [r["text"] for _, r in read_rows(tmp_path / f"a.{ending}")]
    assert ("".join(got) == body) if ending == "txt" else (got == [r["text"] for r in rows])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.sampled_from(["jsonl", "json", "csv", "tsv", "txt", "md", "jsonl.gz", "jsonl.zst", "json.xz", "parquet"]), st.booleans(), st.sampled_from([None, "utf-8", "utf-16", "latin1", "iso-2022-jp"]))
def test_any_file(raw, ending, skip, encoding):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.{ending}")
        path.write_bytes(raw)
        errors = []
        try:
            for _, row in read_rows(path, encoding, errors.append if skip else None):
                json.dumps(row, ensure_ascii=False, default=str).encode()      # whatever is read can be written
        except DataError as e:
            assert str(path) in str(e)
        assert all(e.line for e in errors)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10), lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=4), s, max_size=4))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=4), min_size=1, max_size=8), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 60))
def test_json_array_in_small_blocks(rows, indent, ascii, size):
    "A window that grows by a few bytes at a time reads the same rows."
    rows = json.loads(json.dumps(rows).encode("utf-8", "ignore").decode().replace("\\ud", "\\u0d"))
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    blocks = [(1, text[i:i + size], False) for i in range(0, len(text), size)]
    doc = reading._JsonText.__new__(reading._JsonText)
    doc.path, doc.blocks, doc.json, doc.text, doc.at, doc.line, doc.ended = Path("x"), iter(blocks), reading._StrictJson(), "", 0, 1, False
    assert [value for _, value in doc.values()] == rows


@pytest.mark.parametrize("unit", ["a ", "<", "\\", "((", "{", "[", "\n", "é", "<a ", '"', '\\"', "[[", '{"a":', "1", "\ufeff", "\r", ","])
@pytest.mark.parametrize("start, ending", [('{"text": "', "jsonl"), ('[{"text": "', "json"), ("", "txt"), ("", "csv"), ("[", "json")])
def test_reading_is_linear(start, ending, unit, tmp_path):
    def read(path):
        try:
            list(read_rows(path))
        except DataError:
            pass

    def seconds(n):
        path = tmp_path / f"{n}.{ending}"
        path.write_text(start + unit * (n // len(unit.encode())), encoding="utf-8", newline="")
        return cpu_seconds(read, path)
    assert_linear(seconds, 2_000_000)


def test_binary_garbage_is_refused(testdata):
    with pytest.raises(DataError, match="NUL byte"):
        list(read_rows(testdata / "web" / "binary_garbage.txt"))


def test_real_files_of_known_encoding(testdata, tmp_path):
    "The text files of the set that `decode` gets right are read the same as a stream."
    for folder, codec in [("KOI8-R", "koi8-r"), ("SHIFT_JIS", "cp932"), ("GB2312", "gb18030"), ("UTF-16LE", "utf-16-le"), ("windows-1251-russian", "cp1251")]:
        for file in sorted((testdata / "web" / "encodings" / folder).iterdir()):
            copy = tmp_path / "copy.txt"
            copy.write_bytes(file.read_bytes())
            got = " ".join(" ".join(r["text"].split()) for _, r in read_rows(copy))
            assert got == " ".join(file.read_bytes().decode(codec).split()).lstrip("\ufeff"), file
