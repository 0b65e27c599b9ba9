"""Checkpoints in real processes that are killed: a tiny model, a server that forks one process for each life, so that a life costs a fraction of a second."""
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from commands import ENV
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_course import checkpoint
from llm_course.checkpoint import (COMMIT, CheckpointWriter, checkpoint_fault, checkpoint_step, checkpoints, commit, discard, newest_checkpoint, recover,
                                   resume_changes, resume_state, run_lock)
from llm_course.reading import UserError
from llm_course.step import TrainConfig
from llm_course.trainer import Callback, Trainer, seed_all

STEPS, EVERY, KILLS = 72, 3, 22          # 50 examples in batches of 8: an epoch ends in step 7, 13, 19, 25 …


class Then(Callback):
    "Calls `act(trainer)` after step `n`."
    def __init__(self, n, act):
        self.n, self.act = n, act

    def after_step(self, trainer, record):
        if record["step"] == self.n:
            self.act(trainer)


def make(folder, callbacks=(), slow=0.0, die_in=0, n_data=50, **kw):
    "A trainer with dropout and uneven accumulation; `die_in`: kill the process in that call of the loss function."
    data, calls = list(torch.randn(n_data, 4, generator=torch.Generator().manual_seed(1))), []

    def loss(model, batch):
        error = model(batch["x"]) - batch["x"].sum(1, keepdim=True)
        calls.append(time.sleep(slow))
        if len(calls) == die_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return error.square().sum(), len(error), {}

    seed_all(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.3), torch.nn.Linear(64, 1))
    config = TrainConfig(**{"steps": STEPS, "batch_size": 8, "micro_batch": 3, "lr": 0.01, "log_every": 1, "checkpoint_every": EVERY} | kw)
    return Trainer(model, loss, data, config, lambda rows: {"x": torch.stack(rows)}, folder, callbacks)


def digest(trainer) -> str:
    "SHA-256 of weights and optimizer."
    state = trainer.optimizer.state_dict()["state"]
    tensors = [*trainer.model.state_dict().values(), *(torch.as_tensor(v) for i in sorted(state) for _, v in sorted(state[i].items()))]
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def log_of(folder) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def leftovers(folder) -> list[str]:
    return sorted(p.name for p in (Path(folder) / "checkpoints").glob(".step_*"))


# ---- what a forked process does

def life(folder, background=False, drag=0.0, limit=0, kill_after=0, hang_after=0, **kw):
    "One life of a run. `drag`: seconds by which each operation of a save is slowed; `limit`: bytes a file may have from step 10 on."
    if drag:
        for where, name in ((checkpoint, "write_tensors"), (checkpoint, "_flush"), (checkpoint.os, "replace"), (checkpoint.shutil, "rmtree")):
            setattr(where, name, dragged(getattr(where, name), drag, Path(folder) / f"{name}.calls"))
    callbacks = [Then(10, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))] if limit else []
    callbacks += [Then(kill_after, lambda _: os.kill(os.getpid(), signal.SIGKILL))] if kill_after else []
    callbacks += [Then(hang_after, lambda _: time.sleep(300))] if hang_after else []
    trainer = make(folder, callbacks, **kw)
    trainer.writer.background = background
    trainer.fit()
    (Path(folder) / "end").write_text(digest(trainer))


def dragged(f, seconds, calls):
    "`f`, slower, and a file that grows by a byte with each call."
    def slow(*args, **kw):
        with open(calls, "ab") as file:
            file.write(b".")
        time.sleep(seconds)
        return f(*args, **kw)
    return slow


def replace_and_die(folder, at):
    "Write step 3 anew over an older one, retire step 1, and be killed before operation number `at` on the disk."
    left = [at]

    def deadly(f):
        def run(*args, **kw):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return f(*args, **kw)
        return run

    for where, name in ((checkpoint, "write_tensors"), (checkpoint, "_flush"), (checkpoint.os, "replace"), (checkpoint.os, "unlink"), (checkpoint.os, "rmdir")):
        setattr(where, name, deadly(getattr(where, name)))
    CheckpointWriter(folder, keep=2).save(3, {"model": {"w": torch.ones(9)}}, {"new": True})


