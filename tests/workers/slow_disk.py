"""`python slow_disk.py RANKS ARGUMENTS...`: as runs.py, but rank 1's second checkpoint is never written, or,
with `run.local_dir`, half of it copied.

Once it is there, the file that SLOW_DISK_REACHED names is made.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import IO

import ranks
import torch

from ibdistill import train
from ibdistill.training import checkpoint_write

_save, _copy_to = torch.save, checkpoint_write.copy_to
_count = 0


def save(*args, **kwargs) -> None:
    global _count
    if threading.current_thread().name.startswith("checkpoint") and os.environ["RANK"] == "1":
        _count += 1
        if _count > 1:
            Path(os.environ["SLOW_DISK_REACHED"]).touch()
            time.sleep(1000)
    _save(*args, **kwargs)


def copy_to(path: Path, source: IO[bytes]) -> int:
    global _count
    _count += 1
    if _count > 1 and os.environ["RANK"] == "1":
        source.seek(0)
        path.write_bytes(source.read(os.fstat(source.fileno()).st_size // 2))
        Path(os.environ["SLOW_DISK_REACHED"]).touch()
        time.sleep(1000)
    return _copy_to(path, source)


def main(arguments: list[str]) -> None:
    sys.argv[1:] = arguments
    if "--run.local_dir" in arguments:
        checkpoint_write.copy_to = copy_to
    else:
        torch.save = save
    train.main()


if __name__ == "__main__":
    number, *arguments = sys.argv[1:]
    ranks.run(main, arguments, ranks=(int(number),))
