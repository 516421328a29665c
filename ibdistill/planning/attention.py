"""Attention with the memory that a device's kernels take, for dry runs.

Fake tensors are on the CPU. Which form of a layer runs is asked of `ops.implementation.on_gpu`, which answers
for the planned device here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ibdistill.ops import implementation


class _FusedAttention(torch.autograd.Function):
    """An attention with the memory of a fused kernel, which keeps its inputs, its output and a logarithm per
    row."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        out = torch.empty_like(query[..., :1]).expand(*query.shape[:-1], value.shape[-1]).contiguous()
        ctx.save_for_backward(query, key, value, mask, out, torch.empty(query.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx, _):
        inputs = ctx.saved_tensors[:4]
        return tuple(
            torch.empty_like(x) if need else None
            for x, need in zip(inputs, ctx.needs_input_grad, strict=True)
        )


@contextmanager
def attention_of(device: str) -> Iterator[None]:
    """Within this context attention takes the memory of a GPU's fused kernel; for a CPU nothing changes."""
    if device == "cpu":
        yield
        return
    originals = nn.functional.scaled_dot_product_attention, implementation.on_gpu

    def fused(query, key, value, attn_mask=None, *args, **kwargs):
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # with grouped queries a kernel reads each key for all queries of its group
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return _FusedAttention.apply(query, key, value, attn_mask)

    nn.functional.scaled_dot_product_attention = fused
    implementation.on_gpu = lambda x: True
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention, implementation.on_gpu = originals
