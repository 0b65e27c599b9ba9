"""The whole chain from the command line: what it writes, that it survives being killed, that others can read it."""
import hashlib
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from commands import ENV, llm_course, start
from conftest import SMOKE, metrics_of
from llm_course.reading import read_rows
from llm_course.hub import load_model
from llm_course.pipeline import CHAIN, SIZES, STAGES
from llm_course.reward import RewardModel
from llm_course.tokenizer import Tokenizer
from llm_course.world import fill, make_village, vocabulary

KEYS = """data.documents_in data.documents_out data.removed.gibberish data.removed.near_duplicate data.injected.mojibake.precision data.injected.mojibake.recall
data.injected.exact_duplicate.recall tokenizer.vocab_size tokenizer.bytes_per_token.village tokenizer.bytes_per_token.docs tokenizer.bytes_per_token.code
pretrain.parameters pretrain.tokens pretrain.tokens_per_second pretrain.first_loss pretrain.val_loss pretrain.bits_per_byte.village pretrain.bits_per_byte.docs
pretrain.bits_per_byte.code reward.pair_accuracy ppo.kl ppo.win_rate_vs_sft dpo.kl dpo.win_rate_vs_sft seconds.prepare seconds.tokenizer seconds.pretrain
seconds.sft seconds.reward seconds.ppo seconds.dpo seconds.eval seconds.total""".split()


def dig(m: dict, key: str):
    for k in key.split("."):
        m = m[k]
    return m


def weights(folder) -> dict[str, str]:
    "A hash of each model of a run."
    return {n: hashlib.sha256((folder / n / "model.safetensors").read_bytes()).hexdigest() for n in ("base", "sft", "reward", "ppo", "dpo")}


def with_corpus_and_tokenizer(run, folder) -> None:
    "A run that has come as far as the first training, from a finished one."
    for name in ("corpus", "tokenizer"):
        shutil.copytree(run / name, folder / name)


def test_metrics_have_all_keys(smoke):
    m = metrics_of(smoke)
    missing = [k for k in KEYS if not isinstance(dig(m, k), (int, float, dict))]
    assert not missing
    for kind in ("recall", "form", "reading", "string", "counting", "arithmetic"):
        for model in ("base", "sft", "ppo", "dpo"):
            x = m["tasks"]["accuracy"][kind][model]
            assert x.keys() == {"value", "low", "high", "n"} and x["low"] <= x["value"] <= x["high"]
    assert set(m["gold_reward"]) == {"base", "sft", "ppo", "dpo"}
    assert {(r["model"], r["against"]) for r in m["paired"]} == {("sft", "base"), ("ppo", "sft"), ("dpo", "sft")} and len(m["paired"]) == 21
    assert all(r["p_adjusted"] >= r["p"] and r["n"] in (15, 30) for r in m["paired"])
    assert m["contamination"]["tasks"]["leaked"] == 0 and m["contamination"]["tasks"]["items"] == 90 and m["suites_missing"] == {}
    assert set(m["suites"]["minimal pairs"]) == set(m["matrix"]) == {"base", "sft", "ppo", "dpo"} and set(m["matrix"]["sft"]) == {"village", "docs", "code"}
    page = (smoke / "report.html").read_text()
    assert all(f"<h2>{head}</h2>" in page for head in ("What each stage changed", "What got worse, item by item", "Bits per byte, model by source", "Questions in the training text"))
    assert abs(m["pretrain"]["first_loss"] - torch.tensor(float(m["tokenizer"]["vocab_size"])).log().item()) < 0.3


def test_injected_mess_is_found(smoke):
    for kind in ("exact_duplicate", "near_duplicate", "mojibake", "html", "latex"):
        found = metrics_of(smoke)["data"]["injected"][kind]
        assert min(found["precision"], found["recall"]) >= 0.95, (kind, found)


def test_folders_are_whole(smoke):
    names = {p.name for p in smoke.iterdir()}
    assert names == {"config.json", "metrics.json", "report.html", *(STAGES[s][0] for s in CHAIN)}
    assert not list(smoke.rglob("*.partial")) and not list(smoke.rglob("checkpoints"))
    for model in ("base", "sft", "ppo", "dpo"):
        assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "log.jsonl"} <= {p.name for p in (smoke / model).iterdir()}
    kept = json.loads((smoke / "eval" / "sft.json").read_text())
    assert all(a["prompt"] and isinstance(a["answer"], str) for a in kept["greedy"] + kept["sampled"])


