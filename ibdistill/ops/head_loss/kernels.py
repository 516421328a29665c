"""The Triton kernels of the head loss. The docstring of `head_loss.triton` says what each of them is for."""

from __future__ import annotations

import triton
import triton.language as tl

from ibdistill.ops.head_loss.arguments import IGNORED
from ibdistill.ops.head_loss.kernels_teacher import IS_FORWARD, IS_REVERSE, IS_TOP_K, log_mixture, online

SUMS = 9
"""Per question, of pooled P, E: sum (2), sum exp (2), sum P E, sum x log x (2), sum P log E, sum E log P."""

_IGNORED = tl.constexpr(IGNORED)
_SUMS = tl.constexpr(SUMS)
NONE, PAPER, NORMALIZED = 0, 1, 2
_PAPER = tl.constexpr(PAPER)


@triton.jit
def softcap_kernel(z, stride, V, V_padded, cap, BLOCK: tl.constexpr):
    """One block of one row: cap tanh(z / cap) in the place of z. Padding is read and written back, so that
    every access has 16 bytes whatever V is."""
    i_row, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_v = i_v * BLOCK + tl.arange(0, BLOCK)
    inside = o_v < V_padded
    place = z + i_row * stride + o_v
    raw = tl.load(place, mask=inside, other=0.0)
    x = raw.to(tl.float32) / cap
    # tanh from the exponential of a number that is not positive: nothing overflows
    e = tl.exp(-2.0 * tl.abs(x))
    size = cap * (1.0 - e) / (1.0 + e)
    capped = tl.where(x < 0, -size, size).to(z.dtype.element_ty)
    tl.store(place, tl.where(o_v < V, capped, raw), mask=inside)


