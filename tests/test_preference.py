"""Preference training: real files through the stage, KTO on several processes and after a kill, any pairs packed or padded."""
import copy
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from commands import as_launched, wait_for
from pairs import assert_same_end
from hypothesis import given, settings
from hypothesis import strategies as st

import preference_program
from llm_course.formats import pair_to_kto, ranked_pairs, to_kto, to_pair
from llm_course.model import ModelConfig, Transformer
from llm_course.preference import add_mismatched, add_reference, batch_logps, kto_weights, preference_batch, preference_loss, train_preference, unpaired_examples
from llm_course.preference_study import flip_labels
from llm_course.reading import DataError, UserError, read_rows
from llm_course.reward import pair_examples
from llm_course.step import TrainConfig
from llm_course.tasks import IGNORE
from llm_course.tokenizer import train_tokenizer
from llm_course.trainer import Callback, Interrupted, seed_all

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LLM_COURSE_TESTDATA", ROOT.parent / "shared" / "data"))
fuzz = settings(max_examples=25, deadline=None, derandomize=True)


def tiny(vocab: int = 50, **kw) -> Transformer:
    seed_all(0)
    return Transformer(ModelConfig(vocab, **({"dim": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 48} | kw))).eval()


ANSWERS = st.lists(st.integers(3, 49), min_size=1, max_size=12)
PAIRS = st.lists(st.tuples(st.lists(st.integers(3, 49), min_size=1, max_size=20), ANSWERS, ANSWERS), min_size=2, max_size=7)


def examples_of(pairs) -> list[dict]:
    sides = lambda p, a: (p + a, [IGNORE] * len(p) + a)
    return [dict(zip(("chosen_ids", "chosen_labels", "rejected_ids", "rejected_labels"), (*sides(p, a), *sides(p, b)))) for p, a, b in pairs]


@fuzz
@given(PAIRS, st.sampled_from([32, 40, 48]), st.sampled_from(["rope", "learned"]))
def test_packed_pairs_equal_padded_ones(pairs, room, positions):
    model, examples = tiny(positions=positions), examples_of(pairs)
    padded, packed = preference_batch(examples, 0), preference_batch(examples, 0, room)
    assert packed["input_ids"].shape[1] == room and packed["counts"].tolist() == padded["counts"].tolist()
    with torch.no_grad():
        a, b = batch_logps(model, padded), batch_logps(model, packed)
        alone = torch.cat([batch_logps(model, preference_batch([e], 0))[i:i + 1] for i in (0, 1) for e in examples])
    assert float((a - b).abs().max()) < 1e-5 * max(1.0, float(a.abs().max())) * 10
    assert float((a - alone).abs().max()) < 1e-4
    with_ref = [e | {"ref_chosen": -1.0, "ref_rejected": -2.0} for e in examples]
    for kind in ("dpo", "ipo", "orpo", "kto"):
        for prompts in (False, True):
            losses = [preference_loss(model, preference_batch(with_ref, 0, r), kind, prompt_loss=prompts)[0].item() for r in (0, room)]
            assert abs(losses[0] - losses[1]) < 1e-3 * max(1.0, abs(losses[0])), (kind, losses)


@fuzz
@given(PAIRS, st.integers(4, 40), st.integers(0, 3))
def test_mismatched_answers_are_those_of_other_prompts(pairs, max_len, seed):
    examples = examples_of(pairs)
    if len({tuple(p) for p, _, _ in pairs}) < 2:
        with pytest.raises(UserError, match="all prompts are the same"):
            add_mismatched(examples, max_len, seed)
        return
    for (prompt, *_), e in zip(pairs, add_mismatched(examples, max_len, seed)):
        others = [a for p, *answers in pairs for a in answers if p != prompt]
        for side in ("chosen", "rejected"):
            ids, labels = e[f"{side}_kl_ids"], e[f"{side}_kl_labels"]
            assert len(ids) == len(labels) <= max_len and ids[:len(prompt)] == prompt[:max_len]
            assert any((prompt + a)[:max_len] == ids for a in others)
            assert labels == ([IGNORE] * len(prompt) + ids[len(prompt):])[:max_len]


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.floats(0.5, 2))
def test_weights_balance(good, bad, ratio):
    weights = kto_weights(good, bad, ratio)
    assert min(weights) == 1 and abs(weights[0] * good / (weights[1] * bad) / ratio - 1) < 1e-9


@given(st.floats(0, 1), st.integers(0, 5))
def test_flipped_labels(share, seed):
    examples = [{"chosen_ids": [i], "rejected_ids": [-i - 1], "ref_chosen": float(i), "ref_rejected": -1.0 - i} for i in range(40)]
    flipped = flip_labels(examples, share, seed)
    assert sum(a != b for a, b in zip(examples, flipped)) == round(share * 40)
    assert all(e["chosen_ids"] == [int(e["ref_chosen"])] for e in flipped) and flip_labels(flipped, share, seed) == examples


