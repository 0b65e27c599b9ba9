"""One trainer on one process, on two with DDP, FSDP2, DeepSpeed's ZeRO-2 and ZeRO-3: the same losses, the same decisions, checkpoints that fit all of them."""
import json
import math
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from commands import as_launched
from llm_course.checkpoint import checkpoints
from llm_course.hub import load_model
from llm_course.reading import UserError
from llm_course.step import TrainConfig, learning_rate
from llm_course.trainer import make_accelerator
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("processes.py")
ON_CPU = {"ACCELERATE_USE_CPU": "yes"}
LAUNCHES = {"one": ON_CPU, "ddp": ON_CPU, "fsdp": ON_CPU | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "LLM_COURSE_SHARD_ON_CPU": "1"},
            "zero2,zero3": {"ACCELERATE_USE_DEEPSPEED": "true"}}
if find_spec("deepspeed") is None or torch.cuda.is_available():      # with GPUs about, DeepSpeed would take them
    del LAUNCHES["zero2,zero3"]


class Ran(dict):
    "What each mode did; a test of one that could not run here is skipped."
    def __missing__(self, mode):
        pytest.skip("DeepSpeed is not installed here" if mode.startswith("zero") else f"{mode} did not run")


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Ran:
    "What each mode did; the exit codes, and the seconds that the others needed after one process had gone."
    folder, results = tmp_path_factory.mktemp("processes"), Ran()
    for modes in LAUNCHES:
        processes, said, gone = as_launched(1 if modes == "one" else 2, PROGRAM, modes, folder, **LAUNCHES[modes]), "", None
        try:
            if modes != "one":
                processes[-1].wait(timeout=300)
                gone = time.monotonic()
            said = processes[0].communicate(timeout=300 if modes == "one" else 60)[0]
        finally:
            for p in processes:
                p.kill()
        for mode in modes.split(","):
            assert (folder / f"{mode}.json").exists(), said[-3000:]
            results[mode] = json.loads((folder / f"{mode}.json").read_text())
            results[mode] |= {"codes": [p.wait() for p in processes], "after": gone and time.monotonic() - gone, "folder": folder / mode, "said": said}
    return results


def curve(did: dict, key: str = "loss") -> dict[int, float]:
    return {r["step"]: r[key] for r in did["log"] if key in r}


def gap(a: dict[int, float], b: dict[int, float]) -> float:
    assert a.keys() & b.keys() and (a.keys() <= b.keys() or b.keys() <= a.keys())
    return max(abs(a[k] - b[k]) for k in a.keys() & b.keys())


TWO = ("ddp", "fsdp", "zero2", "zero3")
MODES = ("one", *TWO)


@pytest.mark.parametrize("mode", MODES)
def test_the_modes_are_what_they_say(ran, mode):
    "Each process keeps all weights, or half of them and some filling."
    whole, held = ran["one"]["run"]["held"][0], ran[mode]["run"]["held"]
    assert all(abs(h / whole - 0.5) < 0.02 for h in held) and sum(held) >= whole if mode in ("fsdp", "zero3") else set(held) == {whole}


@pytest.mark.parametrize("mode", TWO)
def test_two_processes_have_the_losses_of_one(ran, mode):
    one, two = ran["one"]["run"], ran[mode]["run"]
    for key, most in (("loss", 1e-6), ("grad_norm", 1e-5), ("val_loss", 1e-6)):
        assert gap(curve(one, key), curve(two, key)) < most, key
    assert curve(one, "tokens") == curve(two, "tokens") and curve(one, "rows") == curve(two, "rows")      # metrics are sums over all processes


@pytest.mark.parametrize("mode", TWO[1:])
def test_divided_equals_replicated(ran, mode):
    assert gap(curve(ran["ddp"]["run"]), curve(ran[mode]["run"])) < 1e-6


def test_the_learning_rate_does_not_know_the_number_of_processes(ran):
    c = TrainConfig(steps=len(curve(ran["one"]["run"])), lr=0.01)
    for mode in MODES:
        assert list(curve(ran[mode]["run"], "lr").values()) == [learning_rate(n, c) for n in range(c.steps)]


@pytest.mark.parametrize("mode", TWO)
def test_every_example_goes_to_one_process(ran, mode):
    one, two = ran["one"]["run"]["asked"][0], ran[mode]["run"]["asked"]
    for step, examples in one.items():
        assert sorted(two[0][step] + two[1][step]) == examples and abs(len(two[0][step]) - len(two[1][step])) <= 1


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_ends_in_the_same_bits(ran, mode):
    whole, resumed = ran[mode]["run"], ran[mode]["resumed"]
    assert resumed["weights"] == whole["weights"] and len(set(whole["weights"])) == 1
    assert gap(curve(whole), curve(resumed)) == 0 and min(curve(resumed)) == 4


