"""An encoder from the command line: masked language modelling in the place of the next token, and where the chain ends then."""
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from commands import ENV, llm_course, start
from conftest import metrics_of
from llm_course.cli import main
from llm_course.hub import load_model
from llm_course.packing import TokenRows
from llm_course.pretrain import MaskedRows, fill_blanks, masked_accuracy, tokenize_corpus
from llm_course.tasks import IGNORE
from llm_course.tokenizer import Tokenizer

SETTINGS = ["--size", "smoke", "--objective", "mlm", "--set", "pretrain.mask_share=0.3", "pretrain.whole_words=true", "data.instructions=60", "data.pairs=30",
            "data.village_bytes=450e3", "data.docs_bytes=75e3", "data.code_bytes=75e3", "data.budget_bytes=500e3"]
TRAIN = ["run", *SETTINGS, "--stages", "prepare,tokenizer,pretrain,report"]


def weights(folder) -> str:
    return hashlib.sha256((folder / "base" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "A run in which corpus and tokenizer are ready."
    folder = tmp_path_factory.mktemp("mlm") / "corpus"
    done = llm_course("run", *SETTINGS, "--stages", "prepare,tokenizer", "--out", folder, "--quiet")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def encoder(corpus):
    "The folder of a whole run."
    folder = corpus.parent / "run"
    shutil.copytree(corpus, folder)
    done = llm_course(*TRAIN, "--out", folder)
    assert done.returncode == 0, done.stderr
    (folder.parent / "stdout.txt").write_text(done.stdout)
    return folder


def test_metrics_and_report(encoder):
    m = metrics_of(encoder)["pretrain"]
    assert abs(m["first_loss"] - m["ln_vocab"]) < 0.4 and m["val_loss"] < m["first_loss"]
    assert m["masked_accuracy"].keys() == {"value", "low", "high", "n"} and m["masked_accuracy"]["n"] > 100
    assert "bits_per_byte" not in m                                  # an encoder sees the token that it would have to predict
    said = (encoder.parent / "stdout.txt").read_text()
    assert "blanks filled right" in said and said.count("started") == 1


def test_the_folder_holds_an_encoder(encoder, tmp_path):
    model, tokenizer = load_model(encoder / "base"), Tokenizer.load(encoder / "base")
    assert not model.config.causal
    text = "Question: Where does<|mask|> live?"
    assert "<|mask|>" not in fill_blanks(model, tokenizer, text) and fill_blanks(model, tokenizer, text).startswith("Question: Where does")
    tokenize_corpus(encoder / "corpus" / "val.jsonl", tokenizer, tmp_path / "val.bin")
    right, n = masked_accuracy(model, MaskedRows(TokenRows(tmp_path / "val.bin", 128, tokenizer.bos_id), tokenizer))
    untrained, _ = masked_accuracy(type(model)(model.config), MaskedRows(TokenRows(tmp_path / "val.bin", 128, tokenizer.bos_id), tokenizer))
    assert right / n > 0.04 > 0.01 > untrained / n


def test_it_loads_in_transformers(encoder):
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(encoder / "base", attn_implementation="sdpa", output_loading_info=True)
    assert type(theirs).__name__ == "EuroBertForMaskedLM" and not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(8, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs.float().eval()(ids).logits - load_model(encoder / "base")(ids)).abs().max() == 0


def test_killed_and_resumed_ends_with_the_same_weights(encoder, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "run")
    process = start(*TRAIN, "--out", tmp_path / "run", "--quiet")
    end = time.monotonic() + 120
    while not list((tmp_path / "run").glob(".base.partial/checkpoints/step_*")) and time.monotonic() < end and process.exitcode is None:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (tmp_path / "run" / "base").exists(), "it was not killed in time"
    done = llm_course(*TRAIN, "--out", tmp_path / "run")
    assert done.returncode == 0 and "pretrain: going on where it was stopped" in done.stdout, done.stderr
    assert weights(tmp_path / "run") == weights(encoder)


def test_two_processes_hide_the_same_tokens(encoder, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617", "-m", "llm_course.cli", *TRAIN, "--out", str(tmp_path / "run"), "--quiet"]
    done = subprocess.run(command, env=ENV | {"ACCELERATE_USE_CPU": "yes"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    read = lambda folder: [json.loads(line) for line in (folder / "base" / "log.jsonl").read_text().splitlines()]
    gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(read(encoder), read(tmp_path / "run"), strict=True) if "loss" in a]
    assert max(gaps[:3]) < 2e-3 and max(gaps) < 0.1, gaps              # bf16: rounding differs with the size of the micro-batch
    assert metrics_of(tmp_path / "run")["pretrain"]["masked_accuracy"]["n"] == metrics_of(encoder)["pretrain"]["masked_accuracy"]["n"]


def in_process(*argv, capsys) -> tuple[int, str]:
    "Exit status and standard error of the command, without loading torch anew."
    status = main([str(a) for a in argv])
    return status, capsys.readouterr().err


@pytest.mark.parametrize("stages", ["sft", "prepare,tokenizer,pretrain,dpo", None])
def test_stages_that_write_refuse_at_once(stages, tmp_path, capsys):
    status, said = in_process("run", *SETTINGS, *(["--stages", stages] if stages else []), "--out", tmp_path / "run", capsys=capsys)
    assert status == 2 and len(said.strip().splitlines()) == 1
    assert re.search(r"makes an encoder.*the stage (sft|dpo) needs a causal model.*--stages prepare,tokenizer,pretrain,report", said)
    assert not (tmp_path / "run" / "corpus").exists()


def test_an_encoder_does_not_chat(encoder, capsys):
    status, said = in_process("chat", encoder, "--prompt", "Hello", capsys=capsys)
    assert status == 2 and "holds an encoder" in said


@pytest.mark.parametrize("args, message", [(["--objective", "plm"], "invalid choice"), (["--set", "pretrain.objective=plm"], "choose clm"),
                                           (["--set", "pretrain.mask_share=15"], "between 0 and 1")])
def test_wrong_settings(args, message, tmp_path, capsys):
    status, said = in_process("pretrain", "--size", "smoke", *args, "--out", tmp_path / "run", capsys=capsys)
    assert status == 2 and message in said and not (tmp_path / "run").exists()


def test_blanks_are_a_function_of_seed_step_and_row(corpus, tmp_path):
    tokenizer = Tokenizer.load(corpus / "tokenizer")
    tokenize_corpus(corpus / "corpus" / "val.jsonl", tokenizer, tmp_path / "val.bin")
    rows = TokenRows(tmp_path / "val.bin", 128, tokenizer.bos_id)
    one, two, other = MaskedRows(rows, tokenizer), MaskedRows(rows, tokenizer), MaskedRows(rows, tokenizer, seed=1)
    read = lambda r, i: (r[i]["input_ids"].tolist(), r[i]["labels"].tolist())
    for step in (0, 5):
        one.step = two.step = other.step = step
        torch.manual_seed(step)
        order = [0, 3, 1]
        first = {i: read(one, i) for i in order}
        torch.rand(3)                                                  # the global generator plays no part
        assert first == {i: read(two, i) for i in reversed(order)}
        assert all(first[i] != read(other, i) for i in order)
    row = rows[0]["input_ids"]
    labels = one[0]["labels"]
    assert torch.equal(row[labels != IGNORE], labels[labels != IGNORE])
    assert not torch.isin(labels, torch.tensor(tokenizer.special_ids)).any()
    assert torch.equal(one[0]["doc_ids"], rows[0]["doc_ids"])
