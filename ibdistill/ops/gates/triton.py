"""The kernels of `gates.api`: a program takes a row of the hash, 16 bytes per thread in bfloat16."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibdistill.ops.dropout_hash import ROW, factor
from ibdistill.ops.dropout_kernel import keep


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """The activation's value and its derivative."""
    if KIND == "relu":
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    elif KIND == "silu":
        share = tl.sigmoid(x)
        return x * share, share * (1 + x * (1 - share))
    else:
        # 0.5 (1 + tanh(y)) is sigmoid(2 y), with y = sqrt(2 / pi) (x + 0.044715 x^3)
        share = tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))
        slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
        return x * share, share + x * share * (1 - share) * slope


@triton.jit
def _kept(seed, i_row, o_x, level, ROW: tl.constexpr):
    """`keep` of the columns of one row, [ROW]."""
    row = i_row + tl.zeros([1], tl.int32)
    return tl.reshape(keep(seed, row, o_x, level), [ROW])


@triton.jit(do_not_specialize=["level"])
def forward_kernel(
    gate, up, seed, out, n, level, factor,
    KIND: tl.constexpr, GATED: tl.constexpr, DROPS: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """One row of out."""
    i_row, o_x = tl.program_id(0), tl.arange(0, ROW)
    offset = i_row.to(tl.int64) * ROW + o_x
    value, _ = _activation(tl.load(gate + offset, mask=offset < n, other=0.0).to(tl.float32), KIND)
    if GATED:
        value *= tl.load(up + offset, mask=offset < n, other=0.0).to(tl.float32)
    if DROPS:
        value = tl.where(_kept(seed, i_row, o_x, level, ROW), value * factor, 0.0)
    tl.store(out + offset, value.to(out.dtype.element_ty), mask=offset < n)


@triton.jit(do_not_specialize=["level"])
def backward_kernel(
    gradient, gate, up, seed, d_gate, d_up, n, level, factor,
    KIND: tl.constexpr, GATED: tl.constexpr, DROPS: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """One row of d_gate and d_up. Without a gate, a ReLU's `gate` is its result."""
    i_row, o_x = tl.program_id(0), tl.arange(0, ROW)
    offset = i_row.to(tl.int64) * ROW + o_x
    value, slope = _activation(tl.load(gate + offset, mask=offset < n, other=0.0).to(tl.float32), KIND)
    d = tl.load(gradient + offset, mask=offset < n, other=0.0).to(tl.float32)
    if DROPS:
        d *= factor
        if GATED or KIND != "relu":
            d = tl.where(_kept(seed, i_row, o_x, level, ROW), d, 0.0)
    if GATED:
        tl.store(d_up + offset, (d * value).to(d_up.dtype.element_ty), mask=offset < n)
        d *= tl.load(up + offset, mask=offset < n, other=0.0).to(tl.float32)
    tl.store(d_gate + offset, (d * slope).to(d_gate.dtype.element_ty), mask=offset < n)


def _launch(kernel, gate: Tensor, up: Tensor | None, tensors, level: int, activation: str) -> None:
    settings = {"KIND": activation, "GATED": up is not None, "DROPS": level > 0, "ROW": ROW}
    n = gate.numel()  # a multiple of 16 in every model, from which the compiler makes loads of 16 bytes
    if n == 0:
        return
    with torch.cuda.device(gate.device) if gate.device.type == "cuda" else contextlib.nullcontext():
        kernel[triton.cdiv(n, ROW),](*tensors, n, level, factor(level), **settings, num_warps=4)


def forward(gate: Tensor, up: Tensor | None, seed: Tensor, level: int, activation: str) -> Tensor:
    """The forward pass of `activate`."""
    gate, up = gate.contiguous(), None if up is None else up.contiguous()
    out = torch.empty_like(gate)
    # without a gate the kernel gets a pointer that it never reads
    _launch(forward_kernel, gate, up, (gate, gate if up is None else up, seed, out), level, activation)
    return out


def backward(
    gradient: Tensor, gate: Tensor, up: Tensor | None, seed: Tensor, level: int, activation: str
) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up; the second is empty where there is no gate."""
    gradient, gate = gradient.contiguous(), gate.contiguous()
    up = None if up is None else up.contiguous()
    d_gate, d_up = torch.empty_like(gate), gate.new_empty(0 if up is None else gate.shape)
    tensors = gradient, gate, gate if up is None else up, seed, d_gate, d_gate if up is None else d_up
    _launch(backward_kernel, gate, up, tensors, level, activation)
    return d_gate, d_up
