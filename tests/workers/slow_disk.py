"""`python slow_disk.py RANKS ARGUMENTS...`: as runs.py, but rank 1's second checkpoint is never written.

Once it is there, the file that SLOW_DISK_REACHED names is made.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import ranks
import torch

from ibdistill import train

_save = torch.save
_count = 0


def save(*args, **kwargs) -> None:
    global _count
    if threading.current_thread().name.startswith("checkpoint") and os.environ["RANK"] == "1":
        _count += 1
        if _count > 1:
            Path(os.environ["SLOW_DISK_REACHED"]).touch()
            time.sleep(1000)
    _save(*args, **kwargs)


def main(arguments: list[str]) -> None:
    sys.argv[1:] = arguments
    torch.save = save
    train.main()


if __name__ == "__main__":
    number, *arguments = sys.argv[1:]
    ranks.run(main, arguments, ranks=(int(number),))
