"""`killed_in_sampling.py ARGUMENTS...`: what ibdistill/train.py does with these arguments, but its ranks are
killed with SIGKILL when the first block of the sampling at step 6 is on disk."""

from __future__ import annotations

import os
import signal

from ibdistill import train
from ibdistill.training import step_files

append = step_files.append


def and_killed(path, rows) -> None:
    append(path, rows)
    if path.name.startswith("step-00000006"):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    step_files.append = and_killed
    train.main()
