"""Our scores against those of lm-evaluation-harness, item by item: its own code and model on one side, ours on the other, the same weights and files."""
import json
import random

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: nothing to compare with")

from lm_eval.tasks import TaskManager  # noqa: E402

from llm_course.benchmarks import blimp_suite, completion_item, completion_suite, gsm8k_suite, mmlu_suite, read_choices  # noqa: E402
from llm_course.hub import to_hf  # noqa: E402
from llm_course.lm import ModelLM, harness_model  # noqa: E402
from llm_course.model import ModelConfig, Transformer  # noqa: E402
from llm_course.reading import read_rows  # noqa: E402
from llm_course.suites import limited, run_suite  # noqa: E402
from llm_course.tokenizer import train_tokenizer  # noqa: E402
from llm_course.course import data_path
from llm_course.world import make_village, village_documents  # noqa: E402

CONTEXT = 512


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "Our model behind our interface, and the same weights behind the harness's own."
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([d["text"] for d in village_documents(make_village(), 60_000)] + ["Question: Answer: A. B. C. D. 0123456789 The following"], 600)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(len(tokenizer), dim=48, n_layers=2, n_heads=4, max_seq_len=CONTEXT)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)                          # an untrained model is indifferent: this one has opinions
    to_hf(model, folder, tokenizer)
    tokenizer.config["add_bos_token"] = False  # the harness adds no start token unless it is told to
    theirs = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=8, max_length=CONTEXT, device="cpu",
                  prefix_token_id=tokenizer.bos_id)
    return ModelLM(model, tokenizer, name="ours"), theirs


def run_theirs(model, folder, name: str, settings: dict, files: dict) -> tuple[list[dict], dict]:
    "The harness's own items of a task over local files, and its results."
    data = {split: str(path) for split, path in files.items()}
    (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": data}, **settings}))
    out = lm_eval.simple_evaluate(model=model, tasks=[name], task_manager=TaskManager(include_path=str(folder), include_defaults=False), log_samples=True,
                                  bootstrap_iters=0, verbosity="ERROR")
    return out["samples"][name], out["results"][name]


def shipped(path: str) -> dict:
    "Settings of one of the harness's own task files that hold no functions."
    import yaml
    from pathlib import Path
    whole = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / path).read_text())
    return {k: v for k, v in whole.items() if k not in ("dataset_path", "dataset_name", "task", "tag", "training_split", "validation_split", "test_split", "fewshot_split")}


def write(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


def logps(sample: dict) -> list[float]:
    return [float(r[0][0] if isinstance(r[0], (list, tuple)) else r[0]) for r in sample["resps"]]


def mmlu_both(both, tmp_path, test, dev, shots):
    ours, theirs = both
    subject = test[0]["subject"]
    samples, _ = run_theirs(theirs, tmp_path, "mmlu_local", shipped("mmlu/default/_default_template_yaml") | {"test_split": "test", "fewshot_split": "dev", "num_fewshot": shots,
                            "description": f"The following are multiple choice questions (with answers) about {subject}.\n\n"},
                            {"test": write(tmp_path / "test.json", test), "dev": write(tmp_path / "dev.json", dev)})
    mine = run_suite(ours, mmlu_suite([dict(q) for q in test], [dict(q) for q in dev], shots))["items"]
    assert len(samples) == len(mine) == len(test)
    for a, b in zip(sorted(samples, key=lambda s: s["doc_id"]), mine):
        assert a["arguments"][0][0] == b["output"]["prompt"]
        assert logps(a) == pytest.approx(b["output"]["logps"], abs=2e-3)
        assert a["acc"] == b["scores"]["acc"]


def test_mmlu_of_the_course(both, tmp_path):
    items = [q for q in read_choices(data_path("mini_mmlu.jsonl")) if q["subject"] == "nature"]
    mmlu_both(both, tmp_path, items[2:], items[:2], 2)


def test_mmlu_of_its_authors(both, tmp_path, testdata):
    folder = testdata / "eval" / "mmlu"
    mmlu_both(both, tmp_path, read_choices(folder / "test" / "human_aging_test.csv")[:25], read_choices(folder / "dev" / "human_aging_dev.csv"), 5)


@pytest.mark.parametrize("name", ["arc_easy", "piqa", "copa", "winogrande", "lambada_openai"])
def test_completions(both, tmp_path, testdata, name):
    "CORE's files through the harness as multiple choice (acc, acc_norm) or, for one ending, as likelihood (acc)."
    ours, theirs = both
    suite = limited(completion_suite(testdata / "eval" / "core" / f"{name}.jsonl"), 30)
    docs = [{"pairs": i["pairs"], "gold": i["gold"]} for i in suite.items]
    metrics = {"metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")], "test_split": "test"}
    if name == "lambada_openai":
        settings = {"output_type": "loglikelihood", "doc_to_text": "{{pairs[0][0]}}", "doc_to_target": "{{pairs[0][1]}}", "metric_list": metrics["metric_list"][:1], "test_split": "test", "target_delimiter": ""}
    elif name == "winogrande":           # several contexts, one ending: the harness takes them as choices of the context
        settings = metrics | {"output_type": "multiple_choice", "doc_to_text": "{{gold}}", "doc_to_choice": "{{[pairs[0][0], pairs[1][0]]}}", "doc_to_target": "{{pairs[0][1].strip()}}"}
    else:
        settings = metrics | {"output_type": "multiple_choice", "doc_to_text": "{{pairs[0][0]}}", "doc_to_target": "gold", "doc_to_choice": "{{pairs | map(attribute=1) | map('trim') | list}}"}
    samples, _ = run_theirs(theirs, tmp_path, name, settings, {"test": write(tmp_path / "test.json", docs)})
    mine = run_suite(ours, suite)["items"]
    for a, b in zip(sorted(samples, key=lambda s: s["doc_id"]), mine, strict=True):
        assert logps(a) == pytest.approx(b["output"]["logps"], abs=3e-3)
        assert a["acc"] == b["scores"]["acc"]
        if "acc_norm" in a and name != "winogrande":
            assert a["acc_norm"] == b["scores"]["acc_norm"]