def serve():
    "Fork a process for each line of the standard input, say its number, and when it has ended its status."
    with tempfile.TemporaryDirectory() as warm:      # what is loaded at first use is loaded once, here
        make(warm, steps=4).fit()
    for line in sys.stdin:
        job = json.loads(line)
        if not (pid := os.fork()):
            os.dup2(os.open(job.pop("errors"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os._exit(status_of(globals()[job.pop("do")], job))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def status_of(work, settings) -> int:
    "What the command line would exit with."
    try:
        work(**settings)
        return 0
    except UserError as e:
        print(e, file=sys.stderr, flush=True)
        return e.status
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1


class Server:
    "The process that forks; one child at a time."
    def __init__(self, folder):
        code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_checkpoint; test_checkpoint.serve()"
        self.process = subprocess.Popen([sys.executable, "-c", code], env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.errors, self.child = folder / "errors.txt", None

    def start(self, do, folder, **job) -> int:
        self.process.stdin.write(json.dumps({"do": do, "folder": str(folder), "errors": str(self.errors)} | job) + "\n")
        self.process.stdin.flush()
        self.child = int(self.process.stdout.readline())
        return self.child

    def wait(self) -> tuple[int, str]:
        "Exit status (negative: the signal) and what was written to standard error."
        status, self.child = int(self.process.stdout.readline()), None
        return status, self.errors.read_text()

    def alive(self) -> bool:
        "Does the child still run? One that has ended waits to be asked for its status."
        try:
            return Path(f"/proc/{self.child}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    def run(self, do, folder, **job) -> tuple[int, str]:
        self.start(do, folder, **job)
        return self.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not hasattr(os, "fork") or not os.path.isdir("/proc"):
        pytest.skip("needs fork and /proc")
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    if server.child and server.alive():
        os.kill(server.child, signal.SIGKILL)
    server.process.stdin.close()
    server.process.wait(20)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Folder, digest and log of the run that nobody kills."
    folder = tmp_path_factory.mktemp("whole")
    trainer = make(folder)
    trainer.fit()
    return folder, digest(trainer), log_of(folder)


@pytest.fixture(scope="module")
def stopped20(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    trainer = make(folder, [Then(20, stop)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert [checkpoint_step(c) for c in checkpoints(folder)] == [15, 18]
    return folder


@pytest.fixture
def run20(stopped20, tmp_path):
    "A run folder as it lies there after step 20, with the checkpoints of steps 15 and 18."
    return Path(shutil.copytree(stopped20, tmp_path / "run"))


def stop(trainer):
    raise KeyboardInterrupt


def until(condition, seconds=120.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def ends_like(whole, folder) -> None:
    "Resume in this process, without a warning, and compare."
    trainer = make(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.fit()
    assert digest(trainer) == whole[1] and log_of(folder) == whole[2]


# ---- kills

def test_killed_22_times_at_random_moments_of_one_run(server, whole, tmp_path):
    """Every second kill falls into a save, the others anywhere, start and resume included; saving in the fore- and in the background in turn.

    No life comes further than two steps past its first save (there it waits to be killed), so that 22 of them can't reach the end of the run."""
    assert KILLS * EVERY + 2 < STEPS
    rng, kills, torn, reached = random.Random(), 0, 0, []
    after = [0, 1, 3, "save", "save", "save", "save"]        # saves are waited for in the foreground, where none is lost: four make twelve steps
    rng.shuffle(after)
    while kills < KILLS:
        before, at, background = len(log_lines(tmp_path)), newest_step(tmp_path), kills % 3 == 0
        server.start("life", tmp_path, background=background, drag=0.008, slow=0.001, hang_after=at + EVERY + 2)
        if kills % 2:
            saves = size_of(tmp_path / "write_tensors.calls")
            until(lambda: size_of(tmp_path / "write_tensors.calls") > saves or not server.alive())
            time.sleep(rng.uniform(0, 0.15))
        elif (wanted := rng.randint(0, 3) if background else after.pop()) == "save":
            until(lambda: newest_step(tmp_path) > at or not server.alive())
            time.sleep(rng.uniform(0, 0.1))
        else:
            until(lambda: len(log_lines(tmp_path)) >= min(before + wanted, at + EVERY + 1) or not server.alive())
            time.sleep(rng.uniform(0, 0.1))
        assert server.alive(), server.wait()
        os.kill(server.child, signal.SIGKILL)
        assert server.wait()[0] == -signal.SIGKILL
        kills, torn = kills + 1, torn + bool(leftovers(tmp_path))
        reached.append(len(log_lines(tmp_path)))
    print(f"{kills} kills, {torn} left something half-done; steps reached: {reached}")
    assert torn >= 3, (torn, reached)
    assert newest_step(tmp_path) >= 4 * EVERY, reached
    status, errors = server.run("life", tmp_path)
    assert status == 0 and "damaged" not in errors, errors
    assert (tmp_path / "end").read_text() == whole[1]
    assert log_of(tmp_path) == whole[2] and [r["step"] for r in whole[2]] == list(range(1, STEPS + 1))
    assert not leftovers(tmp_path) and len(checkpoints(tmp_path)) == 2


def newest_step(folder) -> int:
    return max(map(checkpoint_step, checkpoints(folder)), default=0)


def size_of(path) -> int:
    return path.stat().st_size if path.exists() else 0


def log_lines(folder) -> list[str]:
    path = folder / "log.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("how", [{"kill_after": 2}, {"kill_after": 3}, {"kill_after": 7}, {"kill_after": STEPS - 1}, {"die_in": 2}, {"die_in": 3 * 6 + 3}, {"die_in": 3 * 30 + 2}],
                         ids=lambda how: "-".join(f"{k}-{v}" for k, v in how.items()))
def test_killed_in_the_first_and_later_epochs_and_between_micro_batches(server, whole, tmp_path, how):
    "Before the first checkpoint, at one, at the ends of epochs, at the end; in the second and third of the three micro-batches of a step."
    assert server.run("life", tmp_path, **how)[0] == -signal.SIGKILL
    ends_like(whole, tmp_path)


def test_every_point_of_a_save_may_be_the_last(server, tmp_path):
    "A checkpoint that replaces another, and the retiring of an old one, killed before each operation on the disk."
    status, at, found = -signal.SIGKILL, 0, []
    while status:
        folder = tmp_path / str(at)
        writer = CheckpointWriter(folder, keep=3)
        for step in (1, 2, 3):
            writer.save(step, {"model": {"w": torch.zeros(9)}}, {"new": False})
        status, errors = server.run("replace_and_die", folder, at=at)
        assert status in (0, -signal.SIGKILL), errors
        recover(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            newest = newest_checkpoint(folder)
        assert newest.name == "step_00000003" and not leftovers(folder) and recover(folder) == []
        kept = checkpoints(folder)
        assert [checkpoint_step(c) for c in kept] in ([1, 2, 3], [2, 3]) and all(checkpoint_fault(c) is None for c in kept)
        found.append((json.loads((newest / "state.json").read_text())["new"], len(kept)))
        at += 1
    assert at > 15 and found == sorted(found, key=lambda f: (f[0], -f[1])) and found[0] == (False, 3) and found[-1] == (True, 2)


def test_sigterm_saves_and_exits_with_130(server, whole, tmp_path):
    server.start("life", tmp_path, slow=0.005)
    until(lambda: len(log_lines(tmp_path)) >= 10)
    os.kill(server.child, signal.SIGTERM)
    status, errors = server.wait()
    step = checkpoint_step(checkpoints(tmp_path)[-1])
    assert status == 130 and f"stopped at step {step} of {STEPS}; the same command goes on from here" in errors
    assert step == len(log_of(tmp_path))
    ends_like(whole, tmp_path)


def test_a_second_ctrl_c_does_not_wait_for_the_step(server, whole, tmp_path):
    server.start("life", tmp_path, hang_after=4)
    until(lambda: len(log_lines(tmp_path)) >= 4)
    time.sleep(0.3)
    os.kill(server.child, signal.SIGINT)
    time.sleep(0.3)
    assert server.alive()                      # it waits for the end of the step, which does not come
    for _ in range(100):                       # a second one that comes before the first was seen counts as the first
        if server.alive():
            os.kill(server.child, signal.SIGINT)
            time.sleep(0.3)
    status, errors = server.wait()
    assert status == 130 and "stopped at" not in errors and [checkpoint_step(c) for c in checkpoints(tmp_path)] == [3]
    ends_like(whole, tmp_path)


# ---- damage

DAMAGES = {"truncated": ("model.safetensors", lambda b: b[:-1], "bytes instead of"), "cut to nothing": ("optimizer.safetensors", lambda b: b"", "bytes instead of"),
           "bit": ("optimizer.safetensors", lambda b: b[:300] + bytes([b[300] ^ 4]) + b[301:], "SHA-256 differs"), "state": ("state.json", lambda b: b.replace(b"18", b"19", 1), "SHA-256 differs"),
           "missing": ("state.json", None, "is missing"), "torn commit": (COMMIT, lambda b: b[:len(b) // 2], "missing or cannot be read"),
           "no commit": (COMMIT, None, "missing or cannot be read"), "another commit": (COMMIT, lambda b: b"[1, 2]", "missing or cannot be read")}


def damage(folder, kind):
    name, change, _ = DAMAGES[kind]
    path = folder / name
    content = path.read_bytes()
    path.unlink() if change is None else path.write_bytes(change(content))


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_one_before_a_damaged_checkpoint_is_taken(whole, run20, kind):
    damage(run20 / "checkpoints" / "step_00000018", kind)
    trainer = make(run20)
    with pytest.warns(UserWarning, match=f"step_00000018.*{DAMAGES[kind][2]}.*step_00000015, before it, is taken"):
        trainer.fit()
    assert digest(trainer) == whole[1] and log_of(run20) == whole[2]


def test_all_damaged_is_an_error_and_nothing_is_touched(run20):
    for name, kind in (("step_00000018", "bit"), ("step_00000015", "no commit")):
        damage(run20 / "checkpoints" / name, kind)
    before = {p: p.read_bytes() for p in run20.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(UserError, match=r"(?s)no checkpoint.*step_00000018/optimizer.safetensors.*step_00000015/COMMIT.json.*another folder or delete"):
        make(run20).fit()
    assert before == {p: p.read_bytes() for p in run20.rglob("*") if p.is_file() and p.name != ".lock"}
    shutil.rmtree(run20 / "checkpoints")
    make(run20, steps=5).fit()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    CheckpointWriter(folder).save(1, {"model": {"w": torch.arange(9.0)}}, {"step": 1})
    return checkpoints(folder)[0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2), st.integers(0, 10**9), st.integers(0, 7))
def test_any_flipped_bit_is_found(one, n, place, bit):
    path = sorted(one.iterdir())[n]
    content = path.read_bytes()
    place %= len(content)
    path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1:])
    try:
        assert str(one) in (checkpoint_fault(one) or "")
    finally:
        path.write_bytes(content)
    assert checkpoint_fault(one) is None


# ---- a disk that refuses

@pytest.mark.parametrize("background", [False, True])
def test_a_limit_on_files_ends_the_run_and_leaves_what_was_there(server, whole, tmp_path, background):
    "RLIMIT_FSIZE from step 10 on: a real refusal of the operating system, in the middle of a file."
    status, errors = server.run("life", tmp_path, limit=3000, background=background, slow=0.003)
    assert status == 2 and "step_00000012: cannot write: " in errors and "ulimit" in errors, errors
    assert [checkpoint_step(c) for c in checkpoints(tmp_path)] == [6, 9] and not leftovers(tmp_path)
    assert len(log_of(tmp_path)) <= 14
    ends_like(whole, tmp_path)


@pytest.mark.parametrize("place", ["write_tensors", "_flush", "commit"])
@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_told_at_once(whole, tmp_path, monkeypatch, place, background):
    real, calls = getattr(checkpoint, place), []

    def full(*args):
        calls.append(args)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    trainer = make(tmp_path, slow=0.003)
    trainer.writer.background = background
    monkeypatch.setattr(checkpoint, place, full)
    with pytest.raises(UserError, match=r"step_\d+: cannot write: No space left on device. Free some space.*untouched"):
        trainer.fit()
    failed = checkpoint_step(checkpoints(tmp_path)[-1]) + EVERY
    assert failed <= trainer.n_steps <= failed + 2 * background and not leftovers(tmp_path)      # and not at the end of the run
    monkeypatch.undo()
    ends_like(whole, tmp_path)


def test_what_the_background_failed_in_is_raised_once(tmp_path):
    writer, gate = CheckpointWriter(tmp_path, background=True), threading.Event()
    writer.save(1, {"model": {"w": torch.ones(1)}}, {})
    writer.wait()

    def bad(tensors, path):
        gate.wait(10)
        raise ValueError("no such thing")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", bad)
        writer.save(2, {"model": {"w": torch.ones(1)}}, {})
        writer.check()                           # still at work: nothing to tell
        gate.set()
        writer.thread.join()
        with pytest.raises(ValueError, match="no such thing"):
            writer.check()
        writer.check()
    assert [c.name for c in checkpoints(tmp_path)] == ["step_00000001"] and not leftovers(tmp_path)


def test_saving_in_the_background_changes_nothing(whole, tmp_path):
    trainer = make(tmp_path)
    trainer.writer.background = True
    trainer.fit()
    assert digest(trainer) == whole[1] and log_of(tmp_path) == whole[2]
    assert all(checkpoint_fault(c) is None for c in checkpoints(tmp_path)) and len(checkpoints(tmp_path)) == 2
    files = {c.name: {p.name: p.read_bytes() for p in c.iterdir()} for c in checkpoints(tmp_path)}
    assert files == {c.name: {p.name: p.read_bytes() for p in c.iterdir()} for c in checkpoints(whole[0])}


# ---- one run a folder, and what is kept

def test_two_runs_cannot_share_a_folder(server, whole, tmp_path):
    server.start("life", tmp_path, slow=0.02)
    until(lambda: len(log_lines(tmp_path)) >= 4)
    with pytest.raises(UserError, match=f"{tmp_path} is in use: process {server.child} .*another folder"):
        make(tmp_path).fit()
    os.kill(server.child, signal.SIGKILL)
    server.wait()
    ends_like(whole, tmp_path)


def test_the_lock_is_let_go_of_after_an_error(tmp_path):
    with run_lock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()}"), run_lock(tmp_path):
            pass
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, [Then(2, stop)]).fit()
    with run_lock(tmp_path):
        pass


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def none(handle):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(checkpoint, "_lock", none)
    with pytest.warns(UserWarning, match="knows no locks"), run_lock(tmp_path):
        pass


def test_leftovers_are_put_in_order_and_named(one, tmp_path):
    root = tmp_path / "checkpoints"
    shutil.copytree(one, root / "step_00000004")
    shutil.copytree(one, root / ".step_00000004.old")        # its successor is there: of no more use
    shutil.copytree(one, root / ".step_00000005.old")        # its successor is not
    for name in (".step_00000005.partial", ".step_00000002.removed"):
        (root / name).mkdir()
    done = recover(tmp_path)
    assert [d.split(":")[0] for d in done] == ["step_00000005", ".step_00000002.removed", ".step_00000004.old", ".step_00000005.partial"]
    assert "put back" in done[0] and "deleted" in done[1]
    assert sorted(p.name for p in root.iterdir()) == ["step_00000004", "step_00000005"] and recover(tmp_path) == []
    discard(root)
    assert list(tmp_path.iterdir()) == [] and discard(root) is None and recover(tmp_path) == []


def test_what_is_kept(tmp_path):
    trainer = make(tmp_path, steps=40)
    trainer.writer.keep_every, trainer.protected = 12, {6}
    trainer.fit()
    assert [checkpoint_step(c) for c in checkpoints(tmp_path)] == [6, 12, 24, 36, 39]


def test_what_is_no_checkpoint_is_left_alone(one, tmp_path):
    for name in ("step_00000001", "step_00000002 (copy)", "step_best"):
        shutil.copytree(one, tmp_path / "checkpoints" / name)
    assert [c.name for c in checkpoints(tmp_path)] == ["step_00000001"] and newest_checkpoint(tmp_path).name == "step_00000001"
    assert newest_checkpoint(tmp_path / "elsewhere") is None and newest_checkpoint(tmp_path, at_most=0) is None


# ---- changed settings

@pytest.mark.parametrize("change, says", [({"seed": 1}, "seed was 0 and is 1: the order of the data"), ({"batch_size": 4}, "batch_size was 8 and is 4: each step sees other examples"),
                                          ({"n_data": 60}, "the data had 50 examples and have 60"), ({"schedule": "wsd"}, "schedule was cosine and is wsd: this is no longer the run"),
                                          ({"steps": 100}, f"steps was {STEPS} and is 100"), ({"micro_batch": 8}, "micro_batch was 3 and is 8: the same run up to rounding")])
def test_a_resume_with_other_settings_is_told(run20, change, says):
    with pytest.warns(UserWarning, match=f"goes on from step 18 with other settings than before: {says}"):
        make(run20, [Then(20, stop)], **change)._resume()


@pytest.mark.parametrize("change", [{}, {"checkpoint_every": 7}, {"log_every": 2}, {"keep_checkpoints": 4}])
def test_what_is_free_to_change_is_not(run20, change):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(run20, **change)._resume()


def test_states_are_json_and_older_ones_are_read():
    config = TrainConfig(10)
    state = resume_state(config, 50)
    assert json.loads(json.dumps(state)) == state and state["n_data"] == 50 and state["versions"]["torch"] == torch.__version__
    assert resume_changes({}, state) == [] and resume_changes(state, state) == []
    longer = [resume_state(TrainConfig(n, schedule="constant", warmup=0.0), 50) for n in (10, 20)]
    assert resume_changes(*longer) == []
    assert resume_changes(state, resume_state(config, 50, processes=2)) == ["processes: 1 then, 2 now: the same run up to rounding, or with dropout another sample of it"]
    other = state | {"versions": state["versions"] | {"numpy": "1.0"}}
    assert [c.split(" ")[0] for c in resume_changes(other, state)] == ["numpy"]


def test_commit_needs_a_folder_of_its_own(tmp_path):
    "Two commits to one place: the second replaces the first, with nothing left beside it."
    for n in (1, 2):
        (tmp_path / "half").mkdir()
        (tmp_path / "half" / "a.txt").write_text(str(n))
        commit(tmp_path / "half", tmp_path / "done")
    assert (tmp_path / "done" / "a.txt").read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["done"]
