"""Configurations that a launcher accepts, a whole chain started by one of them, and plans that keep their word."""
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from commands import ENV
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_course.cli import main
from llm_course.counting import count_parameters
from llm_course.model import ModelConfig
from llm_course.pipeline import resolve
from llm_course.scale import CARDS, SHARDED, config_path, estimate_memory, find_remedies, make_plan, plan_text, split_batch, traffic

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
TINY = ["data.people=20", "data.village_bytes=120000", "data.docs_bytes=0", "data.code_bytes=0", "data.budget_bytes=100000", "data.instructions=60", "data.pairs=40", "data.held_out=5",
        "data.tasks=4", "tokenizer.vocab_size=400", "model.dim=32", "model.max_seq_len=256", "pretrain.tokens=8192", "pretrain.optimizer=adamw", "sft.epochs=0.5", "reward.epochs=0.5", "dpo.epochs=0.5", "dpo.batch_size=8",
        "reward.batch_size=8", "ppo.updates=1", "ppo.rollouts=6", "ppo.batch_size=6", "ppo.max_new_tokens=6", "ppo.divide=true"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_accelerate_reads_the_configuration(path):
    "Its own loader takes each file, and every name inside the sections is one that the launcher knows (it would ignore another in silence)."
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    known = {action.dest for action in launch_command_parser()._actions}
    for section in ("fsdp_config", "deepspeed_config"):
        for key in getattr(config, section) or {}:
            assert key in known, f"{path.name}: {section}.{key}"
    assert config_path(path.name).read_text() == path.read_text()


def test_there_is_one_for_each_way():
    found = {p.stem: load_config_from_file(str(p)) for p in FILES}
    assert {k: (c.distributed_type.value, c.num_machines, c.use_cpu) for k, c in found.items()} == {
        "one_gpu": ("NO", 1, False), "node_ddp": ("MULTI_GPU", 1, False), "node_fsdp": ("FSDP", 1, False), "nodes_fsdp": ("FSDP", 2, False),
        "zero3": ("DEEPSPEED", 1, False), "cpu_two": ("MULTI_GPU", 1, True)}
    assert found["zero3"].deepspeed_config["zero_stage"] == 3
    for name in ("node_fsdp", "nodes_fsdp"):
        assert found[name].fsdp_config["fsdp_version"] == 2 and found[name].fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == "Block"


def environment_of(path: Path) -> dict[str, str]:
    "What `accelerate launch` would put into the environment for a configuration."
    args = launch_command_parser().parse_args(["--config_file", str(path), "-m", "x"])
    return prepare_multi_gpu_env(_validate_launch_command(args)[0])


def test_slurm_sets_what_the_launcher_would():
    launched = environment_of(CONFIGS / "nodes_fsdp.yaml")
    exported = dict(re.findall(r"\b((?:FSDP|ACCELERATE)_\w+)=(\w+)", "\n".join(line for line in (CONFIGS / "slurm.sh").read_text().splitlines() if line.startswith("export"))))
    assert len(exported) > 6 and exported == {k: launched[k] for k in exported}


@pytest.mark.parametrize("status", [0, 130, 2])
def test_slurm_script(tmp_path, status):
    "A stand-in for Slurm: two machines, two tasks each. Every process learns who it is; one that stopped with a checkpoint is queued again."
    assert subprocess.run(["bash", "-n", CONFIGS / "slurm.sh"]).returncode == 0
    fakes = {"scontrol": 'if [ "$1" = show ]; then echo first; echo second; else echo "$@" >> "$LOG.scontrol"; fi',
             "srun": 'shift 2; s=0; for i in 0 1 2 3; do SLURM_PROCID=$i SLURM_LOCALID=$((i % 2)) "$@" || s=$?; done; exit $s',
             "python": f'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $FSDP_VERSION $*" >> "$LOG"; exit {status}'}
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755 | stat.S_IXUSR)
    log = tmp_path / "log"
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(log), "SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(["bash", CONFIGS / "slurm.sh", "runs/a b", "--size", "cluster"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (0 if status == 130 else status), done.stderr
    assert log.read_text().splitlines() == [f"{i} {i % 2} 4 2 first 21234 2 -m llm_course.cli pretrain --out runs/a b --size cluster" for i in range(4)]
    assert (tmp_path / "log.scontrol").exists() == (status == 130)
    if status == 130:
        assert (tmp_path / "log.scontrol").read_text() == "requeue 41234\n"