def test_formats_as_the_harness_reads_them():
    "Rows of the data sets themselves, through the functions and templates of the harness's own tasks."
    from lm_eval.tasks.hellaswag.utils import preprocess
    from lm_eval.tasks.winogrande import preprocess_winogrande as w
    row = {"activity_label": "Cooking", "ctx_a": "A man [title] boils.", "ctx_b": "he", "endings": ["[step] eats it. [substeps] Done", "reads it."], "label": "0"}
    query = preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    assert completion_item(row)["pairs"] == [(query, " " + preprocess(e)) for e in row["endings"]]
    row = {"sentence": "Ada thanked Ben, for _ had helped.", "option1": "Ada", "option2": "Ben", "answer": "2"}
    assert completion_item(row) == {"pairs": [(c, " " + w.doc_to_target(row)) for c in w.doc_to_choice(row)], "gold": w.doc_to_text(row)}
    for goal in ("Boil an egg\n", "Boil an egg"):
        row = {"goal": goal, "sol1": "Use water.", "sol2": "Use sand.", "label": 0}
        assert completion_item(row)["pairs"][0] == (f"Question: {goal}\nAnswer:", " Use water.")


def test_minimal_pairs(both, tmp_path, testdata):
    ours, theirs = both
    suite = limited(blimp_suite(testdata / "eval" / "blimp", lead=" "), 60)
    rows = [{"sentence_good": i["good"], "sentence_bad": i["bad"]} for i in suite.items]
    samples, _ = run_theirs(theirs, tmp_path, "blimp_local", shipped("blimp/_template_yaml") | {"test_split": "test"}, {"test": write(tmp_path / "test.json", rows)})
    mine = run_suite(ours, suite)["items"]
    for a, b in zip(sorted(samples, key=lambda s: s["doc_id"]), mine, strict=True):
        assert logps(a) == pytest.approx(b["output"]["logps"], abs=2e-3)
        assert a["acc"] == b["scores"]["acc"]


