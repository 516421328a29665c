"""What the tests share: the launcher, ranks that are forked, small configurations, a few steps."""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "ibdistill" / "train.py")
WORKERS = ROOT / "tests" / "workers"
FORKED = str(WORKERS / "runs.py")
"""A script like TRAIN that forks its ranks itself; its first argument is their number."""
LAUNCHED = str(WORKERS / "launched.py")

IN_FULL = {"IBDISTILL_TESTS_IN_FULL": "1"}
"""The environment of a fork that has the whole demo and draws figures, as ranks of a cold launcher do."""

_SERVER = multiprocessing.get_context("forkserver")
"""Starts processes as forks of one that has done what `warm.py` does, which takes a script 5 s of CPU."""
_SERVER.set_forkserver_preload(["warm"])


def start_server() -> None:
    """Start it once, with the path of `warm.py`, as it does not hear of this process's `sys.path`.

    For a moment this process's environment is another one; who forks in threads calls this before.
    """
    if forkserver._forkserver._forkserver_pid is None:
        with mock.patch.dict(os.environ, PYTHONPATH=f"{ROOT}:{Path(__file__).parent}"):
            forkserver.ensure_running()


class Forked:
    """A Python script that runs in a fork of `_SERVER`'s process; used as a `subprocess.Popen` is."""

    def __init__(self, arguments: Sequence[str], log: Path | str, env: dict[str, str]) -> None:
        given = [str(argument) for argument in arguments], str(log), env
        start_server()
        self._process = _SERVER.Process(target=run_script, args=given)
        self._process.start()
        self.pid = self._process.pid
        atexit.register(self.send_signal, signal.SIGKILL)  # before the interpreter waits for its processes

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked script", timeout)
        return self._process.exitcode


def run_script(arguments: list[str], log: str, env: dict[str, str]) -> None:
    """Do in this process what `python ARGUMENTS` does, in a session of its own, with output to `log`."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    sys.path[:0] = [str(Path(arguments[0]).parent), *env.get("PYTHONPATH", "").split(":")]
    sys.argv[:] = arguments
    if IN_FULL.items() <= env.items():
        import warm

        warm.leave_nothing_out()
    runpy.run_path(arguments[0], run_name="__main__")


def start(
    arguments: Sequence[str],
    *,
    log: Path,
    ranks: int | None = None,
    cold: bool = False,
    env: dict[str, str] | None = None,
) -> subprocess.Popen | Forked:
    """Start a script in a session of its own, with output to `log`: with `ranks` through DeepSpeed's
    launcher on so many, and else as one process, which may fork its ranks itself (workers/ranks.py).

    The launcher's processes are forks too (workers/launched.py). With `cold` they are started as a user's
    are, which costs 15 s of CPU: for claims about these processes.
    """
    from ibdistill.runtime.distributed import free_port

    log.write_text("")
    if not cold:
        through = [] if ranks is None else [LAUNCHED, str(ranks)]
        return Forked([*through, *arguments], log, alone() | (env or {}))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += ["--master_port", str(free_port())]
    with log.open("w") as output:
        return subprocess.Popen(
            [*command, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=alone() | (env or {}),
            start_new_session=True,
            cwd=ROOT,
        )


def launch(
    arguments: Sequence[str],
    *,
    log: Path,
    ranks: int | None = None,
    cold: bool = False,
    env: dict[str, str] | None = None,
    timeout: float = 900,
) -> int:
    """Run a script to its end as `start` does; the exit code."""
    process = start(arguments, ranks=ranks, cold=cold, log=log, env=env)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        kill_session(process)
        raise AssertionError(f"no end after {timeout} s:\n{log.read_text()[-4000:]}") from None


def alone() -> dict[str, str]:
    """The environment for a command that must not join this process's group."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def output_of(*command: str, cold: bool = False) -> str:
    """What a Python script prints, run as one process of one thread.

    A script is a fork, what it logs among its output, unless it is to import all itself (`cold`).
    """
    env = alone() | {"OMP_NUM_THREADS": "1"}
    if not (cold or command[0] == "-c"):
        with tempfile.NamedTemporaryFile("r") as log:
            code = Forked(command, log.name, env).wait(900)
            printed = log.read()
        assert code == 0, printed[-2000:]
        return printed
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=900)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def kill_session(process: subprocess.Popen | Forked) -> None:
    """Kill a process that `start` started and all its ranks with SIGKILL, as a power failure would."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tiny(folder: Path, **overrides) -> dict[str, object]:
    """Settings of a run that takes seconds: 12 steps of 8 questions on the demo corpus, 16 test problems.

    No text of the corpus has more tokens than these limits, at which an untrained student ends its answers.
    """
    return {
        "run.dir": str(folder),
        "data.subsample": 100,
        "data.max_label_tokens": 16,
        "data.max_rationale_tokens": 32,
        "student.model": "demo-student",
        "optim.lr": 2e-3,
        "optim.max_steps": 12,
        "optim.batch_size": 8,
        "run.log_every": 1,
        "run.test_limit": 16,
    } | overrides


def short_code() -> str:
    """In place of `stored_records.code` where the demo is short, whose tables are others."""
    return "short demo"


def short_demo(load_demo: Callable) -> Callable:
    """`demo.load_demo` with 64 of 1,000 validation problems and of 2,000 test problems, all of which each run
    tokenizes and checks before it starts.

    Ranks of a cold launcher have the whole demo; a fork that shares a run's folder with them needs IN_FULL.
    """

    @functools.wraps(load_demo)
    def load(task: str, *test_seed: int) -> dict[str, list]:
        splits = load_demo(task, *test_seed)
        return {name: records if name == "train" else records[:64] for name, records in splits.items()}

    return load


def as_arguments(settings: dict[str, object]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def weights(job) -> dict:
    """All that is trained, whole under ZeRO-3 too."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(job.engine.module.parameters())):
        return {name: p.detach().clone() for name, p in job.engine.module.named_parameters()}


def steps(job, n: int) -> None:
    from ibdistill import train

    for _ in range(n):
        train.train_step(job)


def same(a: dict, b: dict) -> bool:
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def remark(path: Path) -> None:
    """Let a checkpoint's marker say that this file of it was written as it is now."""
    marker = path.parent / "complete.json"
    content = json.loads(marker.read_text())
    content["files"][path.name] = {"bytes": path.stat().st_size, "crc32": zlib.crc32(path.read_bytes())}
    marker.write_text(json.dumps(content))


@contextmanager
def full_disk(free_bytes: int) -> Iterator[None]:
    """Writes beyond so many bytes a file fail, as on a full disk, really and in this process only."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