def test_training_and_test_people_are_apart(smoke):
    "No question about a fact of a person of the test set stands in any training data; the tasks ask nothing else."
    people = make_village(0, SIZES["smoke"]["data"]["people"]).of("test")
    forbidden = {fill(q, N=p.name): (p.name, a) for p in people for a, spec in vocabulary()["attributes"].items() for q in spec["questions"]}
    rows = lambda name: [r for _, r in read_rows(smoke / "corpus" / f"{name}.jsonl")]
    texts = [r["text"] for r in rows("train")] + [m["content"] for r in rows("conversations") for m in r["messages"]] + [r["prompt"][0]["content"] for r in rows("pairs")]
    pattern = re.compile("|".join(map(re.escape, forbidden)))
    asked = [t["prompt"] for t in rows("tasks") if "person" in t]
    assert asked and all(pattern.search(q) for q in asked)
    assert not [t for t in texts if pattern.search(t)]
    assert not {t["prompt"] for t in rows("tasks")} & set(texts)


def test_models_load_in_transformers(smoke):
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(8, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    for name in ("base", "sft", "ppo", "dpo"):
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(smoke / name, attn_implementation="sdpa", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            assert (theirs.float()(ids).logits - load_model(smoke / name)(ids)).abs().max() == 0
    reward = transformers.AutoModelForSequenceClassification.from_pretrained(smoke / "reward")
    ours = RewardModel.load(smoke / "reward")
    with torch.no_grad():
        assert (reward.float()(ids, attention_mask=torch.ones_like(ids)).logits[:, 0] - ours(ids, torch.ones_like(ids))).abs().max() < 1e-6


def test_tokenizer_loads_in_transformers(smoke):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(smoke / "dpo"), Tokenizer.load(smoke / "dpo")
    messages = [{"role": "user", "content": "Where does Ada live?"}, {"role": "assistant", "content": "By the mill."}, {"role": "user", "content": "And now?"}]
    out = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert list(out["input_ids"]) == ours.chat(messages, add_generation_prompt=True)[0]
    masked = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert list(masked["assistant_masks"]) == ours.chat(messages)[1]


def test_second_run_does_nothing(smoke):
    before = {p: p.stat().st_mtime_ns for p in smoke.rglob("*.safetensors")}
    done = llm_course("run", *SMOKE, "--out", smoke)
    assert done.returncode == 0 and done.stdout.count("done already") == len(CHAIN)
    assert before == {p: p.stat().st_mtime_ns for p in smoke.rglob("*.safetensors")}


def test_the_end_of_a_run_is_a_table(smoke):
    said = (smoke.parent / "stdout.txt").read_text()
    for word in ("precision, recall", "accuracy, recall", "win rate against SFT", "KL from SFT", "report.html", "llm_course chat"):
        assert word in said


def test_killed_at_random_moments(smoke, tmp_path):
    "However often it is killed, the run ends with the weights of the run that was never killed."
    folder, rng, kills = tmp_path / "run", random.Random(os.urandom(4)), 0
    command = ["run", *SMOKE, "--out", folder, "--quiet"]
    for _ in range(7):
        process = start(*command)
        process.join(rng.uniform(0.3, 5))
        if process.exitcode is None:
            os.kill(process.pid, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
            process.join()
            kills += 1
    done = llm_course(*command)
    assert done.returncode == 0, done.stderr
    assert kills and weights(folder) == weights(smoke)
    ours, theirs = metrics_of(folder), metrics_of(smoke)
    for m in (ours, theirs):
        m.pop("seconds"), m["pretrain"].pop("tokens_per_second")
    assert ours == theirs


def test_ctrl_c_says_how_to_go_on(smoke, tmp_path):
    with_corpus_and_tokenizer(smoke, tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-m", "llm_course.cli", "run", "--size", "smoke", "--set", "pretrain.tokens=20e6", "--out", str(tmp_path / "run")],
                               env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("pretrain: started"):
            break
    log, deadline = tmp_path / "run" / ".base.partial" / "log.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.stat().st_size):    # until it trains
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert re.search(r"error: stopped at step \d+ of \d+; the same command goes on from here", err)
    assert (tmp_path / "run" / ".base.partial" / "checkpoints").is_dir() and not (tmp_path / "run" / "base").exists()


def test_changed_settings_need_update_and_repeat_only_what_they_touch(smoke, tmp_path):
    shutil.copytree(smoke, tmp_path / "run")
    refused = llm_course("run", *SMOKE, "--set", "dpo.beta=0.2", "--out", tmp_path / "run")
    assert refused.returncode == 2 and "dpo.beta: 0.3 there, 0.2 now" in refused.stderr and "--update" in refused.stderr
    done = llm_course("run", *SMOKE, "--set", "dpo.beta=0.2", "--out", tmp_path / "run", "--update")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(\w+): started", done.stdout) == ["dpo", "eval"]
    before, after = weights(smoke), weights(tmp_path / "run")
    assert before["dpo"] != after["dpo"] and all(before[n] == after[n] for n in ("base", "sft", "reward", "ppo"))


def test_stages_one_by_one(smoke, tmp_path):
    for stage in ("prepare", "tokenizer", "pretrain"):
        done = llm_course(stage, *SMOKE, "--out", tmp_path / "run")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "base" / "model.safetensors").read_bytes() == (smoke / "base" / "model.safetensors").read_bytes()
    missing = llm_course("dpo", "--out", tmp_path / "run")
    assert missing.returncode == 2 and "needs sft first" in missing.stderr


def test_two_processes_train_as_one(smoke, tmp_path):
    "torchrun with two processes: the same chain, the same losses."
    with_corpus_and_tokenizer(smoke, tmp_path / "two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29613", "-m", "llm_course.cli", "run", *SMOKE,
               "--stages", "prepare,tokenizer,pretrain,sft", "--out", str(tmp_path / "two")]
    done = subprocess.run(command, env=ENV | {"ACCELERATE_USE_CPU": "yes"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("pretrain: started") == 1
    read = lambda folder, stage: [json.loads(line) for line in (folder / stage / "log.jsonl").read_text().splitlines()]
    for stage in ("base", "sft"):
        one, two = read(smoke, stage), read(tmp_path / "two", stage)
        assert [r["step"] for r in one] == [r["step"] for r in two] and [r.get("lr") for r in one] == [r.get("lr") for r in two]
        gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(one, two) if "loss" in a]
        assert max(gaps[:3]) < 2e-3 and max(gaps) < 0.1, (stage, gaps)      # bf16: rounding differs with the size of the micro-batch


def test_chat_reads_a_pipe(smoke):
    done = llm_course("chat", smoke, input="Where does Ada live?\n/reset\n\nHello\n/quit\nnever read\n", timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "(a new conversation)" in lines and len(lines) >= 3


def test_chat_in_a_terminal(smoke):
    "A pseudo-terminal: the prompt is shown, the answer streams, end of input ends it."
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "llm_course.cli", "chat", str(smoke), "--model", "sft"], env=ENV, stdin=slave, stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)

    def until(text: str, seconds: float = 60) -> str:
        seen, end = "", time.time() + seconds
        while text not in seen and time.time() < end:
            if select.select([master], [], [], 0.2)[0]:
                seen += os.read(master, 4096).decode(errors="replace")
        assert text in seen, seen
        return seen

    until("> ")
    os.write(master, b"Where does Ada live?\n")
    until("\n> ")
    os.write(master, b"\x04")
    assert process.wait(timeout=20) == 0
    os.close(master)


def test_chat_forgets_the_oldest_turn(smoke):
    done = llm_course("chat", smoke, "--max-new-tokens", "20", input="Where does Ada live, and what does she do all day long in the village?\n" * 12, timeout=120)
    assert done.returncode == 0 and "are forgotten" in done.stdout


def test_report_page(smoke):
    page = (smoke / "report.html").read_text()
    assert page.count("<svg") >= 6 and "The same prompts, stage by stage" in page
    assert "src=" not in page and "<link" not in page and "<script" not in page


def test_help_is_quick():
    "By CPU time, beside that of loading torch, which neither needs."
    def seconds(*code):
        before = os.times()
        subprocess.run([sys.executable, *code], env=ENV, check=True, capture_output=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system
    least = lambda *code: min(seconds(*code) for _ in range(3))
    torch_takes, empty = least("-c", "import torch"), least("-c", "pass")
    assert least("-c", "import llm_course") - empty < 0.1 * torch_takes
    assert least("-m", "llm_course.cli", "--help") - empty < 0.35 * torch_takes


def test_grpo_stands_beside_the_chain(smoke, tmp_path):
    "It runs when asked for; then the evaluation counts its model among the others, and nothing else is done again."
    shutil.copytree(smoke, tmp_path / "run")
    done = llm_course("grpo", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", "log.jsonl", "metrics.json"} <= {p.name for p in (tmp_path / "run" / "grpo").iterdir()}
    logged = [json.loads(line) for line in (tmp_path / "run" / "grpo" / "log.jsonl").read_text().splitlines()]
    assert any("frac_reward_zero_std" in r for r in logged)
    again = llm_course("run", "--out", tmp_path / "run")
    assert again.returncode == 0 and re.findall(r"(\w+): started", again.stdout) == ["eval"], again.stderr
    assert set(metrics_of(tmp_path / "run")["gold_reward"]) == {"base", "sft", "ppo", "dpo", "grpo"}
    assert weights(smoke) == weights(tmp_path / "run")
    left_out = llm_course("grpo", "--size", "smoke", "--set", "data.replace=true", "--out", tmp_path / "run", "--update")
    assert left_out.returncode == 2 and "needs prepare" in left_out.stderr
