"""The trainer on one process: what may be asked of its pieces whatever comes in, and old checkpoints."""
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_course.checkpoint import CheckpointWriter, checkpoints
from llm_course.lora import add_lora
from llm_course.model import ModelConfig, Transformer
from llm_course.packing import packed_loss, stack_rows
from llm_course.reading import UserError
from llm_course.step import TrainConfig, make_optimizer
from llm_course.trainer import (Callback, Trainer, blank_copy, load_optimizer_state, load_weights, mean_loss, micro_batches,
                                named_optimizer_state, sample_index, whole_tensors)
from safetensors.torch import load_file

IDS = torch.randint(40, (24, 12), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": r, "labels": torch.where(torch.arange(12) < i % 5, -100, r), "doc_ids": torch.arange(12) // 6} for i, r in enumerate(IDS)]


def small(seed=0, **kw):
    torch.manual_seed(seed)
    return Transformer(ModelConfig(40, dim=16, n_layers=2, n_heads=2, max_seq_len=12, **kw))


def trainer_of(folder=None, callbacks=(), model=None, **kw):
    config = TrainConfig(**{"steps": 6, "batch_size": 4, "lr": 0.01, "log_every": 1, "checkpoint_every": 3, "keep_checkpoints": 9} | kw)
    return Trainer(model or small(), packed_loss, ROWS, config, stack_rows, folder, callbacks)


def losses(trainer):
    return {r["step"]: r["loss"] for r in trainer.history if "loss" in r}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 7))
def test_shares_are_a_partition(n, processes, size):
    "Every example goes to exactly one process, shares differ by one at most, no piece is larger than asked for; or it is refused."
    if n < processes:
        with pytest.raises(UserError, match=f"{processes} or more"):
            micro_batches(range(n), 0, processes, size)
        return
    shares = [micro_batches(range(n), r, processes, size) for r in range(processes)]
    flat = [sum(s, []) for s in shares]
    assert sorted(sum(flat, [])) == list(range(n)) and max(map(len, flat)) - min(map(len, flat)) <= 1
    assert all(p and (not size or len(p) <= size) for s in shares for p in s)


def test_a_checkpoint_with_numbered_state_is_read(tmp_path):
    "As they were written before state had names."
    whole = trainer_of(tmp_path / "whole")
    whole.fit()
    source = next(c for c in checkpoints(tmp_path / "whole") if c.name.endswith("3"))
    optimizer = load_file(source / "optimizer.safetensors")
    order = [n for n, p in small().named_parameters() if p.ndim > 1] + [n for n, p in small().named_parameters() if p.ndim <= 1]      # decay_groups
    numbered = {f"{order.index(k.rsplit('.', 1)[0])}.{k.rsplit('.', 1)[1]}": v for k, v in optimizer.items()}
    CheckpointWriter(tmp_path / "old").save(3, {"model": load_file(source / "model.safetensors"), "optimizer": numbered},
                                            json.loads((source / "state.json").read_text()))
    old = trainer_of(tmp_path / "old")
    old.fit()
    assert losses(old) == {k: v for k, v in losses(whole).items() if k > 3}
    assert all(torch.equal(v, old.weights()[k]) for k, v in whole.weights().items())


@pytest.mark.parametrize("settings", [{"optimizer": "muon"}, {"recompute": True}, {"precision": "bf16"}, {"micro_batch": 1}])
def test_resumed_with_other_settings(tmp_path, settings):
    "An interrupted run equals the whole one: two optimizers in one, recomputed activations, bf16, many micro-batches."
    class Fall(Callback):
        def after_step(self, trainer, record):
            if record["step"] == 4:
                raise KeyError("killed")
    whole = trainer_of(**settings)
    whole.fit()
    with pytest.raises(KeyError):
        trainer_of(tmp_path, [Fall()], **settings).fit()
    again = trainer_of(tmp_path, model=small(1), **settings)
    again.fit()
    assert losses(again) == losses(whole) and all(torch.equal(v, again.weights()[k]) for k, v in whole.weights().items())


def test_frozen_weights(tmp_path):
    "Only what is trained has state; the rest is in the checkpoint all the same."
    adapted = lambda: add_lora(small(), rank=2)
    torch.manual_seed(3)
    whole = trainer_of(tmp_path, model=adapted())
    whole.fit()
    state = load_file(checkpoints(tmp_path)[0] / "optimizer.safetensors")
    assert state and all("lora_" in name for name in state)
    assert set(load_file(checkpoints(tmp_path)[0] / "model.safetensors")) == set(whole.model.state_dict())


