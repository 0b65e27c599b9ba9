"""Bad input gets one line that names the place and the remedy, an exit status, and leaves nothing half-written behind."""
import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest
from commands import fresh_llm_course, llm_course

SMALL = ["--size", "smoke", "--set", "data.village_bytes=50000", "data.docs_bytes=20000", "data.code_bytes=20000", "data.instructions=20", "data.pairs=10"]
GOOD = b'{"text": "A good line."}\n'


def files(tmp: Path) -> dict[str, tuple[Path, str]]:
    "Bad files: name -> (path, what the error must say)."
    packed = gzip.compress(GOOD * 2000)
    contents = {
        "empty": ("a.jsonl", b"", "the file is empty"),
        "blank": ("b.jsonl", b"\n\n", "no rows"),
        "malformed": ("c.jsonl", GOOD + b'{"text": "cut', "c.jsonl:2: not JSON"),
        "encoding": ("d.jsonl", '{"text": "naïve"}\n'.encode() * 9 + '{"text": "café"}\n'.encode("cp1252"), "d.jsonl:10: byte 0xe9 at column 14 does not fit the encoding"),
        "utf16": ("e.txt", "Hello".encode("utf-16") + b"x", "e.txt:1: byte 0x78 at column 6 does not fit the encoding"),
        "picture": ("q.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "the file is PNG, not text"),
        "binary": ("r.txt", bytes(range(256)) * 8, "NUL byte in the text"),
        "truncated": ("f.jsonl.gz", packed[:len(packed) // 2], "damaged or cut off"),
        "no gzip": ("g.jsonl.gz", GOOD, "damaged or cut off"),
        "array": ("h.jsonl", GOOD + b"[1, 2]\n", "h.jsonl:2: expected an object"),
        "nan": ("i.jsonl", GOOD + b'{"text": "x", "score": NaN}\n', "i.jsonl:2: NaN"),
        "twice": ("j.jsonl", b'{"text": "x", "text": "y"}\n', "j.jsonl:1: the key 'text' stands twice"),
        "unknown": ("k.jsonl", GOOD + b'{"body": "no known key"}\n', "k.jsonl:2: no known format"),
        "ending": ("l.xyz", b"?", "unknown ending"),
        "parquet": ("m.parquet", b"PAR1 this is none", "not a whole Parquet file"),
        "json": ("n.json", b'{"rows": [{"text": "x"},]}', "n.json:1: not JSON"),
        "csv": ("o.csv", b"text,id\nonly one\n", "o.csv:2: expected 2 columns"),
        "nul": ("p.txt", b"a\0b\n", "NUL byte"),
    }
    for name, content, _ in contents.values():
        (tmp / name).write_bytes(content)
    return {k: (tmp / name, message) for k, (name, _, message) in contents.items()}


def check(done: subprocess.CompletedProcess, message: str, status: int = 2) -> None:
    assert done.returncode == status, (done.returncode, done.stderr)
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    assert message in errors[0], errors[0]


def in_process(argv: list[str], capsys) -> subprocess.CompletedProcess:
    "The same as a process of its own, without loading torch each time."
    from llm_course.cli import main
    status = main([str(a) for a in argv])
    out = capsys.readouterr()
    return subprocess.CompletedProcess(argv, status, out.out, out.err)


NAMES = ["empty", "blank", "malformed", "encoding", "utf16", "picture", "binary", "truncated", "no gzip", "array", "nan", "twice", "unknown", "ending", "parquet", "json", "csv", "nul"]


@pytest.mark.parametrize("name", NAMES)
def test_bad_file(name, tmp_path, capsys):
    path, message = files(tmp_path)[name]
    done = in_process(["run", *SMALL, "--data", path, "--out", tmp_path / "run", "--quiet"], capsys)
    check(done, message)
    assert not (tmp_path / "run" / "corpus").exists() and not list((tmp_path / "run").glob(".*.partial"))


def test_every_bad_file_is_tried(tmp_path):
    assert sorted(files(tmp_path)) == sorted(NAMES)


@pytest.mark.parametrize("args, message", [
    (["run", "--size", "huge"], "unknown size 'huge'; choose one of laptop, gpu, cluster, smoke"),
    (["run", "--set", "pretrain.lrr=1"], "did you mean pretrain.lr"),
    (["run", "--set", "pretrain.lr=fast"], "expected a number"),
    (["run", "--set", "pretrain.lr"], "key=value"),
    (["run", "--set", "model.n_heads=3"], "must be a multiple"),
    (["run", "--set", "tokenizer.vocab_size=100"], "vocab_size"),
    (["run", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["run", "--data", "*.nothing"], "no file matches"),
    (["run", "--stages", "prepare,bake"], "unknown stage 'bake'"),
    (["run", "--dataset", "nobody/nothing"], "cannot be loaded from the hub"),
    (["sing"], "invalid choice: 'sing'"),
    ([], "required: COMMAND"),
    (["chat", "nowhere"], "holds no model"),
    (["chat"], "required: folder"),
    (["report", "nowhere"], "holds no run"),
    (["dpo", "--size", "smoke"], "needs prepare, sft first"),
])
def test_bad_argument(args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small = SMALL if args[:1] == ["run"] and "--size" not in args else []
    check(in_process([*args, *small], capsys), message)


def test_a_real_process_exits_with_the_status(tmp_path):
    check(fresh_llm_course("run", "--size", "huge", cwd=tmp_path), "unknown size")
    check(fresh_llm_course("chat", "nowhere", cwd=tmp_path), "holds no model")


def test_bad_standard_input(tmp_path):
    done = fresh_llm_course("run", *SMALL, "--data", "-", "--out", tmp_path / "run", "--quiet", input='{"text": "fine"}\n{"text": \n')
    check(done, "-:2: not JSON")


def test_folder_of_other_settings(tmp_path, capsys):
    base = ["prepare", *SMALL, "data.pairs=0", "--out", tmp_path / "run", "--quiet"]
    assert in_process(base, capsys).returncode == 0
    check(in_process([*base, "--set", "seed=1"], capsys), "seed: 0 there, 1 now")
    (tmp_path / "run" / "config.json").write_text("{")
    check(in_process(base, capsys), "damaged run settings")
    (tmp_path / "file").write_text("I am a file")
    check(in_process([*base[:-3], "--out", tmp_path / "file", "--quiet"], capsys), "is a file, not a folder")


def test_damaged_model_folder(tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(b"not safe")
    (tmp_path / "m" / "config.json").write_text("{}")
    check(in_process(["chat", tmp_path / "m", "--prompt", "Hi"], capsys), "damaged model folder")


def test_read_only_folder(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o500)
    check(llm_course("prepare", "--size", "smoke", "--out", tmp_path / "locked" / "run"), "cannot write")


@pytest.mark.parametrize("size, stage", [("1m", "prepare"), ("6m", "tokenizer,pretrain,sft,reward,ppo")])
def test_full_disk(size, stage, tmp_path):
    "A real file system that runs full."
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no permission to mount a small file system")
    try:
        done = llm_course("run", "--size", "smoke", "--out", disk / "run", "--quiet")
        check(done, "cannot write: No space left on device")
        assert "--out" in done.stderr
        assert not (disk / "run" / "eval").exists()
        for folder in (disk / "run").glob("[a-z]*"):
            if folder.is_dir():
                assert json.loads((folder / "stage.json").read_text())["finished"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_dropped_rows_are_counted(tmp_path):
    rows = [{"text": "A good line about the weather in the village, long enough to be kept by every rule of the chain."}, {"text": "   "}, {"instruction": "Say hello.", "output": ""},
            {"prompt": "Say hello.", "chosen": "Hello.", "rejected": "Hello."}, {"conversations": [{"from": "ghost", "value": "Boo"}]}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = llm_course("prepare", *SMALL, "--data", f"{tmp_path / 'mine.jsonl'}=0.2", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    dropped = json.loads((tmp_path / "run" / "corpus" / "funnel.json").read_text())["dropped_rows"]
    assert [w.split(":")[-1] for w, _ in dropped] == ["2", "3", "4", "5"]
    assert [r for _, r in dropped] == ["an empty text", "an empty assistant message", "chosen and rejected are the same", "unknown role 'ghost'. Known roles are human, user, gpt, assistant, chatgpt, bot, bing, model, system, tool, observation, function, function_call, function_response, developer"]
    assert "4 rows were dropped" in done.stdout


def test_text_of_which_nothing_can_be_held_out(tmp_path):
    text = ("The river runs past an old mill, and every child in town knows where its owner keeps bread for those who come late at night. In winter the water "
            "freezes at the edges first. Nobody remembers who built the wall behind the garden, but two letters are cut into its highest stone.")
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}) + "\n")
    done = llm_course("prepare", "--size", "smoke", "--replace", "--data", tmp_path / "one.jsonl", "--out", tmp_path / "run")
    assert done.returncode == 2 and "held out" in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "run" / "corpus").exists()