def test_slurm_script_without_a_folder(tmp_path):
    done = subprocess.run(["bash", CONFIGS / "slurm.sh"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "usage: sbatch slurm.sh FOLDER" in done.stderr


def test_accelerate_launches_the_whole_chain(tmp_path):
    "All stages on two processes, by the configuration for a CPU: one writes, both train."
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu_two.yaml"), "--log_dir", str(tmp_path / "logs"), "--tee", "3",
               "-m", "llm_course.cli", "run", "--size", "smoke", "--set", *TINY, "--stages", "prepare,tokenizer,pretrain,sft,reward,ppo,dpo,report", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert len(list((tmp_path / "logs").rglob("stdout.log"))) == 2
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"pretrain", "sft", "reward", "ppo", "dpo"} <= metrics.keys()
    for stage in ("base", "sft", "reward", "ppo", "dpo"):
        assert (tmp_path / "run" / stage / "model.safetensors").exists(), stage
        assert done.stdout.count(f"{'pretrain' if stage == 'base' else stage}: finished") == 1
    assert not list((tmp_path / "run").glob(".*.partial"))


MEASURE = """
import json, sys, torch
sys.path.append(sys.argv[1])      # last: a file there is called encodings.py
import memory
torch.set_num_threads(1)
memory.SHAPES["here"] = (2048, dict(dim=256, n_layers=6, n_heads=4, max_seq_len=128), 8)
print(json.dumps([memory.row("here", way) for way in ("plain", "both")]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory figures of Linux")
def test_a_real_step_needs_what_was_estimated():
    "As in benchmarks/memory.py, with glibc told to give memory back."
    env = ENV | {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    done = subprocess.run([sys.executable, "-c", MEASURE, str(CONFIGS.parent / "benchmarks")], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    plain, both = json.loads(done.stdout.splitlines()[-1])
    assert all(0.75 < r["ratio"] < 1.2 for r in (plain, both)), (plain, both)
    assert both["measured"] < plain["measured"] * 0.7


COPIES = """
import json, os, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from llm_course.model import ModelConfig, Transformer
from llm_course.packing import packed_loss
from llm_course.step import recompute_activations
torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)

class Copies(TorchDispatchMode):
    "Bytes of the bf16 copies of weights (here all matrices are larger than any activation), by phase."
    phase, made = "forward", {"forward": 0, "backward": 0}
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if f is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16 and out.dim() == 2 and min(out.shape) >= 64:
            self.made[self.phase] += 2 * out.numel()
        return out

