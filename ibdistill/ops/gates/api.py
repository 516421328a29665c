"""dropout(activation(gate) up) of a feed-forward layer as one kernel forward and one backward.

As separate operations this takes three to four kernels forward and as many backward. Each of them reads and
writes tensors of the model's widest size, and the activation's result and a mask are kept beside the inputs.
Here the backward pass computes the activation again, and the mask from a hash (`ops.dropout_hash`). A ReLU
without a gate keeps only its result, which the next linear map keeps too: where that is 0, no gradient
passes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ibdistill.ops import custom
from ibdistill.ops.checks import check_choice
from ibdistill.ops.dropout_hash import ROW, draw, factor, keep
from ibdistill.ops.implementation import choose

ACTIVATIONS = ("gelu", "silu", "relu")
"""gelu is the tanh form."""


def activate(
    gate: Tensor, up: Tensor | None = None, *, activation: str, rate: float = 0.0, impl: str = "auto"
) -> Tensor:
    """dropout(activation(gate) up), rounded once.

    Args:
        gate: of any shape and floating dtype.
        up: of gate's shape and dtype; None: 1.
        activation: one of ACTIVATIONS.
        rate: of dropout, in [0, 1); its seed is drawn from torch's generator of the device.
        impl: triton, torch or auto, as in `biased_attention`.

    Returns:
        A tensor like gate, differentiable once for gate and up.

    Raises:
        ValueError: an unknown activation or impl, another shape or dtype of up, or impl = triton where it
            can't run.
    """
    check_choice("activation", activation, ACTIVATIONS)
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        raise ValueError(
            f"up must be {gate.dtype} {list(gate.shape)} as gate is, not {up.dtype} {list(up.shape)}"
        )
    seed, level, _ = draw(rate, gate.device)
    return _Activate.apply(gate, up, seed, level, activation, impl)


def _forward(gate: Tensor, up: Tensor | None, seed: Tensor, level: int, activation: str, impl: str) -> Tensor:
    if choose("activation", impl, gate) == "triton":
        from ibdistill.ops.gates import triton

        return triton.forward(gate, up, seed, level, activation)
    value, _ = _activation(gate.to(_wide(gate)), activation)
    value = value if up is None else value * up
    return _dropped(value, seed, level).to(gate.dtype)


def _backward(
    gradient: Tensor, gate: Tensor, up: Tensor | None, seed: Tensor, level: int, activation: str, impl: str
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; the second is empty where there is no gate."""
    if choose("activation", impl, gate) == "triton":
        from ibdistill.ops.gates import triton

        return triton.backward(gradient, gate, up, seed, level, activation)
    value, slope = _activation(gate.to(_wide(gate)), activation)
    if activation == "relu" and up is None:  # gate is the result, which is 0 where dropout was
        return (gradient * slope * factor(level)).to(gate.dtype), gate.new_empty(0)
    gradient = _dropped(gradient.to(value.dtype), seed, level)
    d_up = gate.new_empty(0) if up is None else (gradient * value).to(gate.dtype)
    return (gradient * slope * (1 if up is None else up)).to(gate.dtype), d_up


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _activation(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation's value and its derivative."""
    if activation == "relu":
        return x.relu(), (x > 0).to(x.dtype)
    if activation == "silu":
        share = torch.sigmoid(x)
        return x * share, share * (1 + x * (1 - share))
    slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="tanh")
    return F.gelu(x, approximate="tanh"), slope


def _dropped(x: Tensor, seed: Tensor, level: int) -> Tensor:
    if not level:
        return x
    rows, columns = torch.arange(-(-x.numel() // ROW), device=x.device), torch.arange(ROW, device=x.device)
    # some rows at a time: the hash takes numbers of 8 bytes
    kept = torch.cat([keep(seed, some[:, None], columns, level) for some in rows.split(4096)])
    return x * kept.flatten()[: x.numel()].view(x.shape) * factor(level)


def _fake_forward(gate, up, seed, level, activation, impl):
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _fake_backward(gradient, gate, up, seed, level, activation, impl):
    like = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return like, gate.new_empty(0) if up is None else torch.empty_like(like)


_forward_op = custom.opaque("activate", _forward, _fake_forward)
_backward_op = custom.opaque("activate_backward", _backward, _fake_backward)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, seed, level: int, activation: str, impl: str) -> Tensor:
        out = _forward_op(gate, up, seed, level, activation, impl)
        ctx.save_for_backward(out if activation == "relu" and up is None else gate, up, seed)
        ctx.settings = level, activation, impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        d_gate, d_up = _backward_op(gradient, *ctx.saved_tensors, *ctx.settings)
        return d_gate, d_up if ctx.needs_input_grad[1] else None, None, None, None, None
