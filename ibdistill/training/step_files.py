"""JSON lines that a run makes at a step and learns from afterwards; a checkpoint names the file by content.

A run that is killed while it makes them has its last checkpoint at that step or before, so it makes them
again with the same weights. What takes long is kept piece by piece meanwhile (`append`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ibdistill.runtime import files


def write(folder: Path, step: int, rows: Iterable[dict[str, Any]]) -> str:
    """Write the rows; the file's name, which holds the step and a digest. Raises OSError."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = folder / f"step-{step:08d}-{files.digest(content).hex()}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, content)
    return path.name


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add a piece of rows that are not all there yet, and see it on disk. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(b"\n" + json.dumps(list(rows)).encode())  # a piece that was cut off ends here
        file.flush()
        os.fsync(file.fileno())


def pieces(path: Path) -> list[dict[str, Any]]:
    """The rows of all pieces that `append` wrote, without a piece that a crash cut off. Raises OSError."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            found += json.loads(line)
        except ValueError:
            continue
    return found


def step_of(name: str) -> int:
    """The step at which a file of this name was written."""
    return int(name.split("-")[1])


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `write` made. Raises ValueError if it is missing or has changed."""
    content = path.read_bytes() if path.is_file() else b""
    if files.digest(content).hex() != path.stem.rpartition("-")[2]:
        raise ValueError(
            f"{path} is {'damaged' if content else 'missing'}: the checkpoint was trained with its records. "
            "Put it back, or start a new run"
        )
    return [json.loads(line) for line in content.decode().splitlines()]
