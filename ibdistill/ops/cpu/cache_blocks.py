"""Elementwise passes over logits in blocks that stay in a CPU core's cache from one operation to the next."""

from __future__ import annotations

from torch import Tensor

CACHED_BYTES = 1 << 20
"""Bytes of logits in a block that several operations work on in turn: two such blocks fit a core's cache."""


def cached_rows(z: Tensor) -> int:
    """The number of rows of z [rows, V] that make CACHED_BYTES, at least four."""
    return max(4, CACHED_BYTES // (z.shape[1] * z.element_size()))


def exp_times_(log_p: Tensor, factor: Tensor) -> Tensor:
    """Replace log_p [rows, V] by exp(log_p) factor[:, None], and return it. `factor` is [rows]."""
    size = cached_rows(log_p)
    for block, its_factor in zip(log_p.split(size), factor.split(size), strict=True):
        block.exp_().mul_(its_factor[:, None])
    return log_p
