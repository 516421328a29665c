"""Matrix products in 16 bits on a CPU: where they pay, and how they are added in a wider dtype."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

BLOCK_ROWS = 1024
"""Rows of a product that are made at once where it has to be widened before it is added."""


def multiplies_natively(device: str, dtype: torch.dtype) -> bool:
    """Whether a device's products in a dtype are worth their rounding; else weights are copied to fp32 once.

    Among CPUs this holds for those with AMX and for AMD's with avx512_bf16 (measured on a Zen 4 for a head's
    three products: 1.3 to 2.2 times the rate of fp32 with 160 rows, 2.2 to 3.1 times with 480), but not for
    Intel's with avx512_bf16 alone (0.7 times).
    """
    if device != "cpu" or dtype in (torch.float32, torch.float64):
        return True
    return torch.cpu._is_amx_tile_supported() or (dtype == torch.bfloat16 and _is_amd_with_bf16())


@cache
def _is_amd_with_bf16() -> bool:
    cpu = Path("/proc/cpuinfo")
    text = cpu.read_text() if cpu.is_file() else ""
    return "AuthenticAMD" in text and "avx512_bf16" in text


def add_product_in_blocks(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """total += left right, or total = left right if `is_first`, for a `total` wider than the two factors.

    The product is made BLOCK_ROWS rows at a time: whole, it would be half as large as `total` once more.
    """
    product = left.new_empty(min(BLOCK_ROWS, len(left)), right.shape[1])
    wide = torch.empty_like(product, dtype=total.dtype)
    for target, part in zip(total.split(BLOCK_ROWS), left.split(BLOCK_ROWS), strict=True):
        narrow = torch.mm(part, right, out=product[: len(part)])
        if is_first:
            target.copy_(narrow)
        else:
            target.add_(wide[: len(part)].copy_(narrow))  # a sum of two dtypes would allocate
