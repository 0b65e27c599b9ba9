"""The whole chain from the command line on real files as people have them: text, Alpaca, ShareGPT, Dolly; hh-rlhf, chosen and rejected, labelled answers."""
import itertools
import json

import pytest
from commands import llm_course
from llm_course.reading import read_rows

FILES = ("instruct/alpaca_en_demo.json", "instruct/vicuna_dummy_conversation.json", "instruct/dolly_hhrlhf_small.jsonl", "pref/hh_harmless-base_test.jsonl.gz",
         "pref/dpo_en_demo.json", "pref/rasbt_instruction-data-with-preference.json", "pref/kto_en_demo.json")
TINY = ["data.tasks=4", "tokenizer.vocab_size=500", "model.dim=32", "model.max_seq_len=256", "pretrain.tokens=16384", "pretrain.optimizer=adamw", "sft.epochs=0.5", "sft.lora_rank=4",
        "reward.epochs=0.5", "reward.batch_size=8", "dpo.epochs=0.5", "dpo.batch_size=8", "ppo.updates=1", "ppo.rollouts=6", "ppo.batch_size=6", "ppo.max_new_tokens=6",
        "eval.preference_tasks=4", "eval.stories=2", "eval.max_new_tokens=8"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    "The first rows of each file in their own form, and a piece of text; a function of the folder of files."
    def write(testdata):
        folder = tmp_path_factory.mktemp("given")
        (folder / "play.txt").write_text((testdata / "pretrain/tinyshakespeare.txt").read_text(encoding="utf-8")[:120_000], encoding="utf-8")
        for name in FILES:
            rows = itertools.islice((row for _, row in read_rows(testdata / name)), 40)
            (folder / f"{name.split('/')[1].split('.')[0]}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        return sorted(str(p) for p in folder.iterdir())
    return write


def test_from_text_to_chat_on_files_of_others(given, testdata, tmp_path):
    run = tmp_path / "run"
    done = llm_course("run", "--size", "smoke", "--replace", "--data", *given(testdata), "--set", *TINY, "--out", run)
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "metrics.json").read_text())
    kept, unpaired = found["data"], [row for _, row in read_rows(run / "corpus" / "unpaired.jsonl")]
    assert kept["pairs"] > 60 and kept["conversations"] > 80 and kept["unpaired"] == len(unpaired) > 20
    assert {r["label"] for r in unpaired} == {True, False}
    assert found["sft"]["examples"] + found["sft"]["dropped"] == kept["conversations"] and found["reward"]["pairs"] + found["reward"]["too_long"] == kept["pairs"]
    assert (run / "sft" / "adapter" / "adapter_model.safetensors").exists()      # sft.lora_rank
    assert llm_course("chat", run, input="Hello\n").returncode == 0
    labelled = llm_course("run", "--size", "smoke", "--replace", "--data", *given_again(run), "--set", *TINY, "dpo.kind=kto", "dpo.beta=0", "--out", run, "--update", "--stages", "dpo")
    assert labelled.returncode == 0, labelled.stderr
    report = json.loads((run / "dpo" / "metrics.json").read_text())["dpo"]
    assert report["answers"] + report["too_long"] == 2 * kept["pairs"] + kept["unpaired"]
    logged = [json.loads(line) for line in (run / "dpo" / "log.jsonl").read_text().splitlines()]
    assert any("rewards/chosen" in r for r in logged)


def given_again(run) -> list[str]:
    "The files that a run was made from."
    return [f["path"] for f in json.loads((run / "config.json").read_text())["settings"]["data"]["files"]]
