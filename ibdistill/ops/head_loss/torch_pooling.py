"""The mutual-information term on pooled distributions in the torch implementation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ibdistill.ops.cpu.cache_blocks import cached_rows, exp_times_
from ibdistill.ops.head_loss.arguments import STREAMS, Call
from ibdistill.ops.head_loss.estimators import ESTIMATORS, barber_agakov, values_and_gradient
from ibdistill.ops.head_loss.packing import Rows


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
        self.vocabulary = buffer.shape[1]
        self.new_zeros = lambda *shape: buffer.new_zeros(shape)
        self.size = min(cached_rows(buffer), len(buffer))
        self.shares = buffer.new_empty(self.size, self.vocabulary)
        self.ones = torch.ones_like(self.shares[:, 0])
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
        shape = (len(self.spans), self.vocabulary)
        self.pooled = {n: self.new_zeros(*shape).fill_(-torch.inf) for n in ("predict", "explain")}
        self.winners = self.new_zeros(self.vocabulary)  # 1 where the current sequence had its maximum
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
            for block in part.split(self.size):
                if self.is_max:
                    torch.maximum(pooled, block.amax(0), out=pooled)
                else:
                    torch.logaddexp(pooled, torch.logsumexp(block, 0), out=pooled)

    def estimate(self) -> None:
        """Add the group's terms and, where it is needed, compute dL / d log(pooled)."""
        if not self.is_max:
            for name, pooled in self.pooled.items():
                lengths = [float(stop - start) for start, stop in (span[name] for span in self.spans)]
                pooled.sub_(pooled.new_tensor(lengths).log_()[:, None])
        self.count += len(self.spans)
        for d, (target, estimate) in enumerate(self.directions):
            values, gradient = values_and_gradient(
                self.call.mi.estimator,
                self.pooled[target],
                self.pooled[estimate],
                self.call.mi.temperature,
                differentiate=self.differentiate,
            )
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0) + value.sum() / len(self.directions)
            if gradient is not None:
                self.gradients[estimate] = gradient.mul_(self.call.weights.mi / len(self.directions))
            if self.estimator.is_cross_entropy:
                self.target_sums[d] += torch.softmax(self.pooled[target], -1).sum(0)

    def _receivers(self) -> list[str]:
        """Streams that get a gradient, in the order of the rows."""
        return [name for name in STREAMS if name in self.gradients]

    def logits_gradient(self, log_p: Tensor, a: int, b: int, scale: Tensor) -> Tensor:
        """Overwrite log probabilities with p (scale - s) + what the pool passes to each position.

        They must be those that were pooled, bit for bit, because a max is found again by its value. For a
        question walked twice they are: the same product of the same rows in the same memory.
        """
        done = a
        for i, name, start, stop in self._segments(a, b, self._receivers()):
            exp_times_(log_p[done - a : start - a], scale[done - a : start - a])
            if start == self.spans[i][name][0]:
                self.winners.zero_()
            for row in range(start - a, stop - a, self.size):
                block = log_p[row : min(row + self.size, stop - a)]
                share = self._share(block, i, name)
                exp_times_(block, scale[row : row + len(block)] - share.sum(-1))
                block.add_(share)
            done = stop
        exp_times_(log_p[done - a :], scale[done - a :])
        return log_p

    def _share(self, block: Tensor, i: int, name: str) -> Tensor:
        """What the pool of question i passes to the rows of a block, [rows, V]. Valid until the next call."""
        pooled, gradient, out = self.pooled[name][i], self.gradients[name][i], self.shares[: len(block)]
        if not self.is_max:
            start, stop = self.spans[i][name]
            return torch.sub(block, pooled + math.log(stop - start), out=out).exp_().mul_(gradient)
        won = torch.eq(block, pooled, out=out)  # as numbers: bools take a CPU four times as long
        before = self.winners.clone()
        self.winners.addmv_(won.T, self.ones[: len(won)])
        if self.winners.amax() > 1:  # ties go to the first position
            tied = (self.winners > 1).nonzero()[:, 0]
            columns = won[:, tied]
            won[:, tied] = columns * (columns.cumsum(0) + before[tied] == 1)
            self.winners.clamp_max_(1)
        return won.mul_(gradient)

    def terms(self) -> dict[str, Tensor]:
        """Sums over all groups' questions."""
        if not self.count:
            # an estimator of no question still names its terms
            self.start(0, 0)
            self.estimate()
        terms = dict(self.sums)
        if self.estimator.is_cross_entropy:
            bounds = [barber_agakov(s, 0, self.count) for s in self.target_sums if self.count]
            terms["mi_bound"] = sum(bounds, self.new_zeros()) / len(self.directions) - terms["mi"]
        return terms | {"mi_questions": self.new_zeros().add_(self.count)}
