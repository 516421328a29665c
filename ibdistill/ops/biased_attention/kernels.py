"""The Triton kernels of attention with a bias per distance: one forward, four for the gradients.

Shapes: B rows of the batch, H heads, T queries, S keys, D dimensions of a head. Query, key and value come
with strides. The result and the gradients are [B, T, H, D] and [B, S, H, D], so that no copy stands between
them and the linear maps around them. bias is [H, T + S - 1] in float32: that of key j for query i is at
j - i + T - 1. mask is [B, S], 1 where a key is seen.

A program keeps one block of queries or of keys and walks over the other side; scores and probabilities exist
for one block pair at a time. The backward pass computes them again from q, k and the logarithm of each row's
sum. All pairs of blocks with one difference d of their indices have the same distances, so that the gradient
of the bias is first summed over pairs, rows of the batch included (`bias_kernel`), and only then along the
diagonals (`fold_kernel`). Sums have a fixed order and no atomics: results are the same to the bit.

Dropout keeps no mask: `ops.dropout_hash` decides by row and key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ibdistill.ops.dropout_kernel import keep

INTEGERS = ["T", "S", "level", "mask_b"]  # lengths, which must not compile anew


@triton.jit
def _rows(x, stride, index, length, o_d, D):
    """The block x[index] [M, D] of a matrix whose rows are `stride` apart; zeros outside of it."""
    inside = (index[:, None] < length) & (o_d[None, :] < D)
    return tl.load(x + index[:, None].to(tl.int64) * stride + o_d[None, :], mask=inside, other=0.0)


@triton.jit
def _scores(
    q, k, bias_row, mask_row, o_m, o_n, T, S,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q k^T plus the bias [M, N], -inf where a query does not see a key; `bias_row` points at distance 0."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    inside = (o_m[:, None] < T) & (o_n[None, :] < S)
    s += tl.load(bias_row + (o_n[None, :] - o_m[:, None]), mask=inside, other=0.0)
    seen = (o_n < S)[None, :]
    if MASKED:
        seen = seen & (tl.load(mask_row + o_n, mask=o_n < S, other=0) != 0)[None, :]
    if CAUSAL:
        seen = seen & (o_m[:, None] >= o_n[None, :])
    return tl.where(seen, s, float("-inf"))


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(
    q, q_b, q_h, q_t, k, k_b, k_h, k_t, v, v_b, v_h, v_t, bias, mask, mask_b, seed, out, logs,
    H, T, S, level, factor, D,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out, and logs [B, H, T] of each row's sum (inf for a query that sees no key), of BLOCK queries."""
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    b, h = (i_bh // H).to(tl.int64), i_bh % H
    o_m, o_d = i_m * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    block_q = _rows(q + b * q_b + h * q_h, q_t, o_m, T, o_d, D)
    bias_row = bias + h * (T + S - 1) + T - 1
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total, sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK, WIDTH], tl.float32)
    end = S
    if CAUSAL:
        end = tl.minimum(S, (i_m + 1) * BLOCK)
    for first in range(0, end, BLOCK):
        o_n = first + tl.arange(0, BLOCK)
        block_k = _rows(k + b * k_b + h * k_h, k_t, o_n, S, o_d, D)
        block_v = _rows(v + b * v_b + h * v_h, v_t, o_n, S, o_d, D)
        s = _scores(block_q, block_k, bias_row, mask + b * mask_b, o_m, o_n, T, S, CAUSAL, MASKED, PRECISION)
        new = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        p, shrink = tl.exp(s - shift[:, None]), tl.exp(top - shift)
        total = total * shrink + tl.sum(p, 1)
        if DROPS:
            p = tl.where(keep(seed, i_bh * T + o_m, o_n, level), p, 0.0)
        sums = sums * shrink[:, None] + tl.dot(p.to(block_v.dtype), block_v, input_precision=PRECISION)
        top = new
    empty = total == 0
    sums = sums * (factor / tl.where(empty, 1.0, total))[:, None]
    inside = (o_m[:, None] < T) & (o_d[None, :] < D)
    to = out + (b * T + o_m[:, None]) * H * D + h * D + o_d[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside)
    value = tl.where(empty, float("inf"), top + tl.log(tl.where(empty, 1.0, total)))
    tl.store(logs + i_bh.to(tl.int64) * T + o_m, value, mask=o_m < T)