found = []
for recompute in (False, True):
    model = Transformer(ModelConfig(512, dim=64, n_layers=4, n_heads=4, max_seq_len=8))
    recompute_activations(model, recompute)
    for part in (*model.layers, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    ids = torch.randint(512, (1, 8))
    Copies.made = {"forward": 0, "backward": 0}
    with Copies() as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = packed_loss(model, {"input_ids": ids, "labels": ids, "doc_ids": torch.zeros_like(ids)})[0]
        seen.phase = "backward"
        loss.backward()
    found.append(Copies.made)
print(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def test_copies_in_bf16_outlive_a_fetched_layer():
    "Under autocast each fetched weight is turned into bf16 once in a step, and the backward pass finds the copy: all of them stand on every device, divided weights or not."
    done = subprocess.run([sys.executable, "-c", COPIES], env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    c = ModelConfig(512, dim=64, n_layers=4, n_heads=4, max_seq_len=8)
    for mode in ("single", "fsdp"):
        more = estimate_memory(c, 1, mode=mode, processes=8, bf16=True).buffers - estimate_memory(c, 1, mode=mode, processes=8).buffers
        assert json.loads(done.stdout.splitlines()[-1]) == [{"forward": more, "backward": 0}] * 2


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_fetched_weights_travel_in_float32(micro_batches):
    c = ModelConfig(512, dim=64, n_layers=4, n_heads=4, max_seq_len=8)
    n = count_parameters(c)["total"]
    assert traffic(c, "fsdp", 8, micro_batches) == {"fetch weights": micro_batches * 7 * n, "send gradients": micro_batches * 3.5 * n, "total": micro_batches * 10.5 * n}


def test_the_peak_is_that_of_the_precision_that_will_run():
    at = lambda card, *changes: make_plan(resolve("cluster", list(changes)), card)
    for card, precision, bf16, tflops in (("t4", "auto", False, 8.1), ("v100", "auto", False, 15.7), ("v100", "bf16", True, 15.7), ("a100", "auto", True, 312), ("a100", "bf16", True, 312), ("a100", "no", False, 19.5)):
        plan, word = at(card, f"pretrain.precision={precision}"), "bf16" if tflops == 312 else "float32"
        assert plan.bf16 == bf16 and f"{tflops:g} TFLOPS in {word}" in plan_text(plan)
        assert plan.seconds == pytest.approx(at("h200").seconds * 989 / tflops, rel=1e-6)


def test_pairs_where_no_single_change_is_enough():
    "In the order of their cost; and dividing weights is no advice where the trainer would refuse it."
    c = ModelConfig(32_768, dim=768, n_layers=12, n_heads=12, n_kv_heads=4, max_seq_len=2048)
    need = lambda rows, mode, recompute: estimate_memory(c, rows, None, mode, 8, True, recompute).total
    singles, pairs = [need(1, "ddp", False), need(16, "ddp", True), need(16, "fsdp", False)], [need(1, "ddp", True), need(1, "fsdp", False)]
    assert max(pairs) < min(singles)
    found = find_remedies(c, max(pairs), 8, "ddp", 16, True, False)
    assert [f.split(" (")[0] for f in found] == ["--set pretrain.micro_batch=1 pretrain.recompute=true", "--set pretrain.micro_batch=1 --mode fsdp"]
    assert len(find_remedies(c, max(pairs), 8, "ddp", 16, True, False, may_shard=False)) == 1
    three = find_remedies(c, need(1, "fsdp", True), 8, "ddp", 16, True, False)
    assert [f.split(" (")[0] for f in three] == ["--set pretrain.micro_batch=1 pretrain.recompute=true --mode fsdp"]
    odd = make_plan(resolve("cluster", ["model.dim=3072", "model.n_heads=48", "pretrain.batch_size=250"]), "rtx4090", 8)
    assert odd.remedies and "fsdp" not in " ".join(odd.remedies)


models = st.builds(lambda v, heads, width, layers, T: ModelConfig(64 * v, dim=heads * width, n_layers=layers, n_heads=heads, max_seq_len=T),
                   st.integers(1, 2000), st.integers(1, 64), st.sampled_from([32, 64, 128]), st.integers(1, 80), st.sampled_from([64, 512, 4096]))


@settings(max_examples=60, deadline=None)
@given(models, st.integers(1, 64), st.integers(1, 64), st.sampled_from(sorted(SHARDED)), st.booleans(), st.booleans())
def test_estimates_hang_together(c, batch, P, mode, bf16, recompute):
    memory = estimate_memory(c, batch, None, mode, P, bf16, recompute)
    assert all(v >= 0 for v in vars(memory).values()) and memory.total == sum(vars(memory).values())
    assert memory.weights + memory.gradients + memory.optimizer <= 16 * count_parameters(c)["total"]
    assert estimate_memory(c, batch + 1, None, mode, P, bf16, recompute).total > memory.total
    assert estimate_memory(c, batch, None, mode, P + 1, bf16, recompute).total <= memory.total
    assert estimate_memory(c, batch, None, mode, P, bf16, True).total <= estimate_memory(c, batch, None, mode, P, bf16, False).total + 3 * batch * c.max_seq_len * (4 * c.ffn_dim + 4 * c.dim)
    assert traffic(c, mode, P)["total"] <= traffic(c, mode, P + 1)["total"]


@settings(max_examples=60, deadline=None)
@given(models, st.sampled_from(sorted(CARDS)), st.sampled_from([1, 2, 8, 64]), st.integers(1, 128), st.booleans())
def test_remedies_are_true(c, card, devices, rows, recompute):
    "What a plan advises fits, and it advises something."
    usable, mode = CARDS[card].memory * 2**30, "ddp" if devices > 1 else "single"
    found, fits = find_remedies(c, usable, devices, mode, rows, True, recompute), estimate_memory(c, rows, None, mode, devices, True, recompute).total <= usable
    assert bool(found) != fits
    for text in found:
        if text.startswith("even with"):
            assert estimate_memory(c, 1, None, "fsdp" if devices > 1 else mode, devices, True, True).total > usable
            continue
        micro = int(m[1]) if (m := re.search(r"micro_batch=(\d+)", text)) else rows
        memory = estimate_memory(c, micro, None, "fsdp" if "--mode fsdp" in text else mode, devices, True, recompute or "recompute=true" in text)
        assert memory.total <= usable and f"{memory.total / 2**30:.1f} GiB" in text


@given(st.integers(1, 500), st.integers(0, 64), st.integers(1, 64))
def test_batches_are_divided_as_by_the_trainer(batch, micro, devices):
    if devices > batch:
        return
    rows, parts = split_batch(batch, micro, devices)
    share = len(range(0, batch, devices))                      # of the first process, which has the most
    assert rows * (parts - 1) < share <= rows * parts and rows <= (micro or share)


@pytest.mark.parametrize(("argv", "said"), [
    (["--gpu", "h900"], "choose one of b200"), (["--size", "giant"], "choose one of laptop"), (["--n", "2", "--mode", "magic"], "choose one of single"), (["--n", "0"], "--n from 1 to 256"),
    (["--mfu", "0"], "mfu=0"), (["--tokens", "nan"], "--tokens nan"), (["--rate", "0"], "rate=0"), (["--set", "model.dimm=3"], "did you mean model.dim"), (["--price", "-1"], "price=-1"),
    (["--n", "4", "--mode", "single"], "choose ddp or fsdp"), (["--size", "cluster", "--n", "3", "--mode", "fsdp"], "pretrain.batch_size=255"), (["--n", "3", "--mode", "zero2"], "no multiple of 3"), (["--n", "1", "--mode", "fsdp"], "several GPUs"),
    (["--gpu", "cpu", "--n", "2", "--mode", "fsdp"], "choose ddp")])
def test_plan_says_what_is_wrong(argv, said, capsys):
    assert main(["plan", *argv]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error


def test_plan_counts(capsys):
    assert main(["plan", "--size", "cluster", "--gpu", "H200", "--n", "8", "--tokens", "1e9", "--rate", "2e6", "--price", "3", "--mode", "FSDP"]) == 0
    said = capsys.readouterr().out
    assert "8 × H200, fsdp" in said and "999.8 M tokens in 1,907 steps" in said and "8.3 min" in said
    assert "cost       3.33 for 1.1 device hours at 3" in said
    assert main(["plan", "--gpu", "t4", "--set", "pretrain.micro_batch=256"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_every_card_and_size_has_a_plan():
    for size in ("laptop", "gpu", "cluster", "smoke"):
        for card in CARDS:
            for n, mode in ((1, ""), (8, ""), (8, "fsdp")):
                plan = make_plan(resolve(size), card, n, mode)
                assert plan.seconds > 0 and bool(plan.remedies) != plan.fits and plan_text(plan)


def test_settings_reach_the_trainer():
    "What a plan advises is a setting of a run."
    from llm_course.pipeline import train_config
    assert train_config(resolve("cluster", ["pretrain.recompute=true", "pretrain.micro_batch=4"]), "pretrain", 10).recompute
    assert not train_config(resolve("cluster"), "pretrain", 10).recompute
    assert "ACCELERATE_USE_CPU" not in os.environ
