"""Dropout that keeps no mask: a hash of (seed, row, column) decides, as often as it is asked.

The mixing function is murmur3's finaliser. A row has two words of the seed's 64 bits; the first one is a
bijection of the row's index, so that no two rows of a call share a stream. `dropout_kernel` is the same in
Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 1 << 24
"""Dropout rates are rounded to multiples of 1 / LEVELS; the scale is the rounded rate's."""
ROW = 1024
"""Elements of a row where a tensor of any shape, flattened, is cut into rows."""
WORD = (1 << 32) - 1


def _mix(x: Tensor) -> Tensor:
    """`_mix` of `dropout_kernel`, of 32 bits in int64, where products wrap as those of 32 bits do."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & WORD
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & WORD
    return x ^ (x >> 16)


def keep(seed: Tensor, rows: Tensor, columns: Tensor, level: int) -> Tensor:
    """Whether the elements at rows [..., 1] and columns [S] stay: a bool [..., S].

    Args:
        seed: int64 [1].
        rows, columns: int64, each below 2^32.
        level: the dropout rate in units of 1 / LEVELS.
    """
    low, high = seed & WORD, (seed >> 32) & WORD
    first = _mix((rows + low) & WORD)
    second = _mix(first ^ high)
    x = first ^ columns
    x = x ^ (x >> 16)
    x = ((x * 0x85EBCA6B) & WORD) ^ second
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & WORD
    x = x ^ (x >> 16)
    return (x >> 8) >= level


def draw(rate: float, device: torch.device) -> tuple[Tensor, int, float]:
    """A seed from torch's generator of the device, the rate's level, and the factor of what stays."""
    level = round(rate * LEVELS)
    seed = torch.empty(1, dtype=torch.int64, device=device)
    return (seed.random_(-(2**63), None) if level else seed), level, factor(level)


def factor(level: int) -> float:
    """What the elements that stay are multiplied with, to keep the mean."""
    return LEVELS / (LEVELS - level)
