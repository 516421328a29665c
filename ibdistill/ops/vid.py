"""Variational information distillation: how much of the teacher's states the student's can tell.

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
dL/dg = (N - sum_t r^2 exp(-g)) / (2 D_t). They are made during the forward pass, chunk by chunk, because
that's when r is there: r exists only for as many tokens as fit `chunk_bytes`, and becomes e in place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibdistill.ops.arguments import check_choice
from ibdistill.ops.linear import ChunkedLinear

CHUNK_BYTES = 8 << 20
"""Default bound of the buffer of residuals."""

IMPLEMENTATIONS = ("auto", "torch")


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
        impl: torch, or auto, which chooses.
        chunk_bytes: at most this much memory for residuals (at least one token's).

    All may be float32, bfloat16, float16 or float64, each its own; sums are accumulated in float32
    (float64 for a float64 weight).

    Returns:
        The sum, 0-d float32 (float64 for a float64 weight), without the constant ln(2 pi) / 2 per token. It
        has gradients for student, weight, bias and log_variance, is differentiable once, and backward
        may be called again with retain_graph.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, unknown impl.
    """
    _check(student, teacher, weight, bias, log_variance)
    check_choice("impl", impl, IMPLEMENTATIONS)
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes = {chunk_bytes} must be positive")
    return _Vid.apply(student, teacher, weight, bias, log_variance, chunk_bytes, torch.is_grad_enabled())


def vid_loss_reference(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor, log_variance: Tensor
) -> Tensor:
    """The formula in plain torch, in the arguments' common dtype: the truth for tests."""
    residual = teacher.detach() - (student @ weight.T + bias)
    return 0.5 * (residual**2 * torch.exp(-log_variance) + log_variance).mean(-1).sum()


class _Vid(torch.autograd.Function):
    """Gradients are made in the forward pass; the backward pass multiplies copies by the upstream scalar."""

    @staticmethod
    def forward(ctx, student, teacher, weight, bias, log_variance, chunk_bytes, differentiate):
        needs = [differentiate and ctx.needs_input_grad[i] for i in (0, 2, 3, 4)]
        with torch.autocast(student.device.type, enabled=False):
            total, gradients = compute(student, teacher, weight, bias, log_variance, chunk_bytes, needs)
        inputs = (student, weight, bias, log_variance)
        ctx.save_for_backward(
            *(g.to(x.dtype) if need else None for g, x, need in zip(gradients, inputs, needs, strict=True))
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        student, *rest = (None if g is None else g * upstream for g in ctx.saved_tensors)
        return student, None, *rest, None, None


def compute(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor,
    log_variance: Tensor,
    chunk_bytes: int,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """The sum, and the gradients of student, weight, bias and log_variance in the accumulator's dtype."""
    linear = ChunkedLinear(student, weight, bias, needs[:3])
    dtype, (tokens, width) = linear.accumulator, teacher.shape
    g = log_variance.to(dtype)
    precision = torch.exp(-g)
    squares = torch.zeros_like(g)
    size = max(1, chunk_bytes // (width * dtype.itemsize))
    buffer = student.new_empty(min(size, tokens), width, dtype=dtype)
    for a in range(0, tokens, size):
        b = min(a + size, tokens)
        residual = linear.forward(a, b, buffer).sub_(teacher[a:b])
        # a norm needs no second buffer for the squares
        squares.add_(torch.linalg.vector_norm(residual, dim=0).square_())
        if any(needs[:3]):
            linear.add_gradients(residual.mul_(precision / width), a, b)
    total = 0.5 / width * (squares @ precision + tokens * g.sum())
    d_log_variance = 0.5 / width * (tokens - squares * precision)
    return total, [linear.d_hidden, linear.d_weight, linear.d_bias, d_log_variance]


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
