"""The mutual-information term on pooled distributions, for the lean torch path."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ibdistill.ops.arguments import BLOCK_ROWS, STREAMS, Call
from ibdistill.ops.estimators import ESTIMATORS, barber_agakov
from ibdistill.ops.packing import Rows

MARKS = 16
"""Positions that a max is taken over at once: their marks are a byte each."""


def first_max(block: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum over the rows of [n, V], n < 256, and the first row that has it: `max(0)` for a CPU.

    That one costs 1.5 times as much there, because it walks down the columns. Marking the winners with
    n, n - 1, ... 1 and taking the largest mark walks along the rows. `marks` [n or more, V] bool is scratch.
    """
    best, n = block.amax(0), len(block)
    marks = torch.eq(block, best, out=marks[:n]).view(torch.uint8)
    marks.mul_(torch.arange(n, 0, -1, dtype=torch.uint8, device=block.device)[:, None])
    return best, n - marks.amax(0).long()


class Pooler:
    """The mutual-information term of one group of questions after another, on pooled distributions.

    Call `start`, then `pool` for each chunk of the group's rows, then `estimate`, then
    `logits_gradient` for each chunk.
    """

    def __init__(self, call: Call, rows: Rows, buffer: Tensor, differentiate: bool):
        self.call, self.rows, self.differentiate = call, rows, differentiate
        self.estimator = ESTIMATORS[call.mi.estimator]
        self.directions = call.mi.directions
        self.is_max = call.mi.pool == "max"
        self.columns = torch.arange(buffer.shape[1], device=buffer.device)
        self.new_zeros = lambda *shape: buffer.new_zeros(shape)
        if self.is_max:
            self.marks = torch.empty(MARKS, buffer.shape[1], dtype=torch.bool, device=buffer.device)
        self.count = 0
        self.sums: dict[str, Tensor] = {"mi": self.new_zeros()}
        self.target_sums = [0 for _ in self.directions]
        self.gradients: dict[str, Tensor] = {}

    def start(self, first: int, last: int) -> None:
        """Begin with the questions first to last - 1 that have rows in both streams."""
        self.spans = [
            {"predict": (p, e), "explain": (e, end)}
            for p, e, end in self.rows.bounds[first:last]
            if p < e < end
        ]
        shape = (len(self.spans), len(self.columns))
        self.pooled = {n: self.new_zeros(*shape).fill_(-torch.inf) for n in ("predict", "explain")}
        # who won only matters to streams that get a gradient
        receivers = (
            {estimate for _, estimate in self.directions} if self.differentiate and self.is_max else ()
        )
        self.winners = {name: self.columns.new_zeros(shape) for name in receivers}
        self.gradients = {}

    def _segments(self, a: int, b: int, names) -> Iterator[tuple[int, str, int, int]]:
        """The parts of the questions' sequences in the rows a to b: (question, stream, from, to)."""
        for i, span in enumerate(self.spans):
            for name in names:
                start, stop = span[name]
                if max(start, a) < min(stop, b):
                    yield i, name, max(start, a), min(stop, b)

    def pool(self, log_p: Tensor, a: int, b: int, names: tuple[str, ...] = STREAMS) -> None:
        """Pool the log probabilities [b - a, V] of the rows a to b of these streams."""
        for i, name, start, stop in self._segments(a, b, names):
            pooled, part = self.pooled[name][i], log_p[start - a : stop - a]
            if not self.is_max:
                for block in part.split(BLOCK_ROWS):
                    torch.logaddexp(pooled, torch.logsumexp(block, 0), out=pooled)
                continue
            if name not in self.winners:
                torch.maximum(pooled, part.amax(0), out=pooled)
                continue
            for row, block in zip(range(start, stop, MARKS), part.split(MARKS), strict=True):
                best, winner = first_max(block, self.marks)
                # a later block wins only where it is larger: ties go to the first position
                better = best > pooled
                self.winners[name][i] = torch.where(better, winner + row, self.winners[name][i])
                pooled.copy_(torch.where(better, best, pooled))

    def estimate(self) -> None:
        """Add the group's terms and, where somebody needs it, get dL / d log(pooled)."""
        if not self.is_max:
            for name, pooled in self.pooled.items():
                lengths = [float(stop - start) for start, stop in (span[name] for span in self.spans)]
                pooled.sub_(pooled.new_tensor(lengths).log_()[:, None])
        self.count += len(self.spans)
        for d, (target, estimate) in enumerate(self.directions):
            pair = self.pooled[target], self.pooled[estimate]
            for name, value in self.estimator.function(*pair).items():
                self.sums[name] = self.sums.get(name, 0) + value.sum() / len(self.directions)
            if self.differentiate:
                factor = self.call.weights.mi / len(self.directions)
                self.gradients[estimate] = self.estimator.gradient(*pair).mul_(factor)
            if self.call.mi.estimator == "normalized":
                self.target_sums[d] += torch.softmax(self.pooled[target], -1).sum(0)

    def _receivers(self) -> list[str]:
        """Streams that get a gradient, in the order of the rows."""
        return [name for name in STREAMS if name in self.gradients]

    def logits_gradient(self, log_p: Tensor, a: int, b: int, scale: Tensor) -> Tensor:
        """Overwrite log probabilities with p (scale - s) + what the pool passes to each position."""
        if self.is_max:
            return self._max_gradient(log_p, a, b, scale)
        done = a
        for i, name, start, stop in self._segments(a, b, self._receivers()):
            log_p[done - a : start - a].exp_().mul_(scale[done - a : start - a, None])
            length = self.spans[i][name][1] - self.spans[i][name][0]
            log_sum = self.pooled[name][i] + math.log(length)
            for row in range(start - a, stop - a, BLOCK_ROWS):
                block = log_p[row : min(row + BLOCK_ROWS, stop - a)]
                share = (block - log_sum).exp_().mul_(self.gradients[name][i])
                factor = scale[row : row + len(block)] - share.sum(-1)
                block.exp_().mul_(factor[:, None]).add_(share)
            done = stop
        log_p[done - a :].exp_().mul_(scale[done - a :, None])
        return log_p

    def _max_gradient(self, log_p: Tensor, a: int, b: int, scale: Tensor) -> Tensor:
        won, passed = [], []
        sums = torch.zeros_like(scale)
        for i, name, start, stop in self._segments(a, b, self._receivers()):
            winner, gradient = self.winners[name][i] - a, self.gradients[name][i]
            if (start, stop) != self.spans[i][name]:
                inside = (winner >= start - a) & (winner < stop - a)
                winner, gradient = winner.where(inside, start - a), gradient.where(inside, 0)
            sums.index_add_(0, winner, gradient)
            won.append(winner * len(self.columns) + self.columns)
            passed.append(gradient)
        dz = log_p.exp_().mul_((scale - sums)[:, None])
        for places, gradient in zip(won, passed, strict=True):
            # each (position, entry) occurs once: a vocabulary entry has one winner
            dz.view(-1).index_add_(0, places, gradient)
        return dz

    def terms(self) -> dict[str, Tensor]:
        """Sums over all groups' questions."""
        if not self.count:
            # an estimator of no question still names its terms
            self.start(0, 0)
            self.estimate()
        terms = dict(self.sums)
        if self.call.mi.estimator == "normalized":
            bounds = [barber_agakov(s, 0, self.count) for s in self.target_sums if self.count]
            terms["mi_bound"] = sum(bounds, self.new_zeros()) / len(self.directions) - terms["mi"]
        return terms | {"mi_questions": self.new_zeros().add_(self.count)}
