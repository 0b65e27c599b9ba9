"""The command `llm_course`, and programs of the tests, in processes of their own, forked from one that has loaded torch already: that costs seven seconds of work, and need not be done for each.

The processes are real: of their own memory, signals, exit status, and files for what they say. What a start from nothing is like, a few tests try with `subprocess`."""
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path

ENV = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_RANK"))} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PRELOAD = ["commands", "llm_course.cli", "llm_course.pipeline", "llm_course.chat", "torch._dynamo", "accelerate", "matplotlib.pyplot"]
CAN_FORK = "forkserver" in get_all_start_methods()     # not on Windows


def _server():
    "The context of a process that is forked. It is started once, with the environment of a command: torch reads it while it is loaded."
    from multiprocessing import forkserver
    context = get_context("forkserver")
    before, here = dict(os.environ), Path(__file__).resolve().parent
    context.set_forkserver_preload(PRELOAD)
    try:
        os.environ.clear()
        os.environ.update(ENV | {"PYTHONPATH": os.pathsep.join(filter(None, [ENV.get("PYTHONPATH"), str(here.parent), str(here)]))})
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _become(streams: list[str], variables: dict[str, str]) -> None:
    "In the new process: its input, output and errors, and its environment."
    for number, (path, flags) in enumerate(zip(streams, (os.O_RDONLY, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_APPEND))):
        stream = os.open(path, flags)
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    os.environ.clear()
    os.environ.update(variables)


def _main(args: list[str], cwd: str, streams: list[str]) -> None:
    from llm_course.cli import main
    _become(streams, ENV)
    os.chdir(cwd)
    sys.argv = ["llm_course", *args]
    sys.exit(main(args))


def start(*args: str, cwd: Path | str = ".", streams=(os.devnull,) * 3):
    "The command, started; `streams` are the paths of its input, output and errors. Returns the process (of `multiprocessing`)."
    process = _server().Process(target=_main, args=([str(a) for a in args], str(Path(cwd).resolve()), [str(s) for s in streams]))
    process.start()
    return process


def llm_course(*args: str, cwd: Path | str = ".", timeout: float = 300, input: str = "") -> subprocess.CompletedProcess:
    "The command from its start to its end."
    if not CAN_FORK:
        return fresh_llm_course(*args, cwd=cwd, timeout=timeout, input=input)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("input", "output", "errors")]
        for stream in streams:
            stream.write_text(input if stream.name == "input" else "", encoding="utf-8")
        process = start(*args, cwd=cwd, streams=streams)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(args, timeout)
        out, err = (s.read_text(encoding="utf-8", errors="replace") for s in streams[1:])
    return subprocess.CompletedProcess(args, process.exitcode, out, err)


def _program(program: str, arguments: list[str], variables: dict[str, str], said: str) -> None:
    _become([os.devnull, said, said], variables)
    sys.argv[:], sys.path[:0] = [program, *arguments], [str(Path(program).parent)]
    runpy.run_path(program, run_name="__main__")


class Forked:
    "A Python program in a forked process, with what the tests need of `subprocess.Popen`."
    def __init__(self, program: Path | str, arguments: tuple = (), env: dict[str, str] = ENV):
        self.folder = tempfile.TemporaryDirectory()
        self.said = Path(self.folder.name) / "said"
        self.said.touch()
        self.process = _server().Process(target=_program, args=(str(program), [str(a) for a in arguments], env, str(self.said)))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.said.name, timeout, self.said.read_text(errors="replace"))
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.said.read_text(encoding="utf-8", errors="replace"), None

    def kill(self) -> None:
        self.process.kill()


def start_program(program: Path | str, *arguments: Path | str, env: dict[str, str] = ENV) -> Forked | subprocess.Popen:
    "A Python file, started; what it says on both streams is what `communicate` gives first."
    if CAN_FORK:
        return Forked(program, arguments, env)
    return subprocess.Popen([sys.executable, str(program), *map(str, arguments)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def as_launched(n: int, program: Path | str, *arguments: Path | str, **variables: str) -> list[Forked | subprocess.Popen]:
    "A program on `n` processes, with the variables that torchrun would set, and no launcher that ends the others when one dies. What they say comes as one stream."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    where = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if n > 1 else {}
    each = [{"RANK": str(r), "LOCAL_RANK": str(r)} if n > 1 else {} for r in range(n)]
    return [start_program(program, *arguments, env=ENV | variables | where | e) for e in each]


def wait_for(processes: list[Forked | subprocess.Popen], timeout: float = 200) -> None:
    "Until all have ended, and ended well: else the last that one said is in the error. None is left behind."
    try:
        for process in processes:
            said, _ = process.communicate(timeout=timeout)
            assert process.returncode == 0, said[-4000:]
    finally:
        for process in processes:
            process.kill()


def fresh_llm_course(*args: str, cwd: Path | str = ".", timeout: float = 300, **kw) -> subprocess.CompletedProcess:
    "The command as a user starts it, from nothing."
    return subprocess.run([sys.executable, "-m", "llm_course.cli", *map(str, args)], cwd=cwd, env=ENV, timeout=timeout, capture_output=True, text=True, **kw)
