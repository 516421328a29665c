"""The sampler whose steps are so many tokens (`optim.tokens_per_batch`) instead of so many questions.

An epoch is a permutation of the records, cut where the next record would exceed a step's tokens. So the plan
is a function of the step alone, as that of `data.sampler` is, and which records a step takes does not depend
on the number of ranks. Only how a step is shared does:

A step's records go to the forward passes of all ranks, the longest records first and each to the forward
pass that has least: tokens, by which matrix products and memory go, and squares of lengths, by which
attention goes, both as parts of the step's sums. Every rank runs the same number of forward passes, none of
them empty, because ranks that run different numbers would wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ibdistill.config.sections import DataConfig, OptimConfig
from ibdistill.config.zero_file import split_batch
from ibdistill.data.features import Features
from ibdistill.data.records import segments_of
from ibdistill.data.sampler import Sampler


class TokenSampler(Sampler):
    """Which questions each step learns from, where a step is so many tokens.

    A record's tokens are those of its questions and targets in all streams that are trained. The records
    behind an epoch's last whole step sit out, other ones in each epoch: fewer tokens than
    a step's, and for each step what it left unused because the next record did not fit.
    """

    def __init__(
        self,
        features: Features,
        config: DataConfig,
        optim: OptimConfig,
        *,
        streams: Sequence[str],
        world_size: int,
        seed: int,
    ) -> None:
        """Raises ValueError if a record exceeds what one forward pass takes, if an epoch does not fill one
        step, or if tasks are mixed otherwise than by their sizes."""
        super().__init__(features, config, batch_size=1, seed=seed)
        self._budget, self._forwards = optim.tokens_per_batch, split_batch(optim, world_size)[1]
        parts = [features.questions[stream].lengths for stream in streams]
        parts += [features.targets[segment].lengths for segment in segments_of(streams)]
        self._tokens = np.sum(parts, axis=0)
        self._squares = squares(features, streams)
        self._check(features, world_size)
        self.steps_per_epoch = int(self._tokens.sum()) // self._budget
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"optim.tokens_per_batch is {self._budget}, but the {len(features)} training records have "
                f"{int(self._tokens.sum())} tokens; use a smaller batch or more data"
            )

    def _check(self, features: Features, world_size: int) -> None:
        if any(count != len(members) for count, members in zip(self._counts, self._members, strict=True)):
            raise ValueError(
                "optim.tokens_per_batch takes each record once per epoch, and data.mixture_weights or "
                "data.mixture_temperature repeats some; leave these out, or set optim.batch_size"
            )
        share, longest = self._budget // (world_size * self._forwards), int(self._tokens.argmax())
        if self._tokens[longest] > share:
            raise ValueError(
                f"record {features.ids[longest]!r:.100} has {self._tokens[longest]} tokens in all streams, "
                f"more than one forward pass takes: optim.tokens_per_batch {self._budget} / ({world_size} "
                f"ranks x {self._forwards} forward passes) = {share}. Raise optim.tokens_per_batch (and "
                "optim.tokens_per_forward, if it is set), or lower data.max_question_tokens or "
                "data.max_rationale_tokens"
            )

    def micro_batches(
        self, step: int, *, rank: int, world_size: int, micro_batch_size: int = 0
    ) -> list[np.ndarray]:
        """This rank's micro-batches of a step, of near-equal tokens and squared lengths.

        `micro_batch_size` is the other sampler's: here `optim.tokens_per_forward` decides.
        """
        shares = balanced(self.step(step), self._tokens, self._squares, world_size * self._forwards)
        # the like-sized forward passes fall together, and no rank has the larger one each time
        turns = [shares[i : i + world_size] for i in range(0, len(shares), world_size)]
        return [turn[:: -1 if number % 2 else 1][rank] for number, turn in enumerate(turns)]

    def _plan_epoch(self, epoch: int) -> list[np.ndarray]:
        """The record indices of each step."""
        rng = np.random.default_rng([self._seed, epoch, 1 << 30])
        indices = rng.permutation(
            np.concatenate([self._draw(group, epoch) for group in range(len(self._members))])
        )
        ends, start, steps = self._tokens[indices].cumsum(), 0, []
        for _ in range(self.steps_per_epoch):
            before = ends[start - 1] if start else 0
            end = int(np.searchsorted(ends, before + self._budget, side="right"))
            steps.append(indices[start:end])
            start = end
        return steps


def squares(features: Features, streams: Sequence[str]) -> np.ndarray:
    """[records] int64: the sum of the squared lengths of each record's sequences."""
    lengths = (
        features.questions[stream].lengths
        + sum(features.targets[segment].lengths for segment in segments_of((stream,)))
        for stream in streams
    )
    return np.sum([each.astype(np.int64) ** 2 for each in lengths], axis=0)


def balanced(indices: np.ndarray, tokens: np.ndarray, squares: np.ndarray, shares: int) -> list[np.ndarray]:
    """These records in `shares` parts of near-equal tokens and squares, the largest part first.

    `tokens` and `squares` are those of all records. No part is empty if there are as many records as parts.
    """
    costs = np.stack([sizes[indices] / sizes[indices].sum() for sizes in (tokens, squares)], axis=1)
    loads, parts = np.zeros(shares), [[] for _ in range(shares)]
    for i in np.argsort(-costs.sum(1), kind="stable"):
        least = int(loads.argmin())
        loads[least] += costs[i].sum()
        parts[least].append(indices[i])
    return [np.array(parts[i]) for i in np.argsort(-loads, kind="stable")]
