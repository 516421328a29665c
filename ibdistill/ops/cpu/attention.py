"""Attention with dropout on a CPU, where torch's SDPA has no kernel for it.

Without a kernel SDPA keeps a mask of floats and the probabilities before and after dropout for the backward
pass. Here the probabilities are kept once, with a mask of one byte per element (`ops.cpu.dropout`). The same
holds for a bias that is learned.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibdistill.ops.cpu.dropout import apply_mask, keep_mask


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    rate: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """dropout(softmax(scale query key^T + bias)) value, in the inputs' dtype like transformers' eager one.

    Args:
        query: [B, H, T, D], on a CPU.
        key, value: [B, H, S, D] and [B, H, S, E].
        bias: broadcasts to [B, H, T, S], learned or not.
        mask: broadcasts likewise; bool, True where a query sees a key, or floats that are added. A query that
            sees no key weighs all of them alike.
        rate: of dropout, in [0, 1).
        scale: of the scores, before the bias is added.

    Returns:
        [B, H, T, E], differentiable once for query, key, value and bias.
    """
    return _Attention.apply(query, key, value, bias, mask, rate, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, mask, rate: float, scale: float) -> Tensor:
        scores = query @ key.mT
        if scale != 1:
            scores.mul_(scale)
        if bias is not None:
            scores.add_(bias)
        if mask is not None and mask.dtype == torch.bool:
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores.add_(mask)
        p = torch.softmax(scores, -1)
        keep, factor = keep_mask(p, rate) if rate else (None, 1.0)
        ctx.save_for_backward(query, key, value, p, keep)
        ctx.scale, ctx.factor, ctx.bias_shape = scale, factor, None if bias is None else bias.shape
        return (p if keep is None else apply_mask(p, keep, factor)) @ value

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        query, key, value, p, keep = ctx.saved_tensors
        dropped, d_p = p, gradient @ value.mT
        if keep is not None:
            dropped, d_p = apply_mask(p, keep, ctx.factor), apply_mask(d_p, keep, ctx.factor)
        d_value = dropped.mT @ gradient
        d_scores = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype)
        d_bias = d_scores.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[3] else None
        if ctx.scale != 1:
            d_scores = d_scores * ctx.scale
        return d_scores @ key, d_scores.mT @ query, d_value, d_bias, None, None, None