def gsm8k_settings():
    return shipped("gsm8k/gsm8k.yaml") | {"test_split": "test", "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}


def test_gsm8k_prompts_and_replies(both, tmp_path):
    "Three solved problems shown, greedy replies: the same prompts, the same texts, the same verdicts."
    ours, theirs = both
    rows = [r for _, r in read_rows(data_path("mini_gsm8k.jsonl"))]
    files = {"test": write(tmp_path / "test.json", rows[3:]), "train": write(tmp_path / "train.json", rows[:3])}
    samples, _ = run_theirs(theirs, tmp_path, "gsm8k_local", gsm8k_settings() | {"num_fewshot": 3, "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False, "max_gen_toks": 24}}, files)
    mine = run_suite(ours, gsm8k_suite(files["test"], files["train"], 3, max_new_tokens=24))["items"]
    by = {(s["doc_id"], s["filter"]): s for s in samples}
    for k, item in enumerate(mine):
        assert by[k, "strict-match"]["arguments"][0][0] == item["output"]["prompt"]
        assert by[k, "strict-match"]["resps"][0][0] == item["output"]["answer"]
        assert by[k, "strict-match"]["exact_match"] == item["scores"]["strict"]
        assert by[k, "flexible-extract"]["exact_match"] == item["scores"]["flexible"]


class Replies:
    "Says what was written down for each question."
    name = "replies"

    def __init__(self, told: dict[str, str]):
        self.told = told

    def generate(self, prompts, max_new_tokens=64, stop=(), sampling=None, seed=0):
        return [self.told[p.split("Question: ")[-1].removesuffix("\nAnswer:")] for p in prompts]


def gsm8k_verdicts(tmp_path, told: list[tuple[str, str]]):
    "Both sides' verdicts on the same replies: (reply, reference answer)."
    rows = [{"question": f"{k} …?", "answer": answer} for k, (_, answer) in enumerate(told)]
    file = write(tmp_path / "test.json", rows)
    lm = Replies({r["question"]: reply for r, (reply, _) in zip(rows, told)})
    samples, _ = run_theirs(harness_model(lm), tmp_path, "gsm8k_replies", gsm8k_settings() | {"num_fewshot": 0}, {"test": file, "train": file})
    by = {(s["doc_id"], s["filter"]): s["exact_match"] for s in samples}
    mine = run_suite(lm, gsm8k_suite(file, shots=0))["items"]
    for k, item in enumerate(mine):
        assert (by[k, "strict-match"], by[k, "flexible-extract"]) == (item["scores"]["strict"], item["scores"]["flexible"]), told[k][0]
    return mine


def test_gsm8k_verdicts_on_odd_replies(tmp_path):
    odd = ["#### 18", "#### 18.", "#### $18", "#### 1,8", "The answer is 18.", "It is $18.00.", "18...", "i.e., A", "", "#### -18", "so -18", "####18", "#### 18 #### 19", "18%", "x = .5", "1 800", "#### 18.0", "Answer: 18,"]
    rng = random.Random(0)
    made = ["".join(rng.choice(["#### ", "18", "$", ",", ".", "-", "a", " ", "\n", "7"]) for _ in range(8)) for _ in range(200)]
    graded = gsm8k_verdicts(tmp_path, [(reply, "9 + 9 = 18\n#### 18") for reply in odd + made])
    assert 5 < sum(g["scores"]["flexible"] for g in graded) < len(graded) - 5


def test_gsm8k_verdicts_on_real_replies(tmp_path, testdata):
    "Solutions of four models with OpenAI's verdicts; their `A: 18` is written as `#### 18` for every second one, so that the strict rule has work."
    told, verdicts = [], []
    for k, (_, row) in enumerate(read_rows(testdata / "eval" / "gsm8k" / "example_model_solutions_a.jsonl")):
        for model, out in row.items():
            if isinstance(out, dict):
                told.append((out["solution"].replace("A: ", "#### ") if k % 2 else out["solution"], row["ground_truth"].replace("A: ", "#### ")))
                verdicts.append(out["is_correct"])
    graded = gsm8k_verdicts(tmp_path, told)
    wrong = [k for k, (g, v) in enumerate(zip(graded, verdicts)) if g["scores"]["careful"] != float(v)]
    assert len(graded) == 1400 and not wrong


def test_rolling_perplexity(both, tmp_path):
    ours, theirs = both
    texts = [d["text"] for d in village_documents(make_village(), 40_000, seed=5)][:6]
    texts.append(" ".join(texts) * 2)                     # longer than the context
    samples, results = run_theirs(theirs, tmp_path, "rolling", {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}", "test_split": "test",
                                  "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")]}, {"test": write(tmp_path / "test.json", [{"text": t} for t in texts])})
    from llm_course.lm import text_bits
    mine = ours.loglikelihood_rolling(texts)
    theirs_each = [float(s["resps"][0][0] if isinstance(s["resps"][0], (list, tuple)) else s["resps"][0]) for s in sorted(samples, key=lambda s: s["doc_id"])]
    assert theirs_each == pytest.approx(mine, rel=1e-4)
    found = text_bits(mine, texts)
    assert results["bits_per_byte,none"] == pytest.approx(found["value"], rel=1e-4) and results["byte_perplexity,none"] == pytest.approx(found["byte_perplexity"], rel=1e-4)
    assert results["word_perplexity,none"] == pytest.approx(found["word_perplexity"], rel=1e-2)      # the harness splits words at each white space, also at two in a row
