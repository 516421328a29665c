"""The hash of `dropout_hash` in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mix(x):
    """A bijection of 32 bits in which each bit of x moves half of the result's bits."""
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= x >> 13
    x *= 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def keep(seed, rows, o_n, level):
    """Whether the elements at rows [M] and columns [N] stay: [M, N]."""
    word = tl.load(seed)
    low, high = (word & 0xFFFFFFFF).to(tl.uint32), (word >> 32).to(tl.uint32)
    first = _mix(rows.to(tl.uint32) + low)
    second = _mix(first ^ high)
    x = first[:, None] ^ o_n.to(tl.uint32)[None, :]
    x ^= x >> 16
    x *= 0x85EBCA6B
    x ^= second[:, None]
    x ^= x >> 13
    x *= 0xC2B2AE35
    x ^= x >> 16
    return (x >> 8).to(tl.int32) >= level
