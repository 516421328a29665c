"""Elementwise parts of transformer layers that keep little for the backward pass.

Written as single operations, autograd keeps every factor of every product: T5's norm three tensors of its
input's size, its gated feed-forward four of the wide one, and on a CPU each dropout a mask of floats. Here a
norm keeps its input and one number a row, a gate its two inputs, a mask a byte an element; the rest is made
again in the backward pass, by operations that cost next to nothing beside the matrix products. Attention
keeps its probabilities and such a mask; torch's, which on a CPU has no kernel for dropout or for a bias that
is learned, keeps the mask of floats and the dropped probabilities too.

Masks on a CPU are drawn 16 bits an element, four elements at a time: torch's own Bernoulli sampler took 5
times as long on a CPU that isn't Intel's (6.7 against 1.4 ns an element).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEVELS = 1 << 16
"""A CPU's rates are multiples of 1 / LEVELS; the scale is the rounded rate's, so that means are exact."""


def dropout(x: Tensor, rate: float) -> Tensor:
    """Dropout of any tensor at a rate in [0, 1), scaled by 1 / (1 - rate) to keep the mean."""
    if rate == 0 or x.device.type != "cpu":  # a GPU has one kernel for it, with a mask of bytes
        return nn.functional.dropout(x, rate)
    return _Dropout.apply(x, rate)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """T5's norm: weight x / sqrt(mean(x^2) + epsilon) over the last dimension, in the dtype of `weight`.

    Args:
        x: [..., D], any floating dtype.
        weight: [D].

    Sums are accumulated in float32 (float64 for a float64 x); x is divided before it is rounded to the
    weight's dtype, and rounded before it is multiplied, as transformers does.
    """
    return _RMSNorm.apply(x, weight, epsilon)


def gated_gelu(gate: Tensor, up: Tensor, rate: float) -> Tensor:
    """dropout(gelu(gate) up), with the tanh form of GELU; `gate` and `up` have one shape and dtype."""
    return _GatedGELU.apply(gate, up, rate)


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
        query: [B, H, T, D].
        key, value: [B, H, S, D] and [B, H, S, E].
        bias: broadcasts to [B, H, T, S], learned or not.
        mask: broadcasts likewise; bool, True where a query sees a key, or floats that are added. A query that
            sees no key weighs all of them alike.

    Returns [B, H, T, E].
    """
    return _Attention.apply(query, key, value, bias, mask, rate, scale)


class Dropout(nn.Dropout):
    """`nn.Dropout` by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


def _keep(x: Tensor, rate: float) -> tuple[Tensor, float]:
    """A bool mask of the elements of x that stay, and what they are multiplied with."""
    if x.device.type != "cpu":
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - rate), 1 / (1 - rate)
    dropped = round(rate * LEVELS)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    mask = words.view(torch.int16)[: x.numel()] >= dropped - LEVELS // 2
    return mask.view(x.shape), LEVELS / (LEVELS - dropped)


def _masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    # products of float and bool are not vectorised
    return mask.to(x.dtype).mul_(x).mul_(scale)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rate: float) -> Tensor:
        mask, ctx.scale = _keep(x, rate)
        ctx.save_for_backward(mask)
        return _masked(x, mask, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return _masked(gradient, *ctx.saved_tensors, ctx.scale), None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).to(weight.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        product = gradient * normed
        mean = product @ weight.to(product.dtype) / x.shape[-1]
        d_x = (gradient * weight.to(inverse.dtype)).sub_(normed.mul_(mean[..., None])).mul_(inverse)
        d_weight = (
            product.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        )
        return d_x.to(x.dtype), d_weight, None


class _GatedGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, rate: float) -> Tensor:
        out = nn.functional.gelu(gate, approximate="tanh").mul_(up)
        mask, ctx.scale = _keep(out, rate) if rate else (None, 1.0)
        ctx.save_for_backward(gate, up, mask)
        return out if mask is None else _masked(out, mask, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        gate, up, mask = ctx.saved_tensors
        if mask is not None:
            gradient = _masked(gradient, mask, ctx.scale)
        d_gate = torch.ops.aten.gelu_backward(gradient * up, gate, approximate="tanh")
        return d_gate, nn.functional.gelu(gate, approximate="tanh").mul_(gradient), None


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
        keep, factor = _keep(p, rate) if rate else (None, 1.0)
        ctx.save_for_backward(query, key, value, p, keep)
        ctx.scale, ctx.factor, ctx.bias_shape = scale, factor, None if bias is None else bias.shape
        return (p if keep is None else _masked(p, keep, factor)) @ value

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        query, key, value, p, keep = ctx.saved_tensors
        dropped, d_p = p, gradient @ value.mT
        if keep is not None:
            dropped, d_p = _masked(p, keep, ctx.factor), _masked(d_p, keep, ctx.factor)
        d_value = dropped.mT @ gradient
        d_scores = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype)
        d_bias = d_scores.sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[3] else None
        if ctx.scale != 1:
            d_scores = d_scores * ctx.scale
        return d_scores @ key, d_scores.mT @ query, d_value, d_bias, None, None, None
