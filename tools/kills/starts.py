"""The processes of one start of a run."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

PRELOADED = ["ibdistill.train", "transformers.models.t5.modeling_t5", "matplotlib.figure"]


def _forked(command: Sequence[str], ranks: int, log: Path) -> None:
    """Run a Python script on so many ranks that are forked from this process."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from torch.multiprocessing import start_processes

    from ibdistill.runtime import distributed

    port = distributed.free_port()
    start_processes(_rank, (list(command), ranks, port), ranks, start_method="fork")


def _rank(rank: int, command: list[str], ranks: int, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv[:] = command
    runpy.run_path(command[0], run_name="__main__")


class Processes:
    """The processes of a start, which lead a session of their own."""

    def __init__(self, command: Sequence[str], ranks: int, log: Path, launcher: bool) -> None:
        self._launcher, self._ranks, self._popen, self._fork = launcher, ranks, None, None
        if launcher:
            from ibdistill.runtime.distributed import free_port

            through = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
            through += ["--master_port", str(free_port()), *command]
            with log.open("w") as output:
                self._popen = subprocess.Popen(
                    through, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            self.pid = self._popen.pid
        else:
            server = multiprocessing.get_context("forkserver")
            server.set_forkserver_preload(PRELOADED)
            self._fork = server.Process(target=_forked, args=(list(command), ranks, log))
            self._fork.start()
            self.pid = self._fork.pid

    def code(self, wait: float = 0.0) -> int | None:
        """The exit code, or None if it runs on after so many seconds."""
        if self._popen:
            with suppress(subprocess.TimeoutExpired):
                self._popen.wait(wait)
            return self._popen.returncode
        self._fork.join(wait)
        return self._fork.exitcode

    def kill(self, rank: int | None) -> bool:
        """SIGKILL to one rank, or to all processes; False if they have ended already."""
        try:
            if rank is None:
                os.killpg(self.pid, signal.SIGKILL)
                return True
            found = psutil.Process(self.pid).children(recursive=self._launcher)
            if self._launcher:
                found = [p for p in found if any(w.startswith("--local_rank") for w in p.cmdline())]
            if len(found) != self._ranks:
                return False
            found[rank].kill()
        except (ProcessLookupError, psutil.NoSuchProcess, psutil.ZombieProcess):
            return False
        return True
