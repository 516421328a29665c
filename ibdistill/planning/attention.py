"""Attention and norms with the memory that a device's kernels take, for dry runs.

T5's attention with a bias is an op of its own, which makes shapes on fake tensors. Whether a layer calls it,
or another form for a GPU, is asked of `ops.implementation.on_gpu`, which answers for the planned device here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn

from ibdistill.models import sequence_parallel
from ibdistill.ops import implementation


class _FusedAttention(torch.autograd.Function):
    """An attention with the memory of a fused kernel, which keeps its inputs, its output and a logarithm per
    row."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        out = query.new_empty(*query.shape[:-1], value.shape[-1]).zero_()  # in place of the kernel
        ctx.save_for_backward(query, key, value, mask, out, torch.empty(query.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx, _):
        inputs = ctx.saved_tensors[:4]
        torch.empty(1).zero_()  # in place of the kernel
        return tuple(
            torch.empty_like(x) if need else None
            for x, need in zip(inputs, ctx.needs_input_grad, strict=True)
        )


class _FusedNorm(torch.autograd.Function):
    """A norm with the memory of torch's kernel, which keeps its input and a number per row."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x).zero_()  # in place of the kernel

    @staticmethod
    def backward(ctx, _):
        x, weight, _ = ctx.saved_tensors
        d_x = torch.empty_like(x).zero_()  # in place of the kernel
        return d_x, torch.empty_like(weight) if ctx.needs_input_grad[1] else None


@contextmanager
def _shared_by(ranks: int) -> Iterator[None]:
    """Within this context attention takes the memory of one of so many ranks that share its rows' tokens."""
    if ranks == 1:
        yield
        return
    whole, layer = nn.functional.scaled_dot_product_attention, SimpleNamespace(is_causal=True, training=True)

    def attend(query, key, value, attn_mask=None, **settings):
        rows = len(query)
        # rows of equal length, one behind the other
        packed = [x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value)]

        def inner(layer, query, key, value, lengths):
            return whole(query, key, value, None, **settings).transpose(1, 2), None

        out = sequence_parallel.attend(inner, layer, *packed, torch.empty(0))[0]
        return out[0].unflatten(0, (rows, -1)).transpose(1, 2)

    group = SimpleNamespace(size=lambda: ranks)
    exchanged = lambda parts, *_: torch.empty_like(parts.contiguous()).zero_()  # noqa: E731
    with (
        mock.patch.object(sequence_parallel, "_group", group),
        mock.patch.object(sequence_parallel, "_exchanged", exchanged),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", attend),
    ):
        yield


@contextmanager
def attention_of(device: str, shared: int = 1) -> Iterator[None]:
    """Within this context attention and norms take the memory of a GPU's kernels; a CPU's stay.

    `shared`: how many ranks share each sequence. Each attends over all its tokens with a part of the heads
    (`models.sequence_parallel`); nothing is sent here.
    """
    if device == "cpu":
        with _shared_by(shared):
            yield
        return
    originals = nn.functional.scaled_dot_product_attention, nn.functional.rms_norm, implementation.on_gpu

    def fused(query, key, value, attn_mask=None, *args, **kwargs):
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # with grouped queries a kernel reads each key for all queries of its group
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return _FusedAttention.apply(query, key, value, attn_mask)

    nn.functional.scaled_dot_product_attention = fused
    nn.functional.rms_norm = lambda x, shape, weight, epsilon: _FusedNorm.apply(x, weight)
    implementation.on_gpu = lambda x: True
    try:
        with _shared_by(shared):
            yield
    finally:
        nn.functional.scaled_dot_product_attention, nn.functional.rms_norm, implementation.on_gpu = originals
