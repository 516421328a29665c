"""The head loss in Triton: dense products by the vendor's GEMM, every pass over the logits one kernel.

The mathematics, and why gradients are computed in the forward pass, are in `head_loss_torch`. What differs
is that the logits z stay in the GEMM's dtype in a buffer of whole questions, and how often they are moved:

    row_stats     one read      log-sum-exp of each row, its cross entropy, whether its label is the largest
    pool          one read      log of the pooled distribution, and for a max the winning position
    pooled_sums   [B, V] only   nine sums per question, from which estimators and directions follow
    winner_sums   [B, V] only   s[t], the sum of the gradients w that position t won (max pool)
    mean_sums     one read      the same s[t] for the mean pool, which needs every p[t, v]
    teach         one read      divergence from the teacher, of student and teacher logits
    gradient      read + write  dL/dz in the place of z

For cross entropies and a max-pooled term that's two reads forward, a read and a write backward: 8 bytes per
bfloat16 logit. With n positions a question, the [B, V] arrays add 24 / n bytes. A question whose rows
exceed the chunk is walked in chunks twice, its logits computed twice, its pool carried on.

A row is a position; rows of a group of questions are predict's, then explain's. `table` has a line for each
sequence: first row, last row + 1, question, stream (0 predict, 1 explain). A chunk is the rows a to b,
whose logits start at z. Nothing here waits for the device, no sum is made with atomics, so results are
reproducible to the bit, and no count of tokens is a constant of a kernel.

Block sizes are in `launch`. The buffer's rows are padded to a multiple of 16 elements, or a V like 50257
would make loads 2 bytes wide.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ibdistill.ops import launch
from ibdistill.ops.arguments import IGNORED, Call, Stream
from ibdistill.ops.estimators import barber_agakov

SUMS = 9
"""Per question, of pooled P, E: sum (2), sum exp (2), sum P E, sum x log x (2), sum P log E, sum E log P."""

_IGNORED = tl.constexpr(IGNORED)
_SUMS = tl.constexpr(SUMS)
NONE, PAPER, NORMALIZED = 0, 1, 2
FORWARD, REVERSE, JSD = 1, 2, 3
_PAPER, _FORWARD, _REVERSE = tl.constexpr(PAPER), tl.constexpr(FORWARD), tl.constexpr(REVERSE)


@triton.jit
def _online(top, total, x):
    """Carry a log-sum-exp (maximum, sum of exponentials below it) on with a block of values."""
    new = tl.maximum(top, tl.max(x, 0))
    return new, total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)


@triton.jit(do_not_specialize=["a"])
def row_stats_kernel(z, stride, labels, lse, ce, correct, a, V, V_padded, BLOCK: tl.constexpr):
    """One row: log-sum-exp, -log p[label] and whether the label's logit is the largest (0 if ignored)."""
    i_row = tl.program_id(0).to(tl.int64)
    row = z + i_row * stride
    top, total = float("-inf"), 0.0
    for start in range(0, V_padded, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        x = tl.load(row + o_v, mask=o_v < V_padded, other=float("-inf")).to(tl.float32)
        top, total = _online(top, total, tl.where(o_v < V, x, float("-inf")))
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
    """One sequence, one block of the vocabulary: log of the pooled distribution; for a max, who won.

    Goes on from what is there if the sequence began in an earlier chunk. `lengths` are positions that are
    not ignored, `pooled` and `winners` [2, questions, V_padded].
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


@triton.jit(do_not_specialize=["a"])
def teach_kernel(
    z, teacher, stride, student_lse, teacher_lse, losses, means, a, V, V_padded, inverse_temperature, beta,
    DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: divergence between softmax(teacher / T) and softmax(z / T), and what its gradient needs.

    `means` is the mean under the student of the log ratio that the gradient is centred by. The second
    walk over the row finds it in the cache.
    """
    i_row = tl.program_id(0).to(tl.int64)
    top, total, teacher_top, teacher_total = float("-inf"), 0.0, float("-inf"), 0.0
    for start in range(0, V_padded, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        inside = o_v < V
        x = tl.load(z + i_row * stride + o_v, mask=o_v < V_padded, other=0.0).to(tl.float32)
        y = tl.load(teacher + i_row * stride + o_v, mask=o_v < V_padded, other=0.0).to(tl.float32)
        top, total = _online(top, total, tl.where(inside, x * inverse_temperature, float("-inf")))
        y = tl.where(inside, y * inverse_temperature, float("-inf"))
        teacher_top, teacher_total = _online(teacher_top, teacher_total, y)
    lse_p, lse_q = top + tl.log(total), teacher_top + tl.log(teacher_total)
    loss, mean = 0.0, 0.0
    for start in range(0, V_padded, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        inside = o_v < V
        x = tl.load(z + i_row * stride + o_v, mask=o_v < V_padded, other=0.0).to(tl.float32)
        y = tl.load(teacher + i_row * stride + o_v, mask=o_v < V_padded, other=0.0).to(tl.float32)
        log_p, log_q = x * inverse_temperature - lse_p, y * inverse_temperature - lse_q
        if DIVERGENCE == _FORWARD:
            loss += tl.sum(tl.where(inside, tl.exp(log_q) * (log_q - log_p), 0.0), 0)
        elif DIVERGENCE == _REVERSE:
            mean += tl.sum(tl.where(inside, tl.exp(log_p) * (log_p - log_q), 0.0), 0)
        else:
            log_m = _log_mixture(log_q, log_p, beta)
            mean += tl.sum(tl.where(inside, tl.exp(log_p) * (log_p - log_m), 0.0), 0)
            loss += tl.sum(tl.where(inside, tl.exp(log_q) * (log_q - log_m), 0.0), 0)
    if DIVERGENCE == _REVERSE:
        loss = mean
    elif DIVERGENCE != _FORWARD:
        loss = beta * loss + (1 - beta) * mean
    tl.store(student_lse + a + i_row, lse_p)
    tl.store(teacher_lse + a + i_row, lse_q)
    tl.store(losses + a + i_row, loss)
    tl.store(means + a + i_row, mean)


@triton.jit
def _log_mixture(log_q, log_p, beta):
    top = tl.maximum(log_q, log_p)
    return top + tl.log(beta * tl.exp(log_q - top) + (1 - beta) * tl.exp(log_p - top))


@triton.jit(do_not_specialize=["questions", "a", "b"])
def gradient_kernel(
    z, stride, out, out_stride, labels, lse, scale, sums_won, table, lengths, pooled, winners, sums, gets,
    teacher, student_lse, teacher_lse, means, taught, questions, a, b, V, V_padded, pool_scale,
    inverse_temperature, beta,
    ESTIMATOR: tl.constexpr, IS_MAX: tl.constexpr, DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence, one block of the vocabulary: dL/dz of its rows in the chunk, into `out` (may be z).

    `scale` is each row's cross-entropy weight (0 where ignored), `gets` whether stream 0, 1 gets the pooled
    term's gradient, `taught` each row's distillation weight times T.
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
            log_q = y * inverse_temperature - tl.load(teacher_lse + t)
            if DIVERGENCE == _FORWARD:
                d = tl.exp(log_p) - tl.exp(log_q)
            elif DIVERGENCE == _REVERSE:
                d = tl.exp(log_p) * (log_p - log_q - tl.load(means + t))
            else:
                d = (
                    (1 - beta)
                    * tl.exp(log_p)
                    * (log_p - _log_mixture(log_q, log_p, beta) - tl.load(means + t))
                )
            dz += tl.where(o_v < V, d * tl.load(taught + t), 0.0)
        tl.store(out_row, tl.where(kept, dz, 0.0).to(out.dtype.element_ty), mask=inside)
        row += stride
        teacher_row += stride
        out_row += out_stride


class _Group(NamedTuple):
    """Rows that are worked on together: whole questions if something is pooled."""

    slices: list[tuple[int, int, int]]
    """Stream (0 predict, 1 explain), its rows from, to; in the order of the group's rows."""
    lines: tuple[int, int]
    """Its part of the table."""
    questions: int


def _groups(call: Call, size: int, pooled: bool) -> tuple[list[_Group], list[tuple[int, int, int, int]]]:
    """Cut the streams into groups of at most `size` rows, or one larger question; and the table."""
    streams = [s for s in (call.predict, call.explain) if s is not None]
    groups: list[_Group] = []
    table: list[tuple[int, int, int, int]] = []
    if not pooled:
        counts = [s.hidden.shape[0] for s in streams]
        for start in range(0, sum(counts), size):
            stop, slices, offset = min(start + size, sum(counts)), [], 0
            for i, count in enumerate(counts):
                a, b = max(start - offset, 0), min(stop - offset, count)
                if a < b:
                    slices.append((i, a, b))
                offset += count
            lines = [(r, min(r + BLOCK_ROWS, stop - start), 0, 0) for r in range(0, stop - start, BLOCK_ROWS)]
            groups.append(_Group(slices, (len(table), len(table) + len(lines)), 0))
            table += lines
        return groups, table
    p, e = (s.cu.tolist() for s in streams)
    first = 0
    for q in range(1, len(p)):
        full = q + 1 < len(p) and p[q + 1] - p[first] + e[q + 1] - e[first] > size
        if q + 1 < len(p) and not full:
            continue
        shift = p[q] - p[first] - e[first]
        lines = []
        for i in range(first, q):
            lines.append((p[i] - p[first], p[i + 1] - p[first], i - first, 0))
            lines.append((e[i] + shift, e[i + 1] + shift, i - first, 1))
        slices = [(0, p[first], p[q]), (1, e[first], e[q])]
        groups.append(_Group(slices, (len(table), len(table) + len(lines)), q - first))
        table += lines
        first = q
    return groups, table


BLOCK_ROWS = 16
"""Rows of a program of the gradient kernel where there are no sequences to follow."""


def compute(
    call: Call, weight: Tensor | None, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
    """Total, terms, and the gradients of predict's hidden states, explain's, weight and bias.

    Without a weight the hidden states are logits.
    """
    device = call.predict.hidden.device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        work = _Work(call, weight, bias, needs)
        groups, table = _groups(call, work.size if weight is not None else sum(work.counts) or 1, work.pooled)
        lines = torch.tensor(table, dtype=torch.int32).reshape(-1, 4).to(device, non_blocking=True)
        for group in groups:
            work.group(group, lines[group.lines[0] : group.lines[1]])
        terms = work.terms()
    factors = vars(call.weights)
    total = sum(factors[name] * terms[name] for name in factors if name in terms)
    return total, terms, work.gradients()


class _Work:
    """Buffers and running sums of one call, and the walk over one group after another."""

    def __init__(self, call: Call, weight: Tensor | None, bias: Tensor | None, needs: list[bool]):
        self.call, self.weight, self.bias = call, weight, bias
        self.streams: list[Stream] = [s for s in (call.predict, call.explain) if s is not None]
        self.hidden = [s.hidden.detach() for s in self.streams]
        self.counts = [len(h) for h in self.hidden]
        example = self.hidden[0]
        self.device, self.dtype = example.device, example.dtype
        self.V = example.shape[1] if weight is None else weight.shape[0]
        self.padded = self.V if weight is None else triton.cdiv(self.V, 16) * 16
        itemsize = example.element_size()
        self.row_block, self.column_block = (
            launch.row_block(self.V, itemsize),
            launch.column_block(self.V, itemsize),
        )
        self.pooled = call.mi is not None
        self.estimator = (
            {"paper": PAPER, "normalized": NORMALIZED}[call.mi.estimator] if self.pooled else NONE
        )
        self.is_max = self.pooled and call.mi.pool == "max"
        self.directions = call.mi.directions if self.pooled else ()
        self.paired = self.pooled and call.mi.pair == "teacher"
        self.differentiate = any(needs)
        sides = [name for _, name in self.directions] if call.weights.mi != 0 else []
        self.gets = self._new([n in sides for n in ("predict", "explain")], torch.int32)
        self.pool_scale = call.weights.mi / max(len(self.directions), 1)
        self.passes = self.pooled and self.differentiate and bool(sides)
        self.teacher = call.teacher
        buffers = 1 if self.teacher is None else 2
        self.size = max(1, call.chunk_bytes // (self.padded * example.element_size() * buffers))
        self.d_hidden = [torch.zeros_like(h) if needs[0] or needs[1] else None for h in self.hidden]
        self.d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[2] else None
        self.d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[3] else None
        self.sums: dict[str, Tensor] = {}
        self.target_sums = [0.0 for _ in self.directions]
        self.questions = self._new(0.0)
        if weight is not None:
            rows = max(1, min(self.size, sum(self.counts)))
            self.buffers = [example.new_empty(rows, self.padded) for _ in range(buffers)]

    def _new(self, values, dtype=torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def _cut(self, group: _Group, tensors: list[Tensor | None]) -> Tensor:
        return torch.cat([tensors[i][a:b] for i, a, b in group.slices])

    def group(self, group: _Group, table: Tensor) -> None:
        """All work on one group of rows."""
        labels = self._cut(group, [s.labels for s in self.streams])
        rows = len(labels)
        hidden = None if self.weight is None else self._cut(group, self.hidden)
        chunks = [(a, min(a + self.size, rows)) for a in range(0, rows, self.size)]
        if self.weight is None:
            ends = [0, *torch.tensor([b - a for _, a, b in group.slices]).cumsum(0).tolist()]
            chunks = list(itertools.pairwise(ends))
        state = _GroupState(self, group, table, labels)
        for i, (a, b) in enumerate(chunks):
            z = self._logits(group, hidden, a, b, i)
            state.statistics(z, a, b)
            teacher = None if self.teacher is None else self._teacher_logits(group, a, b)
            if self.paired:
                state.pool(z, state.lse, a, b, slice(0, None, 2))
                state.pool(teacher, state.teacher_statistics(teacher, a, b), a, b, slice(1, None, 2))
            elif self.pooled:
                state.pool(z, state.lse, a, b)
            if teacher is not None:
                state.teach(z, teacher, a, b)
        state.estimate()
        for i, (a, b) in enumerate(chunks if self.differentiate else ()):
            again = len(chunks) > 1 and self.weight is not None
            z = self._logits(group, hidden, a, b, i) if again or self.weight is None else z
            if again and self.teacher is not None:
                self._teacher_logits(group, a, b)
            out = z if self.weight is not None else self.d_hidden[group.slices[i][0]]
            state.gradient(z, out, None if self.teacher is None else self.buffers[1], a, b)
            if self.weight is not None:
                self._products(group, hidden, z[:, : self.V], a, b)

    def _logits(self, group: _Group, hidden: Tensor | None, a: int, b: int, chunk: int) -> Tensor:
        """Logits of the group's rows a to b, their rows padded."""
        if self.weight is None:
            stream, first, last = group.slices[chunk]
            logits = self.hidden[stream][first:last]
            return logits if logits.stride(1) == 1 else logits.contiguous()
        z = self.buffers[0][: b - a]
        return self._multiply(hidden[a:b], self.weight, self.bias, z)

    def _multiply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        view = out[:, : self.V]
        if weight.dtype != out.dtype:
            view.copy_(hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T))
        elif bias is None:
            torch.mm(hidden, weight.T, out=view)
        else:
            torch.addmm(bias, hidden, weight.T, out=view)
        return out

    def _teacher_logits(self, group: _Group, a: int, b: int) -> Tensor:
        weight = self.teacher.weight.detach()
        signals = [self.teacher.predict, self.teacher.explain]
        parts = [
            weight.new_zeros(count, weight.shape[1]) if signal is None else signal.hidden.detach()
            for count, signal in zip(self.counts, signals, strict=False)
        ]
        return self._multiply(
            self._cut(group, parts)[a:b], weight, self.teacher.bias, self.buffers[1][: b - a]
        )

    def _products(self, group: _Group, hidden: Tensor, dz: Tensor, a: int, b: int) -> None:
        """From dL/dz of the rows a to b the gradients of hidden states, weight and bias."""
        if self.d_hidden[0] is not None:
            d_hidden, offset = dz @ self.weight, 0
            for stream, first, last in group.slices:
                low, high = max(a, offset), min(b, offset + last - first)
                if low < high:
                    part = d_hidden[low - a : high - a]
                    self.d_hidden[stream][first + low - offset : first + high - offset] = part
                offset += last - first
        if self.d_weight is not None and dz.dtype == torch.float32:
            self.d_weight.addmm_(dz.T, hidden[a:b])
        elif self.d_weight is not None:
            self.d_weight.add_(dz.T @ hidden[a:b])
        if self.d_bias is not None:
            self.d_bias.add_(dz.sum(0, dtype=torch.float32))

    def add(self, name: str, value: Tensor) -> None:
        """Add to a running sum."""
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def terms(self) -> dict[str, Tensor]:
        """Sums over all groups."""
        names = [
            f"{kind}_{stream}" for stream in ("predict", "explain")[: len(self.streams)] for kind in KINDS
        ]
        if self.pooled:
            names += ["mi", "mi_entropy"] + (["mi_constant"] if self.estimator == PAPER else [])
        if self.teacher is not None:
            taught = {"predict": self.teacher.predict, "explain": self.teacher.explain}
            names += [f"kd_{name}" for name, signal in taught.items() if signal is not None]
        terms = {name: self.sums.get(name, self._new(0.0)) for name in names}
        if self.estimator == NORMALIZED:
            entropies = [self._marginal_entropy(s) for s in self.target_sums if isinstance(s, Tensor)]
            terms["mi_bound"] = sum(entropies, self._new(0.0)) / len(self.directions) - terms["mi"]
        return terms | ({"mi_questions": self.questions} if self.pooled else {})

    def _marginal_entropy(self, target_sum: Tensor) -> Tensor:
        """`barber_agakov` with a number of questions that stays on the device."""
        return barber_agakov(target_sum, self._new(0.0), self.questions)

    def gradients(self) -> list[Tensor | None]:
        """In the order and the dtype of the inputs."""
        parts = [*[*self.d_hidden, None][:2], self.d_weight, self.d_bias]
        return [None if g is None else g.to(self.dtype) for g in parts]


KINDS = ("ce", "correct")


class _GroupState:
    """Per-row and per-question numbers of one group, and the kernels' launches."""

    def __init__(self, work: _Work, group: _Group, table: Tensor, labels: Tensor):
        self.work, self.group, self.table, self.labels = work, group, table, labels
        self.rows = len(labels)
        new = labels.new_empty
        self.lse, self.ce, self.correct = (new(self.rows, dtype=torch.float32) for _ in range(3))
        self.kept = labels != IGNORED
        counts = [b - a for _, a, b in group.slices]
        self.per_stream = [(i, count) for (i, _, _), count in zip(group.slices, counts, strict=True)]
        weights = work.call.weights
        self.scale = self._by_stream((weights.ce_predict, weights.ce_explain))
        self.unused = self.lse
        self.pooled = self.winners = self.sums = self.won = self.lengths = self.unused
        if work.pooled:
            shape = (2, group.questions, work.padded)
            self.pooled = new(shape, dtype=torch.float32)
            self.winners = new(shape if work.is_max else 1, dtype=torch.int32)
            seen = torch.nn.functional.pad(self.kept.cumsum(0), (1, 0))
            self.lengths = (seen[table[:, 1].long()] - seen[table[:, 0].long()]).int()
            self.both = (self.lengths.view(-1, 2) > 0).all(1)
        if work.paired:
            self.paired_lse, self.scratch = (new(self.rows, dtype=torch.float32) for _ in range(2))
        if work.teacher is not None:
            self.student_lse, self.teacher_lse, self.losses, self.means = (
                new(self.rows, dtype=torch.float32) for _ in range(4)
            )
            # no weight for a stream of which the teacher says nothing
            signals = (work.teacher.predict, work.teacher.explain)
            factors = (weights.kd_predict, weights.kd_explain)
            on = tuple(0.0 if s is None else f for s, f in zip(signals, factors, strict=True))
            self.taught = self._by_stream(on) * work.teacher.temperature

    def _by_stream(self, values: tuple[float, float]) -> Tensor:
        """A number for each row that is not ignored, 0 for the others."""
        parts = [torch.full((count,), values[i], device=self.labels.device) for i, count in self.per_stream]
        return torch.where(self.kept, torch.cat(parts), 0.0)

    def statistics(self, z: Tensor, a: int, b: int) -> None:
        """Log-sum-exp, cross entropy and hits of the rows a to b."""
        if a < b:
            row_stats_kernel[(b - a,)](
                z, z.stride(0), self.labels, self.lse, self.ce, self.correct, a,
                self.work.V, self.work.padded, BLOCK=self.work.row_block, num_warps=launch.WARPS,
            )  # fmt: skip

    def teacher_statistics(self, z: Tensor, a: int, b: int) -> Tensor:
        """Log-sum-exp of the teacher's rows a to b at temperature 1."""
        if a < b:
            row_stats_kernel[(b - a,)](
                z, z.stride(0), self.labels, self.paired_lse, self.scratch, self.scratch, a,
                self.work.V, self.work.padded, BLOCK=self.work.row_block, num_warps=launch.WARPS,
            )  # fmt: skip
        return self.paired_lse

    def pool(self, z: Tensor, lse: Tensor, a: int, b: int, sequences: slice = slice(None)) -> None:
        """Carry the pools of these lines of the table on with the rows a to b."""
        work = self.work
        # clones, because a view's first element may lie where loads can't be wide: another compilation
        table, lengths = self.table[sequences].clone(), self.lengths[sequences].clone()
        grid = (len(table), triton.cdiv(work.padded, work.column_block))
        if a < b:
            pool_kernel[grid](
                z, z.stride(0), self.labels, lse, table, lengths, self.pooled, self.winners,
                self.group.questions, a, b, work.V, work.padded,
                IS_MAX=work.is_max, BLOCK=work.column_block, num_warps=launch.WARPS,
            )  # fmt: skip

    def teach(self, z: Tensor, teacher: Tensor, a: int, b: int) -> None:
        """Divergences of the rows a to b."""
        work, settings = self.work, self.work.teacher
        teach_kernel[(b - a,)](
            z, teacher, z.stride(0), self.student_lse, self.teacher_lse, self.losses, self.means, a,
            work.V, work.padded, 1 / settings.temperature, settings.beta,
            DIVERGENCE=_divergence(settings), BLOCK=work.row_block, num_warps=launch.WARPS,
        )  # fmt: skip

    def estimate(self) -> None:
        """Add the group's sums to the running ones."""
        offset = 0
        for stream, count in self.per_stream:
            name, mine = ("predict", "explain")[stream], slice(offset, offset + count)
            self.work.add(f"ce_{name}", self.ce[mine].sum())
            self.work.add(f"correct_{name}", self.correct[mine].sum())
            if self.work.teacher is not None and getattr(self.work.teacher, name) is not None:
                losses = torch.where(self.kept[mine], self.losses[mine], 0.0)
                self.work.add(f"kd_{name}", losses.sum() * self.work.teacher.temperature**2)
            offset += count
        if self.work.pooled:
            self._estimate()

    def _estimate(self) -> None:
        """Pooled sums, the terms they give, and s[t] of a max."""
        work, questions = self.work, self.group.questions
        grid = (questions, triton.cdiv(work.padded, work.column_block))
        parts = self.lse.new_empty(*grid, SUMS)
        pooled_sums_kernel[grid](
            self.pooled, self.both.int(), parts, questions, work.V, work.padded,
            BLOCK=work.column_block, num_warps=launch.WARPS,
        )  # fmt: skip
        self.sums = parts.sum(1)
        columns = self.sums.unbind(1)
        work.questions = work.questions + self.both.sum()
        for d, (target, estimate) in enumerate(work.directions):
            t, e = (("predict", "explain").index(name) for name in (target, estimate))
            total = columns[t]
            entropy = total.log() - columns[5 + t] / total
            if work.estimator == PAPER:
                values = {"mi": total * columns[2 + e].log() - columns[4], "mi_entropy": entropy}
                values["mi_constant"] = total * math.log(work.V)
            else:
                values = {"mi": columns[e].log() - columns[7 + t] / total, "mi_entropy": entropy}
                shares = torch.exp(self.pooled[t, :, : work.V] - total.log()[:, None])
                work.target_sums[d] = work.target_sums[d] + torch.where(self.both[:, None], shares, 0.0).sum(
                    0
                )
            for name, value in values.items():
                work.add(name, torch.where(self.both, value, 0.0).sum() / len(work.directions))
        if work.passes:
            self.won = torch.zeros_like(self.lse)
            if work.is_max and self.rows:
                self._winner_sums()

    def _winner_sums(self) -> None:
        work = self.work
        splits = triton.cdiv(work.padded, work.column_block)
        parts = self.lse.new_zeros(self.rows, splits)
        for side, name in enumerate(("predict", "explain")):
            if name not in [estimate for _, estimate in work.directions]:
                continue
            lines = self.table[side::2].contiguous()
            winner_sums_kernel[(len(lines), splits)](
                lines, self.pooled, self.winners, self.sums, parts, self.group.questions, work.V, work.padded,
                work.pool_scale, ESTIMATOR=work.estimator, BLOCK=work.column_block, num_warps=launch.WARPS,
            )  # fmt: skip
        self.won = parts.sum(1)

    def _mean_sums(self, z: Tensor, a: int, b: int) -> None:
        work = self.work
        sequences = torch.arange(len(self.table), device=self.table.device)
        order = torch.cat([sequences[0::2], sequences[1::2]])
        counts = (self.table[:, 1] - self.table[:, 0])[order]
        owners = torch.repeat_interleave(order, counts, output_size=self.rows)
        mean_sums_kernel[(b - a,)](
            z, z.stride(0), self.labels, self.lse, owners, self.lengths, self.pooled, self.sums, work.gets,
            self.won, self.group.questions, a, work.V, work.padded, work.pool_scale,
            ESTIMATOR=work.estimator, BLOCK=work.row_block, num_warps=launch.WARPS,
        )  # fmt: skip

    def gradient(self, z: Tensor, out: Tensor, teacher: Tensor | None, a: int, b: int) -> None:
        """Write dL/dz of the rows a to b to `out`, which may be z."""
        work, settings = self.work, self.work.teacher
        if a == b:
            return
        if work.passes and not work.is_max:
            self._mean_sums(z, a, b)
        u = self.unused
        taught = (
            (teacher, self.student_lse, self.teacher_lse, self.means, self.taught) if settings else (u,) * 5
        )
        grid = (len(self.table), triton.cdiv(work.padded, work.column_block))
        gradient_kernel[grid](
            z, z.stride(0), out, out.stride(0), self.labels, self.lse, self.scale, self.won, self.table,
            self.lengths, self.pooled, self.winners, self.sums, work.gets, *taught, self.group.questions,
            a, b, work.V, work.padded, work.pool_scale,
            1 / settings.temperature if settings else 1.0, settings.beta if settings else 0.5,
            ESTIMATOR=work.estimator if work.passes else NONE, IS_MAX=work.is_max,
            DIVERGENCE=_divergence(settings) if settings else NONE,
            BLOCK=work.column_block, num_warps=launch.WARPS,
        )  # fmt: skip


def _divergence(settings) -> int:
    return {"forward": FORWARD, "reverse": REVERSE, "jsd": JSD}[settings.divergence]