@triton.jit(do_not_specialize=["a"])
def row_stats_kernel(z, stride, labels, lse, ce, correct, a, V, V_padded, BLOCK: tl.constexpr):
    """One row: log-sum-exp, -log p[label] and whether the label's logit is the largest (0 if ignored)."""
    i_row = tl.program_id(0).to(tl.int64)
    row = z + i_row * stride
    top, total = float("-inf"), 0.0
    for start in range(0, V_padded, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        x = tl.load(row + o_v, mask=o_v < V_padded, other=float("-inf")).to(tl.float32)
        top, total = online(top, total, tl.where(o_v < V, x, float("-inf")))
    out = top + tl.log(total)
    label = tl.load(labels + a + i_row)
    kept = label != _IGNORED
    x_label = tl.load(row + tl.where(kept, label, 0)).to(tl.float32)
    tl.store(lse + a + i_row, out)
    tl.store(ce + a + i_row, tl.where(kept, out - x_label, 0.0))
    tl.store(correct + a + i_row, tl.where(kept & (x_label >= top), 1.0, 0.0))


@triton.jit(do_not_specialize=["questions", "a", "b"])
def pool_kernel(
    z, stride, labels, lse, table, lengths, pooled, winners, questions, a, b, V, V_padded,
    IS_MAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence, one block of the vocabulary: log of the pooled distribution, and the winners of a max.

    If the sequence began in an earlier chunk, the kernel goes on from what that chunk stored. `lengths` are
    positions that are not ignored, `pooled` and `winners` [2, questions, V_padded].
    """
    i_s, i_v = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(table + 4 * i_s), tl.load(table + 4 * i_s + 1)
    question, side = tl.load(table + 4 * i_s + 2).to(tl.int64), tl.load(table + 4 * i_s + 3)
    o_v = i_v * BLOCK + tl.arange(0, BLOCK)
    inside = o_v < V_padded
    place = (side * questions + question) * V_padded + o_v
    begin, end = tl.maximum(first, a), tl.minimum(last, b)
    goes_on = inside & (first < a)
    best = tl.load(pooled + place, mask=goes_on, other=float("-inf"))
    total = tl.where(best > float("-inf"), 1.0, 0.0)
    won = tl.zeros([BLOCK], tl.int32)
    if IS_MAX:
        won = tl.load(winners + place, mask=goes_on, other=0)
    row = z + (begin - a).to(tl.int64) * stride + o_v
    for t in range(begin, end):
        kept = tl.load(labels + t) != _IGNORED
        x = tl.load(row, mask=inside, other=float("-inf")).to(tl.float32)
        row += stride
        x = tl.where(kept & (o_v < V), x - tl.load(lse + t), float("-inf"))
        if IS_MAX:
            better = x > best
            best, won = tl.where(better, x, best), tl.where(better, t, won)
        else:
            new = tl.maximum(tl.maximum(best, x), -3.0e38)
            total = total * tl.exp(best - new) + tl.exp(x - new)
            best = new
    if not IS_MAX:
        best += tl.log(total)
        if last <= b:
            best -= tl.log(tl.load(lengths + i_s).to(tl.float32))
    if begin < end:
        tl.store(pooled + place, best, mask=inside)
        if IS_MAX:
            tl.store(winners + place, won, mask=inside)


@triton.jit(do_not_specialize=["questions"])
def pooled_sums_kernel(pooled, both, sums, questions, V, V_padded, BLOCK: tl.constexpr):
    """One question, one block of the vocabulary: its part of the question's nine sums."""
    i_q, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_v = i_v * BLOCK + tl.arange(0, BLOCK)
    inside = (o_v < V) & (tl.load(both + i_q) != 0)
    log_p = tl.load(pooled + i_q * V_padded + o_v, mask=inside, other=0.0)
    log_e = tl.load(pooled + (questions + i_q) * V_padded + o_v, mask=inside, other=0.0)
    p, e = tl.where(inside, tl.exp(log_p), 0.0), tl.where(inside, tl.exp(log_e), 0.0)
    out = sums + (i_q * tl.num_programs(1) + i_v) * _SUMS
    tl.store(out + 0, tl.sum(p, 0))
    tl.store(out + 1, tl.sum(e, 0))
    tl.store(out + 2, tl.sum(tl.where(inside, tl.exp(p), 0.0), 0))
    tl.store(out + 3, tl.sum(tl.where(inside, tl.exp(e), 0.0), 0))
    tl.store(out + 4, tl.sum(p * e, 0))
    tl.store(out + 5, tl.sum(p * log_p, 0))
    tl.store(out + 6, tl.sum(e * log_e, 0))
    tl.store(out + 7, tl.sum(p * log_e, 0))
    tl.store(out + 8, tl.sum(e * log_p, 0))


@triton.jit
def _pool_gradient(pooled, sums, questions, question, side, o_v, V, V_padded, scale, ESTIMATOR: tl.constexpr):
    """w = d(scale * loss) / d log(estimate), and the estimate's logarithm, for one block of one question."""
    inside = o_v < V
    mine = (side * questions + question) * V_padded + o_v
    other = ((1 - side) * questions + question) * V_padded + o_v
    log_e = tl.load(pooled + mine, mask=inside, other=0.0)
    log_p = tl.load(pooled + other, mask=inside, other=0.0)
    sum_p, sum_e = tl.load(sums + question * _SUMS + 1 - side), tl.load(sums + question * _SUMS + side)
    e, p = tl.exp(log_e), tl.exp(log_p)
    if ESTIMATOR == _PAPER:
        w = e * (sum_p * tl.exp(e) / tl.load(sums + question * _SUMS + 2 + side) - p)
    else:
        w = e / sum_e - p / sum_p
    # a question without positions in one of the streams has sums of 0
    w = tl.where(sum_p * sum_e > 0, w * scale, 0.0)
    return tl.where(inside, w, 0.0), log_e


@triton.jit(do_not_specialize=["questions"])
def winner_sums_kernel(
    table,
    pooled,
    winners,
    sums,
    out,
    questions,
    V,
    V_padded,
    scale,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence, one block of the vocabulary: the part of s[t] of every position t."""
    i_s, i_v = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(table + 4 * i_s), tl.load(table + 4 * i_s + 1)
    question, side = tl.load(table + 4 * i_s + 2).to(tl.int64), tl.load(table + 4 * i_s + 3)
    o_v = i_v * BLOCK + tl.arange(0, BLOCK)
    w, _ = _pool_gradient(pooled, sums, questions, question, side, o_v, V, V_padded, scale, ESTIMATOR)
    won = tl.load(winners + (side * questions + question) * V_padded + o_v, mask=o_v < V, other=-1)
    part = out + first.to(tl.int64) * tl.num_programs(1) + i_v
    for t in range(first, last):
        tl.store(part, tl.sum(tl.where(won == t, w, 0.0), 0))
        part += tl.num_programs(1)


@triton.jit(do_not_specialize=["questions", "a"])
def mean_sums_kernel(
    z, stride, labels, lse, owners, lengths, pooled, sums, gets, out, questions, a, V, V_padded, scale,
    ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: s[t], the sum over the vocabulary of what the mean passes to this position."""
    i_row = tl.program_id(0).to(tl.int64)
    sequence = tl.load(owners + a + i_row)
    question, side = sequence // 2, sequence % 2
    shift = tl.load(lse + a + i_row) + tl.log(tl.load(lengths + sequence).to(tl.float32))
    total = 0.0
    stop = tl.where(tl.load(gets + side) != 0, V_padded, 0)
    for start in range(0, stop, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        x = tl.load(z + i_row * stride + o_v, mask=o_v < V_padded, other=0.0).to(tl.float32)
        w, log_e = _pool_gradient(pooled, sums, questions, question, side, o_v, V, V_padded, scale, ESTIMATOR)
        total += tl.sum(tl.where(w != 0, tl.exp(x - shift - log_e) * w, 0.0), 0)
    tl.store(out + a + i_row, tl.where(tl.load(labels + a + i_row) != _IGNORED, total, 0.0))


@triton.jit(do_not_specialize=["k", "questions", "a", "b"])
def gradient_kernel(
    z, stride, out, out_stride, labels, lse, scale, sums_won, table, lengths, pooled, winners, sums, gets,
    teacher, student_lse, teacher_lse, means, taught, tops, k, questions, a, b, V, V_padded, pool_scale,
    inverse_temperature, beta, inverse_cap,
    ESTIMATOR: tl.constexpr, IS_MAX: tl.constexpr, DIVERGENCE: tl.constexpr, IS_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence, one block of the vocabulary: dL/dz of its rows in the chunk, into `out` (may be z).

    `scale` is each row's cross-entropy weight (0 where ignored), `gets` whether stream 0, 1 gets the pooled
    term's gradient, `taught` each row's distillation weight times T. With a top k, `teacher` holds the places
    1 to k in it (0: in none), `tops` [rows, k] their gradients, and `means` what the tail's probabilities are
    multiplied with. With IS_CAPPED, z holds capped logits, and the gradient is that of the logits before.
    """
    i_s, i_v = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(table + 4 * i_s), tl.load(table + 4 * i_s + 1)
    o_v = i_v * BLOCK + tl.arange(0, BLOCK)
    inside = o_v < V_padded
    if ESTIMATOR != 0:
        question, side = tl.load(table + 4 * i_s + 2).to(tl.int64), tl.load(table + 4 * i_s + 3)
        w, log_sum = _pool_gradient(
            pooled, sums, questions, question, side, o_v, V, V_padded, pool_scale, ESTIMATOR
        )
        w = tl.where(tl.load(gets + side) != 0, w, 0.0)
        if IS_MAX:
            place = (side * questions + question) * V_padded + o_v
            won = tl.load(winners + place, mask=inside, other=-1)
        else:
            log_sum += tl.log(tl.load(lengths + i_s).to(tl.float32))
    begin, end = tl.maximum(first, a), tl.minimum(last, b)
    i_row = (begin - a).to(tl.int64)
    row, teacher_row, out_row = (
        z + i_row * stride + o_v,
        teacher + i_row * stride + o_v,
        out + i_row * out_stride + o_v,
    )
    own_row = tops + begin.to(tl.int64) * k
    for t in range(begin, end):
        label, c = tl.load(labels + t), tl.load(scale + t)
        x = tl.load(row, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(o_v < V, x, float("-inf"))
        log_p = x - tl.load(lse + t)
        kept = label != _IGNORED
        factor = c
        if ESTIMATOR != 0:
            factor -= tl.load(sums_won + t)
        dz = tl.exp(log_p) * factor - tl.where(o_v == label, c, 0.0)
        if ESTIMATOR != 0:
            if IS_MAX:
                dz += tl.where(won == t, w, 0.0)
            else:
                dz += tl.where(kept & (w != 0), tl.exp(log_p - log_sum) * w, 0.0)
        if DIVERGENCE != 0:
            y = tl.load(teacher_row, mask=inside, other=0.0).to(tl.float32)
            log_p = x * inverse_temperature - tl.load(student_lse + t)
            if DIVERGENCE == IS_TOP_K:
                mark = tl.where(o_v < V, y, 0.0).to(tl.int32)
                own = tl.load(own_row + mark - 1, mask=mark > 0, other=0.0)
                d = tl.where(mark > 0, own, tl.exp(log_p) * tl.load(means + t))
            else:
                log_q = y * inverse_temperature - tl.load(teacher_lse + t)
                if DIVERGENCE == IS_FORWARD:
                    d = tl.exp(log_p) - tl.exp(log_q)
                elif DIVERGENCE == IS_REVERSE:
                    d = tl.exp(log_p) * (log_p - log_q - tl.load(means + t))
                else:
                    ratio = log_p - log_mixture(log_q, log_p, beta)
                    d = (1 - beta) * tl.exp(log_p) * (ratio - tl.load(means + t))
            dz += tl.where(o_v < V, d * tl.load(taught + t), 0.0)
        if IS_CAPPED:
            share = tl.where(o_v < V, x, 0.0) * inverse_cap
            dz *= 1.0 - share * share
        tl.store(out_row, tl.where(kept, dz, 0.0).to(out.dtype.element_ty), mask=inside)
        row += stride
        teacher_row += stride
        own_row += k
        out_row += out_stride
