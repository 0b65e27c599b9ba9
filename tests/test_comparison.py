"""`llm_course eval` as a user meets it: real models in folders, a real server, a process killed in the middle, files that are wrong."""
import json
import signal
import subprocess
import sys
import time

import pytest
from commands import ENV, llm_course

from llm_course.chat import HARBOUR, make_pilot
from llm_course.comparison import RECIPES, download, find_suites, load_lm
from llm_course.hub import to_hf
from llm_course.reading import UserError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Two models in folders: one that has learned its answers, one that has hardly begun."
    folder = tmp_path_factory.mktemp("models")
    for name, steps in (("pilot", 220), ("beginner", 5)):
        model, tokenizer = make_pilot(steps)
        to_hf(model, folder / name, tokenizer)
    return folder


TASKS = [{"suite": "harbour", "about": "What the pilot knows."},
         *({"id": str(k), "prompt": q, "scoring": "exact", "answer": a} for k, (q, a) in enumerate(HARBOUR.items())),
         {"id": "essay", "prompt": "Thank you!", "scoring": "judge", "rubric": "It is kind."}]


@pytest.fixture
def tasks(tmp_path):
    path = tmp_path / "harbour.jsonl"
    path.write_text("\n".join(json.dumps(t) for t in TASKS))
    return path


def test_two_models_and_a_corpus(models, tasks, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"id": "d", "text": "Nothing of this kind."}))
    done = llm_course("eval", models / "beginner", models / "pilot", "--suites", f"{tasks},mmlu", "--out", tmp_path / "out", "--corpus", corpus)
    assert done.returncode == 0, done.stderr
    assert "pilot is better" in done.stdout and "1 not graded" in done.stdout and "mmlu: not run" in done.stdout and "--benchmarks DIR" in done.stdout
    whole = json.loads((tmp_path / "out" / "comparison.json").read_text())
    values = {r["model"]: r["value"]["value"] for r in whole["rows"]}
    assert values["pilot"] == 1.0 > values["beginner"] and whole["leaks"]["harbour"]["leaked"] == {}
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "0 worse, " in page and "Maren" in page
    answers = [json.loads(x) for x in (tmp_path / "out" / "pilot" / "harbour.answers.jsonl").read_text().splitlines()]
    assert len(answers) == 10 and answers[1]["output"]["prompt"][0]["content"] == "Who are you?"


