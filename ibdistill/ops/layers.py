"""Elementwise parts of transformer layers that keep little for the backward pass.

Where a layer is written as single operations, autograd keeps every factor of every product: three tensors of
the input's size for T5's norm, and four of the wide size for its gated feed-forward. Here a norm keeps its
input and one number per row, a gate keeps its two inputs, and a dropout mask takes one byte per element. The
rest is computed again in the backward pass, by operations that cost next to nothing beside the matrix
products.

On a GPU dropout and the norm are torch's own kernels, and a gate is `ops.gates`. A CPU has other masks and an
attention of its own: see `ops.cpu`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ibdistill.ops import implementation
from ibdistill.ops.cpu.dropout import apply_mask, keep_mask
from ibdistill.ops.gates import activate


def dropout(x: Tensor, rate: float) -> Tensor:
    """Dropout of any tensor at a rate in [0, 1), scaled by 1 / (1 - rate) to keep the mean."""
    if rate == 0:
        return nn.functional.dropout(x, rate)
    if implementation.on_gpu(x):  # one kernel, with a mask of bytes
        return torch.native_dropout(x, rate, True)[0]
    return _Dropout.apply(x, rate)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """T5's norm: weight x / sqrt(mean(x^2) + epsilon) over the last dimension, in the dtype of `weight`.

    Args:
        x: [..., D], any floating dtype.
        weight: [D].
        epsilon: added to the mean of the squares.

    Sums are accumulated in float32 (float64 for a float64 x); x is divided before it is rounded to the
    weight's dtype, and rounded before it is multiplied, as transformers does. On a GPU it is rounded once, at
    the end, by torch's kernel.
    """
    if implementation.on_gpu(x) and x.dtype == weight.dtype:
        return nn.functional.rms_norm(x, x.shape[-1:], weight, epsilon)
    return _RMSNorm.apply(x, weight, epsilon)


def gated_gelu(gate: Tensor, up: Tensor, rate: float) -> Tensor:
    """dropout(gelu(gate) up), with the tanh form of GELU; `gate` and `up` have one shape and dtype."""
    if implementation.on_gpu(gate):
        return activate(gate, up, activation="gelu", rate=rate)
    return _GatedGELU.apply(gate, up, rate)


class Dropout(nn.Dropout):
    """`nn.Dropout` that calls `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """x, of any shape, with dropout at the module's rate in training mode."""
        return dropout(x, self.p) if self.training else x


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rate: float) -> Tensor:
        mask, ctx.scale = keep_mask(x, rate)
        ctx.save_for_backward(mask)
        return apply_mask(x, mask, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return apply_mask(gradient, *ctx.saved_tensors, ctx.scale), None


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
        mask, ctx.scale = keep_mask(out, rate) if rate else (None, 1.0)
        ctx.save_for_backward(gate, up, mask)
        return out if mask is None else apply_mask(out, mask, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        gate, up, mask = ctx.saved_tensors
        if mask is not None:
            gradient = apply_mask(gradient, mask, ctx.scale)
        d_gate = torch.ops.aten.gelu_backward(gradient * up, gate, approximate="tanh")
        return d_gate, nn.functional.gelu(gate, approximate="tanh").mul_(gradient), None
