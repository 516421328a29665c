"""The elementwise part of VID in Triton: one pass over a chunk of residuals, forward and backward at once.

The GEMM has written y = W s of a chunk in its own dtype. One kernel reads y and the teacher's states, and
writes e = (y + b - t) exp(-g) / D_t in the place of y: 6 bytes per bfloat16 element, or 4 without gradients.
Its two column sums, of squared residuals and of e, give the loss and the gradients of b and g. A program owns
a block of columns and ROWS rows and writes partial sums; torch adds these in a fixed order, so that results
are reproducible to the bit.

`ops.launch` gives the size of a block of columns. ROWS is chosen such that the partial sums, written and
read, add no more than 16 / ROWS = 1 byte per element, and 2048 tokens of 1024 dimensions still make 128
programs.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibdistill.ops import launch

ROWS = 16


@triton.jit(do_not_specialize=["rows"])
def residual_kernel(
    y, y_stride, teacher, teacher_stride, bias, precision, parts, rows, D_t, scale,
    ROWS: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one block of columns: parts [row blocks, 2, D_t] of the sums, and e in the place of y."""
    i_r, i_d = tl.program_id(0), tl.program_id(1)
    o_d = i_d * BLOCK + tl.arange(0, BLOCK)
    inside = o_d < D_t
    b = tl.load(bias + o_d, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(precision + o_d, mask=inside, other=0.0) * scale
    first = i_r * ROWS
    y_row = y + first.to(tl.int64) * y_stride + o_d
    teacher_row = teacher + first.to(tl.int64) * teacher_stride + o_d
    squares, sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for _ in range(first, tl.minimum(first + ROWS, rows)):
        t = tl.load(teacher_row, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(y_row, mask=inside, other=0.0).to(tl.float32) + b - t
        squares += r * r
        if WRITE:
            e = r * p
            sums += e
            tl.store(y_row, e.to(y.dtype.element_ty), mask=inside)
        y_row += y_stride
        teacher_row += teacher_stride
    out = parts + i_r.to(tl.int64) * 2 * D_t + o_d
    tl.store(out, squares, mask=inside)
    if WRITE:
        tl.store(out + D_t, sums, mask=inside)


def absorb(
    y: Tensor, bias: Tensor, teacher: Tensor, precision: Tensor, squares: Tensor, d_bias: Tensor | None
) -> None:
    """The `absorb` of `vid.api.compute` in Triton."""
    rows, width = y.shape
    teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
    block = launch.column_block(width, y.element_size())
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, block))
    parts = squares.new_empty(grid[0], 2, width)
    with torch.cuda.device(y.device) if y.device.type == "cuda" else contextlib.nullcontext():
        residual_kernel[grid](
            y, y.stride(0), teacher, teacher.stride(0), bias.float(), precision, parts,
            rows, width, 1 / width,
            ROWS=ROWS, WRITE=d_bias is not None, BLOCK=block, num_warps=launch.WARPS,
        )  # fmt: skip
    squares.add_(parts[:, 0].sum(0))
    if d_bias is not None:
        d_bias.add_(parts[:, 1].sum(0))