def test_other_parameters_than_the_checkpoint_has(tmp_path):
    trainer_of(tmp_path).fit()
    with pytest.raises((UserError, RuntimeError), match="lora_A|not trained here|Missing key"):
        trainer_of(tmp_path, model=add_lora(small(), rank=2)).fit()
    model = small()
    optimizer = make_optimizer(model, TrainConfig(1))
    with pytest.raises(UserError, match="'layers.9.x', which is not trained here"):
        load_optimizer_state(model, optimizer, {"layers.9.x.exp_avg": torch.zeros(1)})


def test_state_by_name_fits_other_groups():
    "Muon's two optimizers, and AdamW on one group: the numbers differ, the names do not."
    model = small()
    one = torch.optim.AdamW(model.parameters())
    packed_loss(model, stack_rows(ROWS[:4]))[0].backward()
    one.step()
    named = whole_tensors(named_optimizer_state(model, one))
    two = torch.optim.AdamW([{"params": [p], "weight_decay": 0.0} for p in reversed(list(model.parameters()))])
    load_optimizer_state(model, two, named)
    again = named_optimizer_state(model, two)
    assert again.keys() == named.keys() and all(torch.equal(again[k], v) for k, v in named.items())


def test_one_objection_is_enough():
    "All callbacks are asked, and one no keeps the weights."
    class Vote(Callback):
        def __init__(self, allow): self.allow, self.asked = allow, 0
        def allow_update(self, trainer, record):
            self.asked += 1
            return self.allow(record["step"])
    votes = [Vote(lambda step: step != 2), Vote(lambda step: True)]
    before, trainer = {}, trainer_of(callbacks=votes, steps=3)
    for step in (1, 2, 3):
        before[step] = trainer.weights()
        record = trainer.step()
        changed = any(not torch.equal(v, trainer.weights()[k]) for k, v in before[step].items())
        assert changed == (step != 2) and bool(record.get("skipped")) == (step == 2)
    assert [v.asked for v in votes] == [3, 3]


@pytest.mark.parametrize("n, batch_size, processes", [(24, 5, 2), (24, 24, 3), (7, 2, 4), (1, 5, 2)])
def test_held_out_data_is_dealt_out(monkeypatch, n, batch_size, processes):
    "The sums of all processes make the mean of one; each makes as many passes."
    model, rows, sums, passes = small(), ROWS[:n], [], []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda both: sums.append(both.clone()))
    def counting(m, batch):
        passes[-1] += 1
        return packed_loss(m, batch)
    for rank in range(processes):
        passes.append(0)
        mean_loss(model, counting, rows, stack_rows, batch_size, rank, processes)
    total, count = sum(sums).tolist()
    assert len(set(passes)) == 1 and abs(total / count - mean_loss(model, packed_loss, rows, stack_rows, batch_size)) < 1e-6


def test_a_mould_takes_no_memory():
    model = small(tie_embeddings=False, positions="learned")
    mould = blank_copy(model)
    assert all(p.is_meta for p in mould.parameters()) and [n for n, _ in mould.named_parameters()] == [n for n, _ in model.named_parameters()]
    mould.load_state_dict(whole_tensors(model.state_dict()), assign=True)
    assert torch.equal(mould(IDS[:2]), model(IDS[:2])) and next(model.parameters()).device.type == "cpu"


def test_weights_of_another_shape_are_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_weights(small(), whole_tensors(small(tie_embeddings=True).state_dict()) | {"embed_tokens.weight": torch.zeros(3, 3)})


def test_the_numbers_of_a_run_depend_on_the_step_only():
    "Random numbers of step n are those of step n, whatever came before."
    seen = {}
    def loss(model, batch):
        seen.setdefault(trainer.n_steps, []).append(torch.rand(()).item())
        return packed_loss(model, batch)
    for warm in (0, 3):
        trainer = Trainer(small(), loss, ROWS, TrainConfig(steps=5, batch_size=4), stack_rows)
        trainer.n_steps = warm
        torch.rand(warm)
        while trainer.n_steps < 5:
            trainer.step()
    assert all(len(set(v)) == 1 for v in seen.values()) and len({v[0] for v in seen.values()}) == 5
    assert sample_index(30, 24, 0) == sample_index(30, 24, 0)