@pytest.mark.parametrize("mode, source", [("ddp", "one"), ("fsdp", "one"), ("fsdp", "ddp"), ("one", "ddp"), ("one", "fsdp"), ("zero2", "one"), ("zero2", "ddp"),
                                          ("zero3", "fsdp"), ("zero3", "zero2"), ("one", "zero2"), ("one", "zero3")])
def test_a_checkpoint_fits_any_number_of_processes(ran, mode, source):
    "From one process to two, from two to one, from replicated to sharded and back: the same examples, the same losses."
    if mode == "one":      # in this process
        import processes
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        went_on = processes.goes_on(ran["one"]["folder"].parent / f"one_from_{source}", ran[source]["folder"] / "run")
        torch.set_num_threads(before)
    else:
        went_on = ran[mode][f"from_{source}"]
    assert gap(curve(ran[source]["run"]), curve(went_on)) < 1e-5 and min(curve(went_on)) == 4
    together = lambda did: [sorted(sum((p[str(s)] if str(s) in p else p[s] for p in did["asked"]), [])) for s in sorted(curve(went_on))]
    assert together(went_on) == together(ran["one"]["run"])


@pytest.mark.parametrize("mode", MODES)
def test_the_model_folder_is_one_piece(ran, mode):
    "Of a sharded model, too: it loads as any other, and gives the same logits."
    model, reference = load_model(ran[mode]["folder"] / "model"), load_model(ran["one"]["folder"] / "model")
    ids = torch.randint(51, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (model(ids) - reference(ids)).abs().max() < (1e-5 if mode != "one" else 1e-12)
    assert [p.name for p in (ran[mode]["folder"] / "model").glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("mode", TWO)
def test_a_poisoned_batch_is_refused_by_all(ran, mode):
    "Skipped at the same steps on both processes, rolled back, and at the end the weights of one process."
    one, two = ran["one"]["guarded"], ran[mode]["guarded"]
    assert two["guards"][0] == two["guards"][1]
    found = [{k: v for k, v in e.items() if k != "refused"} | {"steps": [step for step, _ in e["refused"]]} for e in two["guards"][0]["events"]]
    assert found == [{"step": 4, "event": "rolled back", "from_step": 7, "to_step": 4, "samples": 48, "steps": [6, 7]}]
    assert [e["to_step"] for e in one["guards"][0]["events"]] == [4] and gap(curve(one), curve(two)) < 1e-5
    a, b = (load_file(checkpoints(ran[m]["folder"] / "guarded")[-1] / "model.safetensors") for m in ("one", mode))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max() for k in a) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_a_signal_to_one_process_stops_all(ran, mode):
    stopped = ran[mode]["stopped"]
    assert set(stopped["steps"]) == {4} and stopped["checkpoint"] == 4 and len(set(stopped["said"])) == 1 and "stopped at step 4 of 6" in stopped["said"][0]


@pytest.mark.parametrize("mode", TWO)
def test_other_settings(ran, mode):
    for name, most in (("whole", 1e-6), ("recompute", 1e-6), ("frozen", 1e-6), ("muon", 2e-4), ("bf16", 5e-3)):      # Muon computes in bf16 inside
        one, two = ran["one"]["variants"][name], ran[mode]["variants"][name]
        if name == "muon" and mode.startswith("zero"):
            assert "flat vectors" in two and "adamw" in two
            continue
        assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < most, name


@pytest.mark.parametrize("mode", TWO)
def test_evaluation_and_agreement(ran, mode):
    "Both get the same held-out loss and the same answer; the main process alone gets the weights, the model is unchanged by being read."
    (a, main, yes), (b, other, also) = ran[mode]["run"]["values"]
    assert a == b and math.isclose(a, ran["one"]["run"]["values"][0][0], abs_tol=1e-6) and yes and also
    assert main and not other


@pytest.mark.parametrize("mode", TWO)
def test_what_the_start_refuses(ran, mode):
    said = ran[mode]["refused"]
    assert "number of examples" in said["data"] and "settings" in said["settings"] and "set batch_size to 2" in said["few"]
    assert ("no multiple of the 2 processes" in said["odd"]) == (mode != "ddp")


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "zero3"])
def test_a_process_that_dies_ends_the_others(ran, mode):
    "No launcher is there to kill them: the next message that does not come does."
    assert ran[mode]["codes"][1] == 9 and ran[mode]["codes"][0] not in (0, None) and ran[mode]["after"] < 60
    assert not (ran[mode]["folder"] / "nobody noticed").exists()
    assert "another process" in ran[mode]["said"], ran[mode]["said"][-2000:]


def test_a_launch_that_is_not_whole(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="2 processes.*torchrun"):
        make_accelerator()


def test_sharding_that_would_not_happen(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "yes")
    if torch.cuda.is_available():
        pytest.skip("accelerate may shard here")
    with pytest.raises(UserError, match="FSDP was asked for.*LLM_COURSE_SHARD_ON_CPU"):
        make_accelerator()
