"""The sampler: which records each step learns from.

The choice is a pure function of the settings: step k of seed s is always the same questions
in the same order, for any number of ranks and micro-batches. Resuming needs only the number
of the step, nothing can get lost between workers, and the global token counts of a step,
by which the losses are divided, are known on every rank without talking.

Within a batch, records of similar length go to the same micro-batch. With `data.bucket_batches`
above 1 whole batches are of similar length too: the records of a pool of that many batches are
sorted by target length and cut into slabs, and each slab is sorted by question length (a sort by
one length leaves the other one random, and with T5 both cost). That saves padding, but batches
are then no random sample: where length tells the kind of record, a batch holds one kind only. On the
demo's pretraining it cost nearly everything (validation accuracy 57 % with a pool of 64, 100 %
without; the student distilled from it 30 % and 67 %; one run each), so the default is 1.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ibdistill.config.sections import DataConfig
from ibdistill.data.features import Features


class Sampler:
    """Which questions each step learns from.

    An epoch is a new permutation of the records, cut into length-bucketed batches in random
    order; the records that do not fill the last batch sit out, other ones each epoch. In a
    mixture each task gets its share of every epoch and walks through its own permutations,
    so a small task may come round several times an epoch. Of a question with several rationales one record
    is drawn in each epoch, by seed, question and epoch.
    """

    def __init__(self, features: Features, config: DataConfig, *, batch_size: int, seed: int) -> None:
        """Raises ValueError if an epoch does not fill one batch."""
        self.batch_size = batch_size
        self._seed = seed
        self._features = features
        self._bucket_batches = config.bucket_batches
        self._epoch = -1
        self._samples = _Samples(features)
        firsts = self._samples.firsts
        self._members = [
            firsts[features.groups[firsts] == group] for group in range(int(features.groups.max()) + 1)
        ]
        sizes = np.array([len(members) for members in self._members], dtype=np.float64)
        shares = np.array(config.mixture_weights or sizes ** (1 / config.mixture_temperature))
        self._counts = np.floor(shares / shares.sum() * len(firsts) + 0.5).astype(int)
        self.steps_per_epoch = int(self._counts.sum()) // batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"optim.batch_size is {batch_size}, but there are only {len(firsts)} training records; "
                "use a smaller batch or more data"
            )

    def step(self, step: int) -> np.ndarray:
        """[batch_size] record indices of step `step` (from 0), ordered by length."""
        epoch = step // self.steps_per_epoch
        if self._epoch != epoch:
            self._epoch, self._batches = epoch, self._plan_epoch(epoch)
        return self._batches[step % self.steps_per_epoch]

    def micro_batches(
        self, step: int, *, rank: int, world_size: int, micro_batch_size: int
    ) -> list[np.ndarray]:
        """This rank's micro-batches of a step, of at most `micro_batch_size` questions and near-equal sizes.

        Neighbours in length go to the same micro-step on all ranks, so ranks wait little for
        each other.
        """
        indices = self.step(step)
        count = -(-len(indices) // (world_size * micro_batch_size))
        return np.array_split(indices, count * world_size)[rank::world_size]

    def counts(self, step: int) -> dict[str, int]:
        """What a step holds over all ranks: target tokens per segment, `questions`, `explained` (questions
        with a rationale), and `question_tokens` (of the first stream)."""
        indices = self.step(step)
        lengths = {name: table.lengths[indices] for name, table in self._features.targets.items()}
        return {segment: int(own.sum()) for segment, own in lengths.items()} | {
            "questions": len(indices),
            "explained": int((self._features.rationales.lengths[indices] > 0).sum()),
            "question_tokens": int(self._features.first_questions.lengths[indices].sum()),
        }

    def _draw(self, group: int, epoch: int) -> np.ndarray:
        """The records of a task in an epoch: the next ones of its endless walk through permutations."""
        members, count = self._members[group], self._counts[group]
        start, end = epoch * count, (epoch + 1) * count
        rounds = range(start // len(members), -(-end // len(members)))
        walk = np.concatenate(
            [np.random.default_rng([self._seed, group, r]).permutation(members) for r in rounds]
            or [members[:0]]
        )
        return walk[start - start // len(members) * len(members) :][:count]

    def _plan_epoch(self, epoch: int) -> np.ndarray:
        """[steps_per_epoch, batch_size] record indices."""
        rng = np.random.default_rng([self._seed, epoch, 1 << 30])
        indices = np.concatenate([self._draw(group, epoch) for group in range(len(self._members))])
        indices = rng.permutation(indices)[: self.steps_per_epoch * self.batch_size]
        indices = self._samples.drawn(indices, self._seed, epoch)
        pool = self._bucket_batches * self.batch_size
        batches = np.concatenate(
            [self._bucket(indices[start : start + pool]) for start in range(0, len(indices), pool)]
        )
        return batches[rng.permutation(len(batches))]

    def _bucket(self, indices: np.ndarray) -> np.ndarray:
        """[batches, batch_size] the records of a pool, as batches of similar target and question length."""
        targets = sum(table.lengths[indices] for table in self._features.targets.values())
        questions = self._features.first_questions.lengths[indices]
        num_batches = len(indices) // self.batch_size
        slab = self.batch_size * max(1, round(num_batches**0.5))
        by_target = np.argsort(targets, kind="stable")
        order = [
            slab_indices[np.argsort(questions[slab_indices], kind="stable")]
            for slab_indices in (by_target[start : start + slab] for start in range(0, len(indices), slab))
        ]
        return indices[np.concatenate(order)].reshape(num_batches, self.batch_size)


class _Samples:
    """The questions of some features, of which one record each is drawn in an epoch."""

    def __init__(self, features: Features) -> None:
        names = np.arange(len(features)) if features.samples is None else features.samples
        _, self.firsts, self._question, self._sizes = np.unique(
            names, return_index=True, return_inverse=True, return_counts=True
        )
        self._order = np.argsort(self._question, kind="stable")
        self._starts = np.cumsum(self._sizes) - self._sizes

    def drawn(self, indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """For each record one of the samples of its question, drawn by seed, question and epoch."""
        if len(self._sizes) == len(self._order):
            return indices
        chosen = np.random.default_rng([seed, epoch, 1 << 29]).random(len(self._sizes)) * self._sizes
        questions = self._question[indices]
        return self._order[self._starts[questions] + chosen.astype(int)[questions]]


class MixedSampler(Sampler):
    """The sampler of a run that gives a share of every batch to pseudo-labelled records.

    `training/pseudo_labels.py` makes these records. The labelled and the pseudo-labelled part of
    a batch each walk through permutations of their own records, as functions of the run's step.
    An epoch has as many steps as without pseudo-labelled records.
    """

    def __init__(
        self, gold: Features, pseudo: Features, config: DataConfig, *, batch_size: int, seed: int
    ) -> None:
        """The indices that `step` returns are those of `gold + pseudo`.

        Raises ValueError if the records of either kind do not fill their part of one batch.
        """
        super().__init__(gold, config, batch_size=batch_size, seed=seed)
        size = config.pseudo_batch_size(batch_size)
        self._gold = Sampler(gold, config, batch_size=batch_size - size, seed=seed)
        one_task = replace(config, mixture_weights=None)
        self._pseudo = Sampler(pseudo, one_task, batch_size=size, seed=seed)
        self._first_pseudo = len(gold)
        self._features = gold + pseudo

    def step(self, step: int) -> np.ndarray:
        """[batch_size] indices into `gold + pseudo`, ordered by length."""
        indices = [self._gold.step(step), self._first_pseudo + self._pseudo.step(step)]
        return self._bucket(np.concatenate(indices))[0]


class OnPolicySampler(Sampler):
    """The sampler of a run in which a share of every batch has text of the student's own.

    Questions and their order are those of `Sampler`. Which of a step's questions have own text is drawn by
    seed and step, so it is known before the text is there (`drawn`).
    """

    def __init__(
        self, gold: Features, config: DataConfig, *, batch_size: int, seed: int, share: float
    ) -> None:
        """Raises ValueError as `Sampler` does."""
        super().__init__(gold, config, batch_size=batch_size, seed=seed)
        self._share, self._gold = share, len(gold)
        self._places = np.full(len(gold), -1)
        self._window = range(0)

    def drawn(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """[batch_size] indices of a step's records, and whether each has own text once there is some."""
        indices = super().step(step)
        order = np.random.default_rng([self._seed, step, 1 << 28]).permutation(len(indices))
        return indices, order < round(self._share * len(indices))

    def to_sample(self, window: range) -> np.ndarray:
        """The records that need own text in these steps, in rising order."""
        parts = [indices[is_own] for indices, is_own in map(self.drawn, window)]
        return np.unique(np.concatenate(parts))

    def use(self, own: Features, indices: np.ndarray, window: range, gold: Features) -> None:
        """In the steps of `window` take the text `own` for these records; in others there is none. The
        indices that `step` returns are those of `gold + own`."""
        self._features, self._window = gold + own, window
        self._places = np.full(len(gold), -1)
        self._places[indices] = len(gold) + np.arange(len(indices))

    def step(self, step: int) -> np.ndarray:
        """[batch_size] indices, ordered by length."""
        if step not in self._window:
            return super().step(step)
        indices, is_own = self.drawn(step)
        places = self._places[indices]
        return self._bucket(np.where(is_own & (places >= 0), places, indices))[0]

    def micro_batches(
        self, step: int, *, rank: int, world_size: int, micro_batch_size: int
    ) -> list[np.ndarray]:
        """This rank's micro-batches of a step; in each the questions with own text come last."""
        sizes = {"rank": rank, "world_size": world_size, "micro_batch_size": micro_batch_size}
        parts = super().micro_batches(step, **sizes)
        return [part[np.argsort(part >= self._gold, kind="stable")] for part in parts]

    def counts(self, step: int) -> dict[str, int]:
        """As `Sampler.counts`, where the rationale's segment and `explained` have the data's text alone; with
        `sampled`, the tokens of the student's own text, and `sampled_questions`, how many have it."""
        found, indices = super().counts(step), self.step(step)
        own = indices[indices >= self._gold]
        tokens = self._features.rationales.lengths[own]
        found[self._features.text] -= int(tokens.sum())
        found["explained"] -= int((tokens > 0).sum())
        return found | {"sampled": int(tokens.sum()), "sampled_questions": len(own)}
