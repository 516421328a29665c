"""Variational information distillation: how much the student's states tell about the teacher's.

Ahn et al., CVPR 2019, arXiv 1904.05835, equations 2 to 5. With states t [D_t] of the teacher and s [D] of
the student, and a Gaussian q(t | s) = N(W s + b, diag exp g),

    I(t; s) = H(t) - H(t | s) >= H(t) + E[log q(t | s)],

so that minimising -log q, up to the constant (D_t / 2) ln 2 pi, maximises a lower bound. W, b and g are
learned with the student and thrown away. With the residual r = t - W s - b the loss of a token is the mean
over the D_t dimensions of

    (r^2 exp(-g) + g) / 2.

The paper's variance is softplus(a) + epsilon; its logarithm needs no floor, and its gradient is
(1 - r^2 exp(-g)) / 2 whatever g is.

With e = (W s + b - t) exp(-g) / D_t the gradients are dL/ds = e W, dL/dW = e^T s, dL/db = sum_t e and
dL/dg = (N - sum_t r^2 exp(-g)) / (2 D_t). They are computed during the forward pass, chunk by chunk, because
r exists only then, for as many tokens as fit `chunk_bytes`; r becomes e in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ibdistill.ops import custom
from ibdistill.ops.implementation import choose
from ibdistill.ops.linear import ChunkedLinear

CHUNK_BYTES = 8 << 20
"""Default bound of the buffer of residuals."""


def vid_loss(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor,
    log_variance: Tensor,
    *,
    impl: str = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Sum over tokens of the mean over dimensions of the Gaussian negative log likelihood, in nats.

    Args:
        student: hidden states [N, D], N may be 0.
        teacher: hidden states [N, D_t] of the same tokens. No gradient.
        weight: the map's matrix W [D_t, D].
        bias: b [D_t].
        log_variance: g [D_t], logarithm of the variance of each of the teacher's dimensions.
        impl: triton (on a GPU, or anywhere under TRITON_INTERPRET=1), torch, or auto: triton for tensors on
            a GPU where triton is installed, but not for float64.
        chunk_bytes: at most this much memory for residuals (at least one token's).

    All may be float32, bfloat16, float16 or float64, each its own; sums are accumulated in float32
    (float64 for a float64 weight).

    Returns:
        The sum, 0-d float32 (float64 for a float64 weight), without the constant ln(2 pi) / 2 per token. It
        has gradients for student, weight, bias and log_variance, is differentiable once, and backward
        may be called again with retain_graph.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, unknown impl, impl = triton where it can't run.
    """
    _check(student, teacher, weight, bias, log_variance)
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes = {chunk_bytes} must be positive")
    parameters = student, weight, bias, log_variance
    return _vid_loss(*parameters, teacher.detach(), impl, chunk_bytes, custom.needs_of(parameters))[0]


@torch.library.custom_op("ibdistill::vid_loss", mutates_args=())
def _vid_loss(
    student: Tensor,
    weight: Tensor,
    bias: Tensor,
    log_variance: Tensor,
    teacher: Tensor,
    impl: str,
    chunk_bytes: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The sum and the gradients that are needed."""
    absorb = absorb_torch
    if choose("VID loss", impl, weight) == "triton":
        from ibdistill.ops.vid.triton import absorb
    with torch.autocast(student.device.type, enabled=False):
        return compute(student, weight, bias, log_variance, teacher, absorb, chunk_bytes, list(needs))


@_vid_loss.register_fake
def _fake(student, weight, bias, log_variance, teacher, impl, chunk_bytes, needs):
    total = student.new_empty((), dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)
    return [total, *custom.fake_gradients((student, weight, bias, log_variance), needs)]


custom.differentiable_once(_vid_loss)


def compute(
    student: Tensor,
    weight: Tensor,
    bias: Tensor,
    log_variance: Tensor,
    teacher: Tensor,
    absorb: Callable,
    chunk_bytes: int,
    needs: list[bool],
) -> list[Tensor]:
    """The sum, and the gradients that are needed of student, weight, bias and log_variance.

    `absorb(y, bias, teacher, precision, squares, d_bias)` does the rest of a chunk's work once y = W s is
    there: adds the columns' sums of squared residuals to squares, and, unless d_bias is None, turns y into
    e and adds its columns' sums to d_bias.
    """
    linear = ChunkedLinear(student, weight, None, (needs[0], needs[1], False))
    dtype, (tokens, width) = linear.accumulator, teacher.shape
    g = log_variance.to(dtype)
    precision, squares = torch.exp(-g), torch.zeros_like(g)
    d_bias = torch.zeros_like(g) if any(needs[:3]) else None
    exact = absorb is absorb_torch
    buffer_dtype = dtype if exact else linear.weight.dtype
    size = max(1, chunk_bytes // (width * buffer_dtype.itemsize))
    buffer = student.new_empty(min(size, tokens), width, dtype=buffer_dtype)
    for a in range(0, tokens, size):
        b = min(a + size, tokens)
        y = linear.forward(a, b, buffer)
        absorb(y, bias, teacher[a:b], precision, squares, d_bias)
        if d_bias is not None:
            linear.add_gradients(y, a, b)
    total = 0.5 / width * (squares @ precision + tokens * g.sum())
    d_log_variance = 0.5 / width * (tokens - squares * precision)
    gradients = (linear.d_hidden, linear.weight_gradient(), d_bias, d_log_variance)
    inputs = (student, weight, bias, log_variance)
    return [total, *(d.to(x.dtype) for d, x, need in zip(gradients, inputs, needs, strict=True) if need)]


def absorb_torch(
    y: Tensor, bias: Tensor, teacher: Tensor, precision: Tensor, squares: Tensor, d_bias: Tensor | None
) -> None:
    """The `absorb` of `compute` in torch."""
    residual = y.add_(bias).sub_(teacher)
    # a norm needs no second buffer for the squares
    squares.add_(torch.linalg.vector_norm(residual, dim=0).square_())
    if d_bias is not None:
        residual.mul_(precision / len(precision))
        d_bias.add_(residual.sum(0))


def _check(student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor, log_variance: Tensor) -> None:
    named = {
        "student": student, "teacher": teacher, "weight": weight, "bias": bias, "log_variance": log_variance,
    }  # fmt: skip
    for name, dims in (("student", "[N, D]"), ("teacher", "[N, D_t]"), ("weight", "[D_t, D]")):
        if named[name].ndim != 2:
            raise ValueError(f"{name} must be {dims}, not {list(named[name].shape)}")
    (tokens, size), width = student.shape, teacher.shape[1]
    if teacher.shape[0] != tokens:
        raise ValueError(
            f"student has {tokens} tokens, teacher {teacher.shape[0]}: they must be states of the same tokens"
        )
    if weight.shape != (width, size) or width == 0:
        raise ValueError(
            f"weight must be [D_t, D] = [{width}, {size}] with D_t >= 1, as the teacher's and the student's"
            f" states are, not {list(weight.shape)}"
        )
    for name in ("bias", "log_variance"):
        if named[name].shape != (width,):
            raise ValueError(f"{name} must be [D_t] = [{width}], not {list(named[name].shape)}")
    for name, x in named.items():
        if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} has dtype {x.dtype}; float64, float32, float16 and bfloat16 are supported"
            )
        if x.device != student.device:
            raise ValueError(f"{name} is on {x.device}, student on {student.device}: put them on one device")
