"""What test_processes.py runs in real processes: `processes.py MODE[,MODE] FOLDER`, on one process or on two; writes FOLDER/MODE.json, then loses a process."""
import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from llm_course.checkpoint import checkpoint_step, checkpoints
from llm_course.hub import save_model
from llm_course.model import ModelConfig, Transformer
from llm_course.packing import packed_loss, stack_rows
from llm_course.reading import UserError
from llm_course.spikes import SpikeGuard
from llm_course.step import TrainConfig
from llm_course.trainer import Callback, Evaluate, Interrupted, Trainer, any_process, mean_loss, sample_index

STEPS, BATCH, POISONED = 6, 6, range(5, 7)      # from step 6 to 7


class Rows:
    "Rows of random tokens that remember which of them were asked for."
    def __init__(self, n=40, wild=()):
        ids = torch.randint(51, (n, 16), generator=torch.Generator().manual_seed(1))      # 51 and 40 do not divide evenly
        self.rows = [{"input_ids": r, "labels": torch.where(torch.arange(16) < i % 9, -100, r), "doc_ids": torch.zeros(16)} for i, r in enumerate(ids)]
        self.wild, self.asked = {sample_index(k, n, 0) for step in wild for k in range(step * BATCH, (step + 1) * BATCH)}, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.asked.append(i)
        return self.rows[i] | {"wild": torch.tensor(300.0 if i in self.wild else 1.0)}


def loss_fn(model, batch):
    loss, count, _ = packed_loss(model, batch)
    return loss * batch["wild"].max(), count, {"rows": torch.tensor(float(len(batch["wild"])))}


class Watch(Callback):
    "The examples that this process asked for, step by step; at step `stop` process `by` gets SIGTERM."
    def __init__(self, data, stop=0, by=1):
        self.data, self.stop, self.by, self.steps = data, stop, by, {}

    def after_step(self, trainer, record):
        self.steps[record["step"]], self.data.asked = sorted(self.data.asked), []
        if record["step"] == self.stop and trainer.accelerator.process_index == self.by:
            os.kill(os.getpid(), signal.SIGTERM)


def trainer_of(folder, data=None, callbacks=(), stop=0, by=1, model=None, **kw):
    torch.manual_seed(0)
    model = model or Transformer(ModelConfig(51, dim=32, n_layers=2, n_heads=2, max_seq_len=16))
    data = data or Rows()
    config = TrainConfig(**{"steps": STEPS, "batch_size": BATCH, "micro_batch": 2, "lr": 0.01, "log_every": 1, "checkpoint_every": 3, "keep_checkpoints": 9} | kw)
    return Trainer(model, loss_fn, data, config, stack_rows, folder, [*callbacks, Watch(data, stop, by)])


def gathered(trainer, value):
    "A value of each process, in order, on all."
    if trainer.accelerator.num_processes == 1:
        return [value]
    everyones = [None] * trainer.accelerator.num_processes
    torch.distributed.all_gather_object(everyones, value)
    return everyones


def digest(trainer):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in trainer.weights(everywhere=True).values())).hexdigest()


def told(trainer):
    "What a run did: its log, the examples of each process, its weights."
    return {"log": [{k: v for k, v in r.items() if k != "seconds"} for r in trainer.history], "asked": gathered(trainer, trainer.callbacks[-1].steps),
            "weights": gathered(trainer, digest(trainer)), "held": gathered(trainer, sum(held(p) for p in trainer.model.parameters()))}


def held(p):
    "How many numbers of a parameter this process keeps."
    return (p.to_local() if hasattr(p, "to_local") else getattr(p, "ds_tensor", p)).numel()


def run(folder, **kw):
    trainer = trainer_of(folder, **kw)
    trainer.fit()
    return trainer


def goes_on(folder, source):
    "A run that goes on from the checkpoint of step 3 of another one."
    main = int(os.environ.get("RANK", "0")) == 0
    if main and not folder.exists():
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copytree(next(c for c in checkpoints(source) if checkpoint_step(c) == 3), folder / "checkpoints" / "step_00000003")
    return told(run(folder))


