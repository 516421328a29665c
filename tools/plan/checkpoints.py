"""How many bytes a checkpoint has, and how long it holds up the steps.

As `ibdistill/training/checkpoint_write.py` does it: each rank copies its states to the host's memory, for
which the step waits, and writes them beside the steps that follow. The next checkpoint waits until this one
is there. Where the copy would take more than half of the memory that is free for a rank, the step waits for
the files. Page-locking the memory of the copy is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from ibdistill.planning.footprint import WIDTH, Sizes, Zero
from plan.accelerators import Accelerator


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of all ranks. Seconds are predictions."""

    bytes: int
    """Of all files together."""
    copied: int
    """Of the rank that writes most, rank 0."""
    copying: float
    """Seconds for its copy in the host's memory."""
    writing: float
    """Seconds until all files are written."""
    beside: bool
    """Whether they are written beside the steps."""
    every: int
    """Steps between two checkpoints."""

    def stall(self, step: float) -> float:
        """Seconds that each step waits on average, where it would take `step` seconds without."""
        if not self.beside:
            return self.writing / self.every
        return (self.copying + max(0.0, self.writing - self.every * step)) / self.every


def sizes_of(sizes: Sizes, precision: str, zero: Zero, ranks: int) -> tuple[int, int]:
    """Bytes that rank 0 writes, and that all ranks write.

    Rank 0 writes the weights, but in stage 3 they are made of the master copies, and each rank writes its
    share of the frozen ones. The master copy and the moments are shares from stage 1 on.
    """
    width, trained = WIDTH[precision], sum(n for n, is_trained in sizes if is_trained)
    total = sum(n for n, _ in sizes)
    if not zero.stage:
        one = width * total + (12 if precision == "bf16" else 8) * trained
        return one, one
    share = 12 * -(-trained // ranks)
    if zero.stage == 3:
        share += width * -(-(total - trained) // ranks)
        return share, ranks * share
    return share + width * total, ranks * share + width * total


def checkpoint(
    sizes: Sizes, precision: str, zero: Zero, ranks: int, gpu: Accelerator, *, every: int, free: int
) -> Checkpoint:
    """What a checkpoint every so many steps takes; `free`: bytes of the host's memory that a rank has."""
    copied, size = sizes_of(sizes, precision, zero, ranks)
    copying, writing = copied / (gpu.host_gbs * 1e9), size / (gpu.storage_gbs * 1e9)
    return Checkpoint(size, copied, copying, writing, copied <= free / 2, every)
