"""The Triton kernels of attention with a bias per distance: one forward, four for the gradients.

Shapes: B rows of the batch, H heads, T queries, S keys, D dimensions of a head. Query, key and value come
with strides. The result and the gradients are [B, T, H, D] and [B, S, H, D], so that no copy stands between
them and the linear maps around them. bias is [H, T + S - 1] in float32: that of key j for query i is at
j - i + T - 1. mask is [B, S], 1 where a key is seen.

PACKED: the B sequences lie one behind the other in one row, without padding. T and S are the lengths of the
longest; ends_q and ends_k [B + 1] say where each sequence begins and the last one ends. In what is kept per
query, logs and deltas, each sequence has T places all the same.

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
ENDS = ["ends_q", "ends_k"]  # two rows of one tensor: where the second begins must not compile anew either


@triton.jit
def _rows(x, stride, index, length, o_d, D):
    """The block x[index] [M, D] of a matrix whose rows are `stride` apart; zeros outside of it."""
    inside = (index[:, None] < length) & (o_d[None, :] < D)
    return tl.load(x + index[:, None].to(tl.int64) * stride + o_d[None, :], mask=inside, other=0.0)


@triton.jit
def _own(ends, b, longest, PACKED: tl.constexpr):
    """How many rows of all sequences come before those of sequence b, and how many are its own."""
    if PACKED:
        first = tl.load(ends + b)
        count = tl.load(ends + b + 1) - first
        first = first.to(tl.int64)
    else:
        first = b * longest
        count = longest
    return first, count


@triton.jit
def _at(x, stride_b, stride_h, stride_t, b, h, first, PACKED: tl.constexpr):
    """Where the rows of sequence b and head h begin."""
    if PACKED:
        x += first * stride_t
    else:
        x += b * stride_b
    return x + h * stride_h


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


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=ENDS)
def forward_kernel(
    q, q_b, q_h, q_t, k, k_b, k_h, k_t, v, v_b, v_h, v_t, bias, mask, mask_b, ends_q, ends_k, seed, out, logs,
    H, T, S, level, factor, D,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, DROPS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out, and logs [B, H, T] of each row's sum (inf for a query that sees no key), of BLOCK queries."""
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    b, h = (i_bh // H).to(tl.int64), i_bh % H
    first_t, own_t = _own(ends_q, b, T, PACKED)
    first_s, own_s = _own(ends_k, b, S, PACKED)
    q = _at(q, q_b, q_h, q_t, b, h, first_t, PACKED)
    k = _at(k, k_b, k_h, k_t, b, h, first_s, PACKED)
    v = _at(v, v_b, v_h, v_t, b, h, first_s, PACKED)
    o_m, o_d = i_m * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    block_q = _rows(q, q_t, o_m, own_t, o_d, D)
    bias_row = bias + h * (T + S - 1) + T - 1
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total, sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK, WIDTH], tl.float32)
    end = own_s
    if CAUSAL:
        end = tl.minimum(own_s, (i_m + 1) * BLOCK)
    if PACKED:  # a block behind the sequence's last query
        end = tl.where(i_m * BLOCK < own_t, end, 0)
    for first in range(0, end, BLOCK):
        o_n = first + tl.arange(0, BLOCK)
        block_k = _rows(k, k_t, o_n, own_s, o_d, D)
        block_v = _rows(v, v_t, o_n, own_s, o_d, D)
        s = _scores(
            block_q, block_k, bias_row, mask + b * mask_b, o_m, o_n, own_t, own_s, CAUSAL, MASKED, PRECISION
        )
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
    inside = (o_m[:, None] < own_t) & (o_d[None, :] < D)
    to = out + (first_t + o_m[:, None]) * H * D + h * D + o_d[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside)
    value = tl.where(empty, float("inf"), top + tl.log(tl.where(empty, 1.0, total)))
    tl.store(logs + i_bh.to(tl.int64) * T + o_m, value, mask=o_m < own_t)


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


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=ENDS)
def query_kernel(
    q, q_b, q_h, q_t, k, k_b, k_h, k_t, v, v_b, v_h, v_t, bias, mask, mask_b, ends_q, ends_k, seed, out, logs,
    d_out, deltas, d_q,
    H, T, S, level, factor, D,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, DROPS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """d_q of BLOCK queries, and deltas [B, H, T], out times its gradient, which the other kernels read."""
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    b, h = (i_bh // H).to(tl.int64), i_bh % H
    first_t, own_t = _own(ends_q, b, T, PACKED)
    first_s, own_s = _own(ends_k, b, S, PACKED)
    q = _at(q, q_b, q_h, q_t, b, h, first_t, PACKED)
    k = _at(k, k_b, k_h, k_t, b, h, first_s, PACKED)
    v = _at(v, v_b, v_h, v_t, b, h, first_s, PACKED)
    o_m, o_d = i_m * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    block_q = _rows(q, q_t, o_m, own_t, o_d, D)
    block_d = _rows(d_out + first_t * H * D + h * D, H * D, o_m, own_t, o_d, D)
    block_o = _rows(out + first_t * H * D + h * D, H * D, o_m, own_t, o_d, D)
    delta = tl.sum(block_d.to(tl.float32) * block_o.to(tl.float32), 1)
    row = i_bh.to(tl.int64) * T + o_m
    tl.store(deltas + row, delta, mask=o_m < own_t)
    log = tl.load(logs + row, mask=o_m < own_t, other=float("inf"))
    sums = tl.zeros([BLOCK, WIDTH], tl.float32)
    bias_row = bias + h * (T + S - 1) + T - 1
    end = own_s
    if CAUSAL:
        end = tl.minimum(own_s, (i_m + 1) * BLOCK)
    if PACKED:  # a block behind the sequence's last query
        end = tl.where(i_m * BLOCK < own_t, end, 0)
    for first in range(0, end, BLOCK):
        o_n = first + tl.arange(0, BLOCK)
        block_k = _rows(k, k_t, o_n, own_s, o_d, D)
        block_v = _rows(v, v_t, o_n, own_s, o_d, D)
        _, d_s = _score_gradients(
            block_q, block_k, block_v, block_d, log, delta, bias_row, mask + b * mask_b, seed, i_bh * T + o_m,
            o_m, o_n, own_t, own_s, level, factor, CAUSAL, MASKED, DROPS, PRECISION,
        )  # fmt: skip
        sums += tl.dot(d_s.to(block_k.dtype), block_k, input_precision=PRECISION)
    inside = (o_m[:, None] < own_t) & (o_d[None, :] < D)
    to = d_q + (first_t + o_m[:, None]) * H * D + h * D + o_d[None, :]
    tl.store(to, sums.to(d_q.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=ENDS)
def key_kernel(
    q, q_b, q_h, q_t, k, k_b, k_h, k_t, v, v_b, v_h, v_t, bias, mask, mask_b, ends_q, ends_k, seed, logs,
    d_out, deltas, d_k, d_v,
    H, T, S, level, factor, D,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, DROPS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """d_k and d_v of BLOCK keys."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    b, h = (i_bh // H).to(tl.int64), i_bh % H
    first_t, own_t = _own(ends_q, b, T, PACKED)
    first_s, own_s = _own(ends_k, b, S, PACKED)
    q = _at(q, q_b, q_h, q_t, b, h, first_t, PACKED)
    k = _at(k, k_b, k_h, k_t, b, h, first_s, PACKED)
    v = _at(v, v_b, v_h, v_t, b, h, first_s, PACKED)
    o_n, o_d = i_n * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    block_k = _rows(k, k_t, o_n, own_s, o_d, D)
    block_v = _rows(v, v_t, o_n, own_s, o_d, D)
    sums_k, sums_v = tl.zeros([BLOCK, WIDTH], tl.float32), tl.zeros([BLOCK, WIDTH], tl.float32)
    bias_row = bias + h * (T + S - 1) + T - 1
    start = 0
    if CAUSAL:
        start = i_n * BLOCK
    if PACKED:  # a block behind the sequence's last key
        start = tl.where(i_n * BLOCK < own_s, start, own_t)
    for first in range(start, own_t, BLOCK):
        o_m = first + tl.arange(0, BLOCK)
        block_q = _rows(q, q_t, o_m, own_t, o_d, D)
        block_d = _rows(d_out + first_t * H * D + h * D, H * D, o_m, own_t, o_d, D)
        row = i_bh.to(tl.int64) * T + o_m
        log = tl.load(logs + row, mask=o_m < own_t, other=float("inf"))
        delta = tl.load(deltas + row, mask=o_m < own_t, other=0.0)
        p, d_s = _score_gradients(
            block_q, block_k, block_v, block_d, log, delta, bias_row, mask + b * mask_b, seed, i_bh * T + o_m,
            o_m, o_n, own_t, own_s, level, factor, CAUSAL, MASKED, DROPS, PRECISION,
        )  # fmt: skip
        sums_v += tl.dot(tl.trans(p.to(block_d.dtype)), block_d, input_precision=PRECISION)
        sums_k += tl.dot(tl.trans(d_s.to(block_q.dtype)), block_q, input_precision=PRECISION)
    inside = (o_n[:, None] < own_s) & (o_d[None, :] < D)
    to = (first_s + o_n[:, None]) * H * D + h * D + o_d[None, :]
    tl.store(d_k + to, sums_k.to(d_k.dtype.element_ty), mask=inside)
    tl.store(d_v + to, sums_v.to(d_v.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*INTEGERS, "B", "rows_per_split"], do_not_specialize_on_alignment=ENDS)
def bias_kernel(
    q, q_b, q_h, q_t, k, k_b, k_h, k_t, v, v_b, v_h, v_t, bias, mask, mask_b, ends_q, ends_k, seed, logs,
    d_out, deltas, parts,
    B, rows_per_split, H, T, S, level, factor, D,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr, DROPS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """parts [splits, H, diagonals, BLOCK, BLOCK]: gradients of the scores, summed over all pairs of blocks
    whose indices differ by d, in `rows_per_split` rows of the batch."""
    i_g, h, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = i_g - (tl.cdiv(T, BLOCK) - 1)
    o_d = tl.arange(0, WIDTH)
    bias_row = bias + h * (T + S - 1) + T - 1
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for row in range(i_s * rows_per_split, tl.minimum((i_s + 1) * rows_per_split, B)):
        b = tl.zeros([], tl.int64) + row  # the interpreter's loop gives a plain int
        first_t, own_t = _own(ends_q, b, T, PACKED)
        first_s, own_s = _own(ends_k, b, S, PACKED)
        own_q = _at(q, q_b, q_h, q_t, b, h, first_t, PACKED)
        own_k = _at(k, k_b, k_h, k_t, b, h, first_s, PACKED)
        own_v = _at(v, v_b, v_h, v_t, b, h, first_s, PACKED)
        last = tl.minimum(tl.cdiv(own_t, BLOCK), tl.cdiv(own_s, BLOCK) - d)
        if CAUSAL:
            last = tl.where(d > 0, 0, last)
        for i_m in range(tl.maximum(0, -d), last):
            o_m = i_m * BLOCK + tl.arange(0, BLOCK)
            o_n = (i_m + d) * BLOCK + tl.arange(0, BLOCK)
            block_q = _rows(own_q, q_t, o_m, own_t, o_d, D)
            block_d = _rows(d_out + first_t * H * D + h * D, H * D, o_m, own_t, o_d, D)
            block_k = _rows(own_k, k_t, o_n, own_s, o_d, D)
            block_v = _rows(own_v, v_t, o_n, own_s, o_d, D)
            at = (b * H + h) * T + o_m
            log = tl.load(logs + at, mask=o_m < own_t, other=float("inf"))
            delta = tl.load(deltas + at, mask=o_m < own_t, other=0.0)
            _, d_s = _score_gradients(
                block_q, block_k, block_v, block_d, log, delta, bias_row, mask + b * mask_b, seed,
                (row * H + h) * T + o_m, o_m, o_n, own_t, own_s, level, factor,
                CAUSAL, MASKED, DROPS, PRECISION,
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
