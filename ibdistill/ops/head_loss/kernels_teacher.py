"""The Triton kernels that compare the student's logits with a teacher's. See `head_loss.triton_teacher`."""

from __future__ import annotations

import triton
import triton.language as tl

FORWARD, REVERSE, JSD, TOP_K = 1, 2, 3, 4
IS_FORWARD, IS_REVERSE, IS_TOP_K = tl.constexpr(FORWARD), tl.constexpr(REVERSE), tl.constexpr(TOP_K)


@triton.jit
def online(top, total, x):
    """Add a block of values to a running log-sum-exp: its maximum, and the sum of exponentials below that."""
    new = tl.maximum(top, tl.max(x, 0))
    return new, total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)


@triton.jit
def log_mixture(log_q, log_p, beta):
    """Logarithm of the mixture that JSD compares both with; `beta` is the teacher's share."""
    top = tl.maximum(log_q, log_p)
    return top + tl.log(beta * tl.exp(log_q - top) + (1 - beta) * tl.exp(log_p - top))


@triton.jit(do_not_specialize=["a"])
def divergence_kernel(
    z, teacher, stride, student_lse, teacher_lse, losses, means, a, V, V_padded, inverse_temperature, beta,
    DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: divergence between softmax(teacher / T) and softmax(z / T), and what its gradient needs.

    `means` is the mean under the student of the log ratio that the gradient is centred by. A KL divergence is
    a mean of differences of logits beside the two log-sum-exps, so one walk over the row makes it: `mean_gap`
    is that mean, below the running maximum. The mixture of a JSD needs both log-sum-exps first. Its second
    walk reads both rows from memory again, because the rows of all running programs exceed a cache.
    """
    i_row = tl.program_id(0).to(tl.int64)
    top, total, teacher_top, teacher_total = float("-inf"), 0.0, float("-inf"), 0.0
    loss, mean, mean_gap = 0.0, 0.0, 0.0
    for start in range(0, V_padded, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        inside = o_v < V
        x = tl.load(z + i_row * stride + o_v, mask=o_v < V_padded, other=0.0).to(tl.float32)
        y = tl.load(teacher + i_row * stride + o_v, mask=o_v < V_padded, other=0.0).to(tl.float32)
        gap = tl.where(inside, (y - x) * inverse_temperature, 0.0)
        x = tl.where(inside, x * inverse_temperature, float("-inf"))
        y = tl.where(inside, y * inverse_temperature, float("-inf"))
        last, teacher_last = top, teacher_top
        top, total = online(top, total, x)
        teacher_top, teacher_total = online(teacher_top, teacher_total, y)
        if DIVERGENCE == IS_FORWARD:
            mean_gap = mean_gap * tl.exp(teacher_last - teacher_top) + tl.sum(
                tl.exp(y - teacher_top) * gap, 0
            )
        elif DIVERGENCE == IS_REVERSE:
            mean_gap = mean_gap * tl.exp(last - top) - tl.sum(tl.exp(x - top) * gap, 0)
    lse_p, lse_q = top + tl.log(total), teacher_top + tl.log(teacher_total)
    if DIVERGENCE == IS_FORWARD:
        loss = mean_gap / teacher_total - lse_q + lse_p
    elif DIVERGENCE == IS_REVERSE:
        mean = mean_gap / total - lse_p + lse_q
        loss = mean
    stop = V_padded if DIVERGENCE != IS_FORWARD and DIVERGENCE != IS_REVERSE else 0
    for start in range(0, stop, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        inside = o_v < V
        x = tl.load(z + i_row * stride + o_v, mask=o_v < V_padded, other=0.0).to(tl.float32)
        y = tl.load(teacher + i_row * stride + o_v, mask=o_v < V_padded, other=0.0).to(tl.float32)
        log_p, log_q = x * inverse_temperature - lse_p, y * inverse_temperature - lse_q
        log_m = log_mixture(log_q, log_p, beta)
        mean += tl.sum(tl.where(inside, tl.exp(log_p) * (log_p - log_m), 0.0), 0)
        loss += tl.sum(tl.where(inside, tl.exp(log_q) * (log_q - log_m), 0.0), 0)
    if stop > 0:
        loss = beta * loss + (1 - beta) * mean
    tl.store(student_lse + a + i_row, lse_p)
    tl.store(teacher_lse + a + i_row, lse_q)
    tl.store(losses + a + i_row, loss)
    tl.store(means + a + i_row, mean)


@triton.jit(do_not_specialize=["a"])
def tail_kernel(z, marks, stride, lse, a, V, V_padded, inverse_temperature, BLOCK: tl.constexpr):
    """One row: log-sum-exp of z / T over the entries that aren't marked, the tail of a teacher's top k."""
    i_row = tl.program_id(0).to(tl.int64)
    top, total = float("-inf"), 0.0
    for start in range(0, V_padded, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        inside = o_v < V_padded
        x = tl.load(z + i_row * stride + o_v, mask=inside, other=0.0).to(tl.float32)
        mark = tl.load(marks + i_row * stride + o_v, mask=inside, other=1.0).to(tl.float32)
        x = tl.where((o_v < V) & (mark == 0.0), x * inverse_temperature, float("-inf"))
        # a block of nothing but marks: -inf - -inf is not a number
        new = tl.maximum(tl.maximum(top, tl.max(x, 0)), -3.0e38)
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        top = new
    tl.store(lse + a + i_row, top + tl.log(total))
