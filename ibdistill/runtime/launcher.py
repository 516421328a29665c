"""DeepSpeed's launcher as its ranks see it: `deepspeed` starts `deepspeed.launcher.launch` on each node, and
that starts the ranks.

This module imports nothing heavy itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from ibdistill.runtime import processes

DEFAULT_PORT = "29500"
"""The MASTER_PORT that the launcher gives to its ranks where the user has not chosen one."""
_WATCH_SECONDS = 0.25
_PR_SET_PDEATHSIG = 1
"""The option of Linux's prctl(2) that names the signal which a process gets when its parent ends."""


def pid() -> int | None:
    """The id of the launcher that is this process's parent; None if another program started this process."""
    parent = os.getppid()
    return parent if "deepspeed.launcher.launch" in processes.command_line(parent) else None


def is_alone() -> bool:
    """Whether the launcher runs on one node only."""
    return os.environ.get("CROSS_SIZE") == "1"


@cache
def end_with_launcher() -> None:
    """Let this rank end at once, and save nothing, when its launcher is gone, as after `kill -9`.

    Otherwise the ranks would train on for a while, and hold the run folder and the port. Where another
    program than DeepSpeed's launcher started this process, as under srun, nothing happens: its ranks are
    ended by whoever started them.
    """
    launcher = pid()
    if launcher is None:
        return
    runner = processes.parent_of(launcher)
    if runner is not None and not _is_runner(processes.command_line(runner)):
        runner = None  # somebody else's shell, which may end while the launcher goes on
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        # the first look also notices a launcher that ended before the kernel was asked for the signal
        while os.getppid() == launcher and (runner is None or processes.parent_of(launcher) == runner):
            time.sleep(_WATCH_SECONDS)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, name="watch the launcher", daemon=True).start()


def _is_runner(command: list[str]) -> bool:
    """Whether a command line is that of the program `deepspeed` itself: a Python that runs it."""
    return any(Path(word).name in ("deepspeed", "ds", "deepspeed.launcher.runner") for word in command[:4])
