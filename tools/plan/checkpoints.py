"""How many bytes a checkpoint has, and how long it holds up the steps.

As `ibdistill/training/checkpoint_write.py` does it: each rank copies its states to the host's memory, for
which the step waits, and writes them beside the steps that follow. The next checkpoint waits until this one
is there. Where the copy would take more than half of the memory that is free for a rank, the step waits for
the files; with `run.local_dir` only for those on the nodes' own disks, from where they are copied beside the
steps. Page-locking the memory of the copy is left out.
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
    beside: bool
    """Whether it is copied to the host's memory, and written beside the steps."""
    held: float
    """Seconds that the next step waits: for that copy, or for the files."""
    writing: float
    """Seconds after these until all files are in the run's folder; 0 where the step waited for them."""
    every: int
    """Steps between two checkpoints."""

    def stall(self, step: float) -> float:
        """Seconds that each step waits on average, where it would take `step` seconds without."""
        return (self.held + max(0.0, self.writing - self.every * step)) / self.every


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
    sizes: Sizes,
    precision: str,
    zero: Zero,
    ranks: int,
    gpu: Accelerator,
    *,
    every: int,
    free: int,
    on_node: int = 0,
) -> Checkpoint:
    """What a checkpoint every so many steps takes.

    `free`: bytes of the host's memory that a rank has. `on_node`: ranks that write to their node's own disk
    first; 0: files are written to the run's folder at once.
    """
    copied, size = sizes_of(sizes, precision, zero, ranks)
    fits, shared = copied <= free / 2, size / (gpu.storage_gbs * 1e9)
    others = (size - copied) // max(1, ranks - 1)  # of each rank but the first
    local = (copied + (on_node - 1) * others) / (gpu.local_gbs * 1e9) if on_node else 0.0
    if fits:
        held, writing = copied / (gpu.host_gbs * 1e9), local + shared
    else:
        held, writing = (local, shared) if on_node else (shared, 0.0)
    return Checkpoint(size, copied, fits, held, writing, every)
