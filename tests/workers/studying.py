"""`python studying.py ERRORS ARGUMENTS...`: what `tools/study.py ARGUMENTS... 2> ERRORS` does, its runs and
launchers being forks of this process (launched.py)."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from concurrent.futures import thread
from types import SimpleNamespace
from typing import IO, NoReturn

from harness import LAUNCHED, ROOT, run_script

sys.path.append(str(ROOT / "tools"))
from study import command


class Fork:
    """What the study uses of a `subprocess.Popen`: it waits for the process by its id."""

    def __init__(self, command: list[str], *, stdout: IO, env: dict[str, str], **_) -> None:
        arguments = command[1:]
        if "deepspeed.launcher.runner" in arguments:
            arguments = [LAUNCHED, *arguments[arguments.index("--num_gpus") + 1 :]]
        self.pid = os.fork()
        if self.pid == 0:
            run(arguments, stdout.name, env)


def run(arguments: list[str], log: str, env: dict[str, str]) -> NoReturn:
    """Run a script in this process, which is a fork of a thread, to the end of the process."""
    thread._threads_queues.clear()  # at its end this process would wait for the study's threads
    code = 1
    try:
        run_script(arguments, log, env)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    command.subprocess = SimpleNamespace(Popen=Fork, STDOUT=subprocess.STDOUT)
    command.main(sys.argv[2:])
