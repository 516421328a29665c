"""What a check says: one JSON line per case, written at once."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PASSED, FAILED, INFO, NOT_RUN = "passed", "failed", "info", "not run"
FILE = "accept.jsonl"


@dataclass(frozen=True)
class Context:
    """What a check gets: where to write, and what it runs on."""

    out: Path
    check: str
    small: bool
    """Whether this is the dry run on a CPU, with small shapes."""

    @property
    def device(self) -> torch.device:
        """The first visible GPU, or the CPU in a dry run."""
        return torch.device("cpu") if self.small else torch.device("cuda", 0)

    @property
    def gpus(self) -> int:
        """The number of ranks that checks over several ranks may use: GPUs, or two processes in a dry run."""
        return 2 if self.small else torch.cuda.device_count()

    def folder(self, name: str) -> Path:
        """A folder for a check's own files, below OUT."""
        path = self.out / "work" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def verdict(self, case: str, holds: bool, message: str, **values: Any) -> bool:
        """Write whether a case holds; `message` says what was required, with the figures. Returns `holds`."""
        self._write(PASSED if holds else FAILED, case, message, values)
        return holds

    def info(self, case: str, message: str = "", **values: Any) -> None:
        """Write a figure that nothing is required of."""
        self._write(INFO, case, message, values)

    def not_run(self, case: str, why: str) -> None:
        """Write that a case was left out."""
        self._write(NOT_RUN, case, why, {})

    def _write(self, status: str, case: str, message: str, values: dict[str, Any]) -> None:
        write_line(self.out, check=self.check, case=case, status=status, message=message, values=values)


def write_line(out: Path, **fields: Any) -> None:
    """Append a line to OUT/accept.jsonl and have it on the disk before this returns."""
    line = json.dumps({"time": round(time.time(), 1), **fields}, default=str)
    with (out / FILE).open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(f"{fields['status']:8} {fields['check']}: {fields['case']}: {fields['message']}", flush=True)


def read_lines(out: Path) -> list[dict[str, Any]]:
    """All lines so far. A line that a crash has cut is left out."""
    path = out / FILE
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