def test_the_reference_once_equals_the_reference_live():
    model = tiny()
    examples = examples_of([([5, 6, i], [7, i + 3], [8, 9, 10, i]) for i in range(3, 40)])
    done = add_reference(model, examples, 0, batch_size=len(examples))
    batch = preference_batch(sorted(done, key=lambda e: max(len(e["chosen_ids"]), len(e["rejected_ids"]))), 0)
    with torch.no_grad():
        assert torch.equal(batch_logps(model, batch), batch["ref_logps"])      # the same batch: to the last bit
    loss, n, metrics = preference_loss(model, batch, "dpo")
    assert abs(loss.item() / n - 0.6931471805599453) < 1e-6 and float(metrics["rewards/margins"]) == 0


FILES = {"hh_harmless-base_test.jsonl.gz": "preference", "dpo_en_demo.json": "preference", "kto_en_demo.json": "kto", "rasbt_instruction-data-with-preference.json": "preference"}


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_real_files_go_through_the_stage(name, kind):
    path = DATA / "pref" / name
    if not path.exists():
        pytest.skip(f"no {path.name}: set LLM_COURSE_TESTDATA to the folder of test data")
    if FILES[name] == "kto" and kind != "kto":
        pytest.skip("single answers have no pairs")
    rows = []
    for _, row in read_rows(path):
        try:
            rows.append(to_kto(row) if FILES[name] == "kto" else to_pair(row))
        except DataError:
            continue
        if len(rows) == 60:
            break
    through_the_stage(rows, kind, FILES[name] == "kto")


def through_the_stage(rows: list[dict], kind: str, single: bool):
    sides = ("completion",) if single else ("chosen", "rejected")
    tokenizer = train_tokenizer([m["content"] for r in rows for s in ("prompt", *sides) for m in r[s]], 600)
    examples, report = (unpaired_examples if single else pair_examples)(rows, tokenizer, 1024)
    assert len(examples) + report["too_long"] == len(rows) and len(examples) >= 8
    model = tiny(len(tokenizer), max_seq_len=1024)
    history = train_preference(model, examples, TrainConfig(steps=3, batch_size=6, lr=1e-3, log_every=1), tokenizer, reference=copy.deepcopy(model), kind=kind).history
    assert abs(history[0]["loss"] - {"dpo": 0.6931, "kto": 0.5}[kind]) < 2e-2
    assert all(torch.isfinite(torch.tensor(r["loss"])) and not r.get("skipped") for r in history)
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"} <= history[0].keys()


@pytest.mark.parametrize("kind", ["simpo", "kto"])
def test_ranked_rows_go_through_the_stage(kind):
    "As UltraFeedback has them: four answers to an instruction, with ratings."
    rows = [{"instruction": f"Name the town number {i}.", "completions": [{"response": f"Town {i} is {'very ' * k}far away.", "overall_score": float(k)} for k in range(4)]} for i in range(12)]
    pairs = [ranked_pairs(row)[0] for row in rows]
    if kind == "kto":
        return through_the_stage([k for p in pairs for k in pair_to_kto(p)], kind, single=True)
    tokenizer = train_tokenizer([m["content"] for p in pairs for s in ("prompt", "chosen", "rejected") for m in p[s]], 400)
    examples, _ = pair_examples(pairs, tokenizer, 128)
    history = train_preference(tiny(len(tokenizer), max_seq_len=128), examples, TrainConfig(steps=6, batch_size=6, lr=3e-3, log_every=1), tokenizer, kind="simpo").history
    assert history[-1]["rewards/margins"] > history[0]["rewards/margins"]


class StopAt(Callback):
    def __init__(self, step: int):
        self.step = step

    def after_step(self, trainer, record):
        if trainer.n_steps == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("kind", ["kto", "dpo"])
def test_resume_is_exact(tmp_path, kind):
    "A method with a batch statistic goes on after a stop as if there had been none."
    tokenizer, start, single, pairs = preference_program.material()
    train = lambda model, folder, *callbacks: train_preference(model, single if kind == "kto" else pairs, preference_program.config(steps=6, checkpoint_every=100), tokenizer, folder,
                                                               callbacks, reference=start, kind=kind)
    whole, parted = copy.deepcopy(start), copy.deepcopy(start)
    straight = train(whole, tmp_path / "a").history
    with pytest.raises(Interrupted):
        train(parted, tmp_path / "b", StopAt(3))
    parted = copy.deepcopy(start)
    resumed = train(parted, tmp_path / "b").history
    without = lambda records: [{k: v for k, v in r.items() if k != "seconds"} for r in records]
    assert without(straight) == without(resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parted.state_dict().values()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    "What one process wrote, and what two wrote."
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    preference_program.train_all(one)
    wait_for(as_launched(2, Path(preference_program.__file__), two, ACCELERATE_USE_CPU="yes"))
    return one, two


@pytest.mark.parametrize("arm", preference_program.ARMS)
def test_two_processes_end_where_one_ends(folders, arm):
    assert_same_end(folders, arm)
    if arm == "kto single":
        assert max(r["kl"] for r in json.loads((folders[0] / "curves.json").read_text())[arm]) > 0      # the estimate was at work
