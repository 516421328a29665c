"""Where the kills are aimed.

A phase is an entry of PHASES: settings, how the run's starts differ, and two looks at its folder and log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

SETTINGS: dict[str, Any] = {
    "data.task": "jsonl",
    "data.max_label_tokens": 16,
    "data.max_rationale_tokens": 48,
    "student.model": "demo-student",
    "student.precision": "fp32",
    "optim.lr": 2e-3,
    "optim.max_steps": 12,
    "optim.batch_size": 8,
    "run.save_every": 1,
    "run.log_every": 1,
    "run.report_to": '["jsonl"]',
    "run.test_limit": 4,
}
"""A run of seconds. With a checkpoint every step one is nearly always being written."""


class Start(NamedTuple):
    """One start of a run."""

    folder: Path
    """The run's."""
    log: Path
    """What this start prints."""
    time: float
    """When it began."""

    def said(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def made(self, pattern: str) -> list[Path]:
        """Files and folders of the run that were made or changed since this start."""
        found = []
        for path in self.folder.glob(pattern):
            with suppress(FileNotFoundError):
                found += [path] if path.stat().st_mtime >= self.time else []
        return found


class Phase(NamedTuple):
    """A part of a run that kills are aimed at."""

    settings: Mapping[str, Any]
    """Besides SETTINGS; `{folder}` in a value stands for a folder of the run's own."""
    starts: Sequence[tuple[int, str]]
    """The ranks and the DeepSpeed file of a run's starts, in turn; the first is that of the unkilled run."""
    begun: Callable[[Start], object]
    """Whether the phase, or what comes just before it, has been reached."""
    caught: Callable[[Start], object]
    """Whether it had begun and not ended when the kill came; asked when all processes are gone."""
    seconds: float
    """The kill comes at most so long after the beginning."""
    records: int = 64
    """That the run learns from."""


def unfinished_checkpoint(start: Start) -> bool:
    """Whether there is a checkpoint's folder without its marker."""
    return any(not (path / "complete.json").exists() for path in start.made("checkpoints/step-*"))


PHASES = {
    "writing": Phase({}, [(2, "zero2")], unfinished_checkpoint, unfinished_checkpoint, 1.5),
    "copying": Phase(
        {"run.local_dir": "/dev/shm"}, [(2, "zero2")], unfinished_checkpoint, unfinished_checkpoint, 1.5
    ),
    "sharing": Phase(
        {"student.dropout": 0.0},
        [(2, "zero2"), (1, "zero3"), (3, "zero1"), (2, "zero3"), (1, "zero0"), (2, "zero1")],
        lambda start: "anew among" in start.said() or (start.made("checkpoints/*/complete.json")),
        lambda start: "anew among" in start.said() and "resumed from" not in start.said(),
        0.03,
    ),
    "sampling": Phase(
        {
            "objective.method": "kd",
            "teacher.placement": "replica",
            "teacher.model": "demo-teacher",
            "on_policy.share": 1.0,
            "on_policy.every": 0.25,
            "on_policy.max_tokens": 24,
            "run.eval_batch_size": 1,
            "run.save_every": 3,
        },
        [(2, "zero2")],
        lambda start: start.made("on_policy/*.part"),
        lambda start: start.made("on_policy/*.part"),
        0.5,
    ),
    "tables": Phase(
        {"data.cache_dir": "{folder}/tables"},
        [(2, "zero2")],
        lambda start: "tokenizing" in start.said() or "is there already" in start.said(),
        lambda start: any(
            not path.name.startswith("tokens-") for path in start.made("../tables/*tokens-*[!k]")
        ),
        1.0,
        records=4000,
    ),
}
"""`writing`: a checkpoint is written beside the steps. `copying`: it is written to a folder of the node
first, and copied. `sharing`: a checkpoint of other ranks or another ZeRO stage is shared out anew.
`sampling`: the student samples its own text, and the folder keeps each block. `tables`: the training records
are tokenized into a table that later starts read."""