@triton.jit
def _score_gradients(
    block_q, block_k, block_v, block_d, logs, deltas, bias_row, mask_row, seed, rows, o_m, o_n,
    T, S, level, factor,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The probabilities after dropout, and the gradient of the scores, both [M, N]; `block_d` is of out's."""
    s = _scores(block_q, block_k, bias_row, mask_row, o_m, o_n, T, S, CAUSAL, MASKED, PRECISION)
    p = tl.exp(s - logs[:, None])
    d_p = tl.dot(block_d, tl.trans(block_v), input_precision=PRECISION)
    dropped = p
    if DROPS:
        kept = keep(seed, rows, o_n, level)
        d_p = tl.where(kept, d_p * factor, 0.0)
        dropped = tl.where(kept, p * factor, 0.0)
    return dropped, p * (d_p - deltas[:, None])


@triton.jit(do_not_specialize=INTEGERS)
def query_kernel(
    q, q_b, q_h, q_t, k, k_b, k_h, k_t, v, v_b, v_h, v_t, bias, mask, mask_b, seed, out, logs,
    d_out, deltas, d_q,
    H, T, S, level, factor, D,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """d_q of BLOCK queries, and deltas [B, H, T], out times its gradient, which the other kernels read."""
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    b, h = (i_bh // H).to(tl.int64), i_bh % H
    o_m, o_d = i_m * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    block_q = _rows(q + b * q_b + h * q_h, q_t, o_m, T, o_d, D)
    block_d = _rows(d_out + b * T * H * D + h * D, H * D, o_m, T, o_d, D)
    block_o = _rows(out + b * T * H * D + h * D, H * D, o_m, T, o_d, D)
    delta = tl.sum(block_d.to(tl.float32) * block_o.to(tl.float32), 1)
    row = i_bh.to(tl.int64) * T + o_m
    tl.store(deltas + row, delta, mask=o_m < T)
    log = tl.load(logs + row, mask=o_m < T, other=float("inf"))
    sums = tl.zeros([BLOCK, WIDTH], tl.float32)
    bias_row = bias + h * (T + S - 1) + T - 1
    end = S
    if CAUSAL:
        end = tl.minimum(S, (i_m + 1) * BLOCK)
    for first in range(0, end, BLOCK):
        o_n = first + tl.arange(0, BLOCK)
        block_k = _rows(k + b * k_b + h * k_h, k_t, o_n, S, o_d, D)
        block_v = _rows(v + b * v_b + h * v_h, v_t, o_n, S, o_d, D)
        _, d_s = _score_gradients(
            block_q, block_k, block_v, block_d, log, delta, bias_row, mask + b * mask_b, seed, i_bh * T + o_m,
            o_m, o_n, T, S, level, factor, CAUSAL, MASKED, DROPS, PRECISION,
        )  # fmt: skip
        sums += tl.dot(d_s.to(block_k.dtype), block_k, input_precision=PRECISION)
    inside = (o_m[:, None] < T) & (o_d[None, :] < D)
    to = d_q + (b * T + o_m[:, None]) * H * D + h * D + o_d[None, :]
    tl.store(to, sums.to(d_q.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def key_kernel(
    q, q_b, q_h, q_t, k, k_b, k_h, k_t, v, v_b, v_h, v_t, bias, mask, mask_b, seed, logs,
    d_out, deltas, d_k, d_v,
    H, T, S, level, factor, D,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of BLOCK keys."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    b, h = (i_bh // H).to(tl.int64), i_bh % H
    o_n, o_d = i_n * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    block_k = _rows(k + b * k_b + h * k_h, k_t, o_n, S, o_d, D)
    block_v = _rows(v + b * v_b + h * v_h, v_t, o_n, S, o_d, D)
    sums_k, sums_v = tl.zeros([BLOCK, WIDTH], tl.float32), tl.zeros([BLOCK, WIDTH], tl.float32)
    bias_row = bias + h * (T + S - 1) + T - 1
    start = 0
    if CAUSAL:
        start = i_n * BLOCK
    for first in range(start, T, BLOCK):
        o_m = first + tl.arange(0, BLOCK)
        block_q = _rows(q + b * q_b + h * q_h, q_t, o_m, T, o_d, D)
        block_d = _rows(d_out + b * T * H * D + h * D, H * D, o_m, T, o_d, D)
        row = i_bh.to(tl.int64) * T + o_m
        log = tl.load(logs + row, mask=o_m < T, other=float("inf"))
        delta = tl.load(deltas + row, mask=o_m < T, other=0.0)
        p, d_s = _score_gradients(
            block_q, block_k, block_v, block_d, log, delta, bias_row, mask + b * mask_b, seed, i_bh * T + o_m,
            o_m, o_n, T, S, level, factor, CAUSAL, MASKED, DROPS, PRECISION,
        )  # fmt: skip
        sums_v += tl.dot(tl.trans(p.to(block_d.dtype)), block_d, input_precision=PRECISION)
        sums_k += tl.dot(tl.trans(d_s.to(block_q.dtype)), block_q, input_precision=PRECISION)
    inside = (o_n[:, None] < S) & (o_d[None, :] < D)
    to = (b * S + o_n[:, None]) * H * D + h * D + o_d[None, :]
    tl.store(d_k + to, sums_k.to(d_k.dtype.element_ty), mask=inside)
    tl.store(d_v + to, sums_v.to(d_v.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*INTEGERS, "B", "rows_per_split"])
def bias_kernel(
    q, q_b, q_h, q_t, k, k_b, k_h, k_t, v, v_b, v_h, v_t, bias, mask, mask_b, seed, logs,
    d_out, deltas, parts,
    B, rows_per_split, H, T, S, level, factor, D,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """parts [splits, H, diagonals, BLOCK, BLOCK]: gradients of the scores, summed over all pairs of blocks
    whose indices differ by d, in `rows_per_split` rows of the batch."""
    i_g, h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks_m, blocks_n = tl.cdiv(T, BLOCK), tl.cdiv(S, BLOCK)
    d = i_g - (blocks_m - 1)
    o_d = tl.arange(0, WIDTH)
    bias_row = bias + h * (T + S - 1) + T - 1
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    last = tl.minimum(blocks_m, blocks_n - d)
    if CAUSAL:
        last = tl.where(d > 0, 0, last)
    for row in range(i_s * rows_per_split, tl.minimum((i_s + 1) * rows_per_split, B)):
        b = tl.zeros([], tl.int64) + row  # the interpreter's loop gives a plain int
        for i_m in range(tl.maximum(0, -d), last):
            o_m = i_m * BLOCK + tl.arange(0, BLOCK)
            o_n = (i_m + d) * BLOCK + tl.arange(0, BLOCK)
            block_q = _rows(q + b * q_b + h * q_h, q_t, o_m, T, o_d, D)
            block_d = _rows(d_out + b * T * H * D + h * D, H * D, o_m, T, o_d, D)
            block_k = _rows(k + b * k_b + h * k_h, k_t, o_n, S, o_d, D)
            block_v = _rows(v + b * v_b + h * v_h, v_t, o_n, S, o_d, D)
            at = (b * H + h) * T + o_m
            log = tl.load(logs + at, mask=o_m < T, other=float("inf"))
            delta = tl.load(deltas + at, mask=o_m < T, other=0.0)
            _, d_s = _score_gradients(
                block_q, block_k, block_v, block_d, log, delta, bias_row, mask + b * mask_b, seed,
                (row * H + h) * T + o_m, o_m, o_n, T, S, level, factor, CAUSAL, MASKED, DROPS, PRECISION,
            )  # fmt: skip
            sums += d_s
    program = ((i_s * tl.num_programs(1) + h) * tl.num_programs(0) + i_g).to(tl.int64)
    o_i, o_j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    tl.store(parts + program * BLOCK * BLOCK + o_i[:, None] * BLOCK + o_j[None, :], sums)


@triton.jit(do_not_specialize=["splits", "diagonals", "T", "S"])
def fold_kernel(parts, d_bias, splits, H, diagonals, T, S, BLOCK: tl.constexpr):
    """d_bias [H, T + S - 1] from `parts`: BLOCK distances, each the sum of diagonals of two neighbours."""
    i_g, h = tl.program_id(0), tl.program_id(1)
    o_i, o_k = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    column = o_k + o_i - (BLOCK - 1)  # of block i_g; in the block before it, BLOCK further
    sums = tl.zeros([BLOCK], tl.float32)
    for i_s in range(splits):
        block = parts + ((i_s * H + h) * diagonals + i_g).to(tl.int64) * BLOCK * BLOCK + o_i * BLOCK + column
        inside = (column >= 0) & (i_g < diagonals)
        sums += tl.sum(tl.load(block, mask=inside, other=0.0), 0)
        before = (column < 0) & (i_g > 0)
        sums += tl.sum(tl.load(block - BLOCK * BLOCK + BLOCK, mask=before, other=0.0), 0)
    distance = i_g * BLOCK + tl.arange(0, BLOCK) - (tl.cdiv(T, BLOCK) * BLOCK - T)
    inside = (distance >= 0) & (distance < T + S - 1)
    tl.store(d_bias + h * (T + S - 1) + distance, sums, mask=inside)