def test_killed_and_started_again(models, tmp_path):
    "kill -9 while it asks: the second start asks for the rest only, and gets what an undisturbed run gets."
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps({"id": str(k), "prompt": f"Question {k}: who are you?", "scoring": "regex", "pattern": "pilot"}) for k in range(300)))
    command = [sys.executable, "-m", "llm_course.cli", "eval", str(models / "pilot"), "--suites", str(path), "--batch-size", "4"]
    answers = tmp_path / "killed" / "pilot" / "many.answers.jsonl"
    process = subprocess.Popen([*command, "--out", str(tmp_path / "killed")], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (answers.exists() and answers.read_bytes().count(b"\n") > 10):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    had = answers.read_bytes().count(b"\n")
    assert 10 < had < 301
    again = subprocess.run([*command, "--out", str(tmp_path / "killed")], env=ENV, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(" of 300") <= (301 - had) // 4 + 2                   # no more batches than were left
    whole = subprocess.run([*command, "--out", str(tmp_path / "whole")], env=ENV, capture_output=True, text=True)
    assert whole.returncode == 0 and answers.read_bytes() == (tmp_path / "whole" / "pilot" / "many.answers.jsonl").read_bytes()


def test_an_endpoint_is_a_model(models, tasks, tmp_path):
    "Our own server behind the address, compared with the same model from its folder."
    pytest.importorskip("openai")
    server = subprocess.Popen([sys.executable, "-m", "llm_course.cli", "serve", str(models / "pilot"), "--port", "0", "--name", "served"], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        address = next(word for line in server.stdout for word in line.split() if word.startswith("http://"))
        done = llm_course("eval", models / "pilot", f"{address.rstrip('/.,')}/v1#served", "--suites", tasks, "--out", tmp_path / "out")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    assert [r["value"]["value"] for r in rows] == [1.0, 1.0] and rows[1]["model"] == "served"


@pytest.mark.parametrize("arguments, says", [
    (["nowhere"], "no folder of a run or model"),
    (["{pilot}", "--suites", "vibes"], "'vibes' is no suite"),
    (["{pilot}", "{pilot}", "--suites", "{tasks}"], "two models are called 'pilot'"),
    (["{pilot}", "--suites", "mmlu"], "nothing to run"),
    (["http://127.0.0.1:9/v1", "--suites", "{tasks}"], "#NAME"),
    (["{pilot}", "--suites", "{tasks}", "--limit", "0"], "at least 1"),
    (["{pilot}", "--suites", "{bad}"], "bad.jsonl:1: scoring 'taste'"),
])
def test_what_is_wrong_is_said(models, tasks, tmp_path, capsys, arguments, says):
    from llm_course.cli import main
    (tmp_path / "bad.jsonl").write_text(json.dumps({"id": "a", "prompt": "?", "scoring": "taste"}))
    names = {"pilot": models / "pilot", "tasks": tasks, "bad": tmp_path / "bad.jsonl"}
    assert main(["eval", *[a.format(**names) for a in arguments], "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err


def test_list_of_suites(capsys):
    from llm_course.cli import main
    assert main(["eval", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES) and "facts" in out


HUB = {("cais/mmlu", "all", "test"): [{"question": "Q?", "subject": "village_life", "choices": ["a", "b", "c", "d"], "answer": 1}],
       ("cais/mmlu", "all", "dev"): [{"question": f"D{k}?", "subject": "village_life", "choices": ["a", "b", "c", "d"], "answer": k % 4} for k in range(5)],
       ("openai/gsm8k", "main", "test"): [{"question": "1 + 1?", "answer": "It is two.\n#### 2"}],
       ("openai/gsm8k", "main", "train"): [{"question": f"{k} + 1?", "answer": f"#### {k + 1}"} for k in range(6)],
       ("openai/openai_humaneval", None, "test"): [{"task_id": "T/0", "prompt": "def one():\n", "canonical_solution": "    return 1\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"}],
       ("google/IFEval", None, "train"): [{"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None, "relation": None}]}],
       ("HuggingFaceH4/mt_bench_prompts", None, "train"): [{"prompt_id": 81, "category": "writing", "prompt": ["Write.", "Again."], "reference": []}],
       ("nyu-mll/blimp", "agreement", "train"): [{"sentence_good": "He is.", "sentence_bad": "He are.", "UID": "agreement", "pair_id": 0}],
       ("allenai/ai2_arc", "ARC-Easy", "test"): [{"id": "x", "question": "Q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}],
       ("Rowan/hellaswag", None, "validation"): [{"ind": 1, "activity_label": "Cooking", "ctx_a": "A man.", "ctx_b": "he", "ctx": "A man. he", "endings": ["a", "b"], "label": "1"}]}


def test_from_the_hub(tmp_path, monkeypatch):
    "Rows as the hub has them become files that the readers understand, once."
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, config, split):
        asked.append(name)
        return datasets.Dataset.from_list(HUB[name, config, split])
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["agreement"])
    names = ["mmlu", "gsm8k", "humaneval", "ifeval", "mt_bench", "blimp", "arc_easy", "hellaswag"]
    for name in names:
        assert download(name, tmp_path), name
    suites, missing = find_suites(names, tmp_path, judge=lambda prompt: "[[5]]")
    assert [s.name for s in suites] == names and not missing
    assert suites[3].items[0]["id"] and suites[0].items[0]["answer"] == 1
    before = len(asked)
    assert all(download(name, tmp_path) == [] for name in names) and len(asked) == before
    with pytest.raises(UserError, match="by hand"):
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
        download("piqa", tmp_path)


def test_real_files(testdata):
    "All benchmarks are found in a folder of their authors' files."
    suites, missing = find_suites([n for n in RECIPES if n != "hellaswag"], testdata / "eval", judge=lambda prompt: "[[5]]")
    assert not missing and {s.name: len(s.items) for s in suites} | {"gsm8k": 700, "humaneval": 164, "ifeval": 541, "mt_bench": 80, "blimp": 4600} == {s.name: len(s.items) for s in suites}
    assert set(find_suites(["hellaswag"], testdata / "eval")[1]) == {"hellaswag"}


def test_a_checkpoint_that_only_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    from llm_course.tokenizer import train_tokenizer
    tokenizer = train_tokenizer(["a small text for a small tokenizer"] * 20, 300)
    tokenizer.save(tmp_path / "opt")
    config = transformers.OPTConfig(vocab_size=len(tokenizer), hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=16,
                                    bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.end_id, pad_token_id=tokenizer.pad_id)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    lm = load_lm(str(tmp_path / "opt"))
    assert type(lm).__name__ == "TransformersLM" and lm.loglikelihood([("a small", " text")])[0][0] < 0 and isinstance(lm.generate(["a"], 3)[0], str)
