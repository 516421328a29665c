"""`python launched.py RANKS SCRIPT ARGUMENTS...`: what `deepspeed --num_gpus RANKS SCRIPT ARGUMENTS...` does,
its processes being forks of this one.

All code of DeepSpeed's launcher runs, on its node and in its ranks: their environment, signals, exit codes.
What is spared are the imports of the launcher's two processes and of each rank, 4 s of CPU each.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

from deepspeed.launcher import launch, runner

from ibdistill.runtime.distributed import free_port


class Fork:
    """What the launcher uses of `subprocess.Popen`, for `python -u -m deepspeed.launcher.launch ARGUMENTS...`
    and `python -u SCRIPT ARGUMENTS...`."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self._process = get_context("fork").Process(target=_run, args=(command[2:], env))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.join()


def _run(arguments: list[str], env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(line_buffering=True)  # python -u, for whole lines
    if arguments[0] == "-m":
        sys.argv[:] = arguments[1:]
        launch.main()
    else:
        sys.argv[:] = arguments
        sys.path[0] = str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    runner.subprocess = launch.subprocess = SimpleNamespace(Popen=Fork)
    gc.freeze()  # no collection of a rank looks at the imports again
    runner.main(["--num_gpus", sys.argv[1], "--master_port", str(free_port()), *sys.argv[2:]])
