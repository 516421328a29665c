"""Block sizes of the Triton kernels: a heuristic on (V, D, dtype, device), the same for every batch.

16 bytes per thread and load are what a GPU moves best, so a block has 16 bytes for each thread of WARPS
warps, 32 lanes wide on NVIDIA, 64 on AMD's CDNA. A kernel with one program per row takes LOADS such blocks
at a time, or too few loads are in flight per program. A width V below the block cuts it to the next power
of two. D only matters to the GEMM, whose blocks are the vendor's.

Nothing is tuned at run time. The environment variables IBDISTILL_WARPS (1, 2, 4, 8, 16; default 4) and
IBDISTILL_LOADS (1, 2, 4; default 2) replace the two numbers; `tools/bench/head_loss.py --tune` measures all
pairs on the GPU at hand and prints them.
"""

from __future__ import annotations

import os

import torch
import triton


def _choice(name: str, default: int, choices: tuple[int, ...]) -> int:
    value = os.environ.get(name, str(default))
    if value not in map(str, choices):
        raise ValueError(f"{name} = {value!r} is not one of: {', '.join(map(str, choices))}")
    return int(value)


WARPS_CHOICES, LOADS_CHOICES = (1, 2, 4, 8, 16), (1, 2, 4)
WARPS = _choice("IBDISTILL_WARPS", 4, WARPS_CHOICES)
LOADS = _choice("IBDISTILL_LOADS", 2, LOADS_CHOICES)
LANES = 64 if torch.version.hip else 32


def column_block(width: int, itemsize: int) -> int:
    """Elements of a block of columns, for kernels with V / block programs per sequence."""
    return min(16 // itemsize * LANES * WARPS, triton.next_power_of_2(max(width, 16)))


def row_block(width: int, itemsize: int) -> int:
    """Elements of a block of a row, for kernels with one program per row."""
    return min(LOADS * 16 // itemsize * LANES * WARPS, triton.next_power_of_2(max(width, 16)))
