"""What a run shows: TensorBoard, one console line a logging step, and `result.json`.

Values stay on the device, as sums, until a logging step; then one reduction over ranks turns
them into means. Between logging steps nothing waits for the device.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ibdistill import distributed
from ibdistill.data import Batch
from ibdistill.distributed import World

logger = logging.getLogger("ibdistill")


@dataclass(frozen=True)
class Interval:
    """What happened between two logging steps, over all ranks."""

    terms: dict[str, float]
    """Sums of the head loss's terms."""
    counts: dict[str, int]
    """Target tokens by stream, `questions`, `explained`."""
    steps: int
    tokens: int
    """Real tokens that entered the model, questions and targets."""
    positions: int
    """The same with padding."""
    seconds: float
    data_seconds: float
    """Mean over ranks of the time spent making batches."""

    def speed(self, world: World) -> dict[str, float]:
        """Scalars of throughput and padding by TensorBoard tag."""
        return {
            "speed/tokens_per_s": self.tokens / self.seconds,
            "speed/tokens_per_s_per_device": self.tokens / self.seconds / world.size,
            "speed/step_s": self.seconds / self.steps,
            "speed/data_wait_s": self.data_seconds / self.steps,
            "data/padded_share": 1 - self.tokens / self.positions,
        }


class Meter:
    """Collects an interval's sums on this rank."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._terms: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._steps = self._tokens = self._positions = 0
        self._data_seconds = 0.0
        self._start = time.perf_counter()

    def add(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        """One micro-batch's sums; `terms` are detached 0-d tensors, which are not waited for."""
        for name, value in terms.items():
            self._terms[name] = self._terms[name] + value if name in self._terms else value
        self._tokens += batch.num_tokens
        self._positions += batch.num_positions

    def end_step(self, counts: dict[str, int], data_seconds: float) -> None:
        """A step is over; `counts` are its global counts."""
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value
        self._data_seconds += data_seconds
        self._steps += 1

    def close_interval(self) -> Interval:
        """The interval's totals over ranks, on every rank; starts a new one. Collective."""
        names = sorted(self._terms)
        local = [float(self._terms[name]) for name in names]
        local += [self._tokens, self._positions, self._data_seconds]
        summed = distributed.sum_over_ranks(torch.tensor(local, dtype=torch.float64)).tolist()
        *terms, tokens, positions, data_seconds = summed
        interval = Interval(
            terms=dict(zip(names, terms, strict=True)),
            counts=self._counts,
            steps=self._steps,
            tokens=int(tokens),
            positions=int(positions),
            seconds=time.perf_counter() - self._start,
            data_seconds=data_seconds / torch.distributed.get_world_size(),
        )
        self._restart()
        return interval


class Board:
    """TensorBoard events of a run; writes on rank 0 only, does nothing elsewhere."""

    def __init__(self, folder: Path, world: World, step: int) -> None:
        """`step`: the step to continue from. Later points of an interrupted run are purged."""
        self._writer = SummaryWriter(str(folder), purge_step=step + 1) if world.rank == 0 else None

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Write scalars by tag."""
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a text; it is shown verbatim, not as Markdown."""
        if self._writer is not None:
            self._writer.add_text(tag, "\n".join("    " + line for line in text.splitlines()), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old content or the new, never half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def tag(term: str) -> str:
    """The TensorBoard tag of a term of the head loss."""
    if term.startswith("ce_"):
        return f"loss/{term.removeprefix('ce_')}"
    if term.startswith("correct_"):
        return f"accuracy/{term.removeprefix('correct_')}_tokens"
    return "loss/mi" if term == "mi" else f"mi/{term.removeprefix('mi_')}"