def whole(out):
    "One run from beginning to end, its model folder, and what does not change by evaluating."
    data = Rows()
    trainer = run(out / "run", data=data, callbacks=[Evaluate(Rows(17), 4, 5)])
    acc, held_out = trainer.accelerator, Rows(17)
    value = mean_loss(trainer.engine.evaluated, loss_fn, held_out, stack_rows, 5, acc.process_index, acc.num_processes)
    before = digest(trainer)
    model = trainer.whole_model()
    if acc.is_main_process:
        save_model(model, out / "model")
    everyones = gathered(trainer, [value, sorted(trainer.weights()) != [], any_process(acc.process_index == 1, acc)])
    assert before == digest(trainer)
    return told(trainer) | {"values": everyones, "first_rows": [r["rows"] for r in trainer.history if "rows" in r][:3]}


def guarded(out):
    "A poisoned stretch: refused on all processes, then back to a checkpoint and past the data."
    guard = SpikeGuard(window=8, warmup=4, k=50.0, patience=2, within=5, margin=1, pass_over=1)
    trainer = run(out / "guarded", data=Rows(400, POISONED), callbacks=[guard], steps=9, checkpoint_every=2, lr=0.001)
    trainer.save_checkpoint()
    return told(trainer) | {"guards": gathered(trainer, guard.state)}


def stopped(out):
    "The second process (or the only one) is told to stop at step 4: all stop there."
    trainer = trainer_of(out / "stopped", stop=4, by=int(os.environ.get("WORLD_SIZE", "1")) - 1)
    try:
        trainer.fit()
    except Interrupted as e:
        return {"said": gathered(trainer, str(e)), "steps": gathered(trainer, trainer.n_steps), "checkpoint": checkpoint_step(checkpoints(out / "stopped")[-1])}


def refusals():
    "What the start refuses, on every process alike."
    rank, said = int(os.environ.get("RANK", "0")), {}
    for name, settings in {"data": {"data": Rows(40 + rank)}, "settings": {"lr": 0.01 + rank}, "few": {"batch_size": 1}, "odd": {"batch_size": 5}}.items():
        try:
            trainer_of(None, **settings)
            said[name] = ""
        except UserError as e:
            said[name] = str(e)
    return said


def variants(out):
    "Losses of other settings: one micro-batch, recomputed activations, Muon, bf16, a part of the weights frozen; or why they were refused."
    def losses(kw):
        try:
            return [r["loss"] for r in run(None, steps=3, **kw).history]
        except UserError as e:
            return str(e)

    torch.manual_seed(0)
    frozen = Transformer(ModelConfig(51, dim=32, n_layers=2, n_heads=2, max_seq_len=16))
    for p in frozen.layers[0].parameters():
        p.requires_grad_(False)
    chosen = {"whole": {"micro_batch": 0}, "recompute": {"recompute": True}, "muon": {"optimizer": "muon"}, "bf16": {"precision": "bf16"}, "frozen": {"model": frozen}}
    return {name: losses(kw) for name, kw in chosen.items()}


def deserted(out):
    "The last process ends without a word after step 2: what do the others do? Those that get to the end say so."
    class Leave(Callback):
        def after_step(self, trainer, record):
            if record["step"] == 2 and trainer.accelerator.process_index == trainer.accelerator.num_processes - 1:
                os._exit(9)
    run(None, callbacks=[Leave()])
    (out / "nobody noticed").touch()


def main(mode, folder, last=True):
    torch.set_num_threads(1)
    if mode.startswith("zero"):
        settings = Path(folder, f"{mode}-{os.environ['RANK']}.settings")
        settings.write_text(json.dumps({"zero_optimization": {"stage": int(mode[-1]), "stage3_param_persistence_threshold": 0}}))      # or small weights stay whole
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(settings)
    out = Path(folder) / mode
    done = {"run": whole(out), "resumed": goes_on(out / "resumed", out / "run"), "guarded": guarded(out), "stopped": stopped(out), "variants": variants(out)}
    if mode != "one":
        done["refused"] = refusals()
    for other in {"ddp": ["one"], "fsdp": ["one", "ddp"], "zero2": ["one", "ddp"], "zero3": ["fsdp", "zero2"]}.get(mode, []):
        done[f"from_{other}"] = goes_on(out / f"from_{other}", Path(folder) / other / "run")
    if int(os.environ.get("RANK", "0")) == 0:
        (Path(folder) / f"{mode}.json").write_text(json.dumps(done))
    if mode != "one" and last:
        deserted(out)


if __name__ == "__main__":
    modes = sys.argv[1].split(",")
    for mode in modes:
        main(mode, sys.argv[2], last=mode == modes[-1])
