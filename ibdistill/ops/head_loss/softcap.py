"""Soft-capped logits: cap tanh(z / cap) in the place of z, as in Gemma 2 (arXiv 2408.00118, section 2).

The derivative follows from the capped logit c alone, dc/dz = 1 - (c / cap)^2, so z itself need not be kept.
A constant factor between head and logits needs nothing here: it is applied to the states that enter the head.
"""

from __future__ import annotations

import math

from torch import Tensor

from ibdistill.ops.cpu.cache_blocks import cached_rows


def check_softcap(name: str, cap: float | None) -> None:
    """Raise ValueError unless `cap` is None (the logits are not capped) or a positive number."""
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(f"{name} = {cap} must be positive and finite; None leaves the logits as they are")


def capped(z: Tensor, cap: float | None) -> Tensor:
    """The capped logits of z [..., V], a new tensor with gradients; z itself without a cap."""
    return z if cap is None else (z / cap).tanh() * cap


def cap_(z: Tensor, cap: float | None, slope: Tensor | None = None) -> Tensor:
    """Cap z [rows, V] in place and return it; `slope` [rows, V] gets the derivative."""
    if cap is None:
        return z
    size = cached_rows(z)
    for row in range(0, len(z), size):
        block = z[row : row + size].div_(cap).tanh_()
        if slope is not None:
            slope[row : row + size].copy_(block).square_().neg_().add_(1)
        block.mul_(cap)
    return z
