"""`python accepting.py ARGUMENTS...`: what `tools/accept.py ARGUMENTS...` does, its runs and launchers being
forks of this process (launched.py), but for the launcher whose rank is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

from harness import LAUNCHED, ROOT, run_script

sys.path.append(str(ROOT / "tools"))
from accept import conductor, resume, several


class Fork:
    """What `several.launch` and `resume.run` use of a `subprocess.Popen`, for a Python script."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        log.parent.mkdir(exist_ok=True)
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self._process = get_context("fork").Process(target=run_script, args=(arguments, str(log), alone))
        self._process.start()
        self.pid = self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked script", timeout)
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def begin(context, ranks, arguments, name):
    """As `several.begin`."""
    if name == "killed":
        return cold(context, ranks, arguments, name)
    log = context.out / "logs" / f"{name}.log"
    return Fork([LAUNCHED, str(ranks), *arguments], log), log


if __name__ == "__main__":
    cold, several.begin = several.begin, begin
    resume.subprocess = SimpleNamespace(
        Popen=lambda command, *, stdout, **_: Fork(command[1:], Path(stdout.name)), STDOUT=subprocess.STDOUT
    )
    sys.exit(conductor.from_command_line(sys.argv[1:]))
