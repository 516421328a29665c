"""From records to batches: token tables, length buckets, a resumable plan, packed targets.

A **plan** is a pure function of its settings: step k of seed s is always the same questions
in the same order, for any number of ranks and micro-batches. Resuming needs only the number
of the step, nothing can get lost between workers, and the global token counts of a step,
by which the losses are divided, are known on every rank without talking.

Within a batch, records of similar length go to the same micro-batch. With `data.bucket_batches`
above 1 whole batches are of similar length too: the records of a pool of so many batches are
sorted by target length, cut into slabs, and each slab is sorted by question length (sorting by
one length leaves the other one random, and with T5 both cost). That saves padding, but batches
are then no random sample: where length tells the kind of record, a batch holds one kind. On the
demo's pretraining it cost nearly everything (validation accuracy 57 % with a pool of 64, 100 %
without; the student distilled from it 30 % and 67 %; one run each), so the default is 1.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ibdistill.config import DataConfig
from ibdistill.records import STREAMS, Record

logger = logging.getLogger("ibdistill")


class Ragged:
    """Token sequences as one flat array and offsets: a few bytes a token, however many records."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        arrays = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
        self.offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(array) for array in arrays], out=self.offsets[1:])
        self.flat = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Features:
    """The token ids of some records. Targets end with the end-of-sequence token."""

    ids: list[str]
    """The records' names, for messages."""
    groups: np.ndarray
    """[records] int: which task of the mixture each belongs to, counted in the order of `data.task`."""
    questions: dict[str, Ragged]
    """Stream -> prefix and question."""
    targets: dict[str, Ragged]
    """Stream -> label or rationale; the explain target of a record without a rationale is empty."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B questions, S streams. Targets are packed: N tokens in all, no padding.

    Question rows of all streams are stacked, predict first, so that one encoder call serves
    both streams.
    """

    question_ids: tuple[str, ...]
    input_ids: Tensor
    """[S * B, L] int64."""
    attention_mask: Tensor
    """[S * B, L] int64, 1 where a token is."""
    question_positions: Tensor
    """[N_question] int64: where the predict stream's question tokens sit in its flattened [B * L]."""
    decoder_input_ids: dict[str, Tensor]
    """Stream -> [B, T_stream] int64, targets shifted right behind the start token."""
    positions: dict[str, Tensor]
    """Stream -> [N_stream] int64: where the real targets sit in the flattened [B * T_stream]."""
    labels: dict[str, Tensor]
    """Stream -> [N_stream] int64."""
    cu: dict[str, Tensor]
    """Stream -> [B + 1] int32: question b's targets are `labels[cu[b]:cu[b + 1]]`."""

    @property
    def num_tokens(self) -> int:
        """Real (unpadded) tokens that enter the model: questions and targets."""
        return int(self.attention_mask.sum()) + sum(len(labels) for labels in self.labels.values())

    @property
    def num_positions(self) -> int:
        """Positions that the model computes, padding included."""
        return self.input_ids.numel() + sum(ids.numel() for ids in self.decoder_input_ids.values())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, `cu` apart: offsets are read by the host.

        The copy overlaps with what the device is doing.
        """

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: moved(tensor) for key, tensor in value.items()}
            if isinstance(value, Tensor) and device.type == "cuda":
                return value.pin_memory().to(device, non_blocking=True)
            return value

        fields = {f.name: moved(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return Batch(**fields | {"cu": self.cu})


def tokenize(
    records: Sequence[Record],
    prefixes: dict[str, dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> Features:
    """Token ids of both streams; `prefixes` maps task -> stream -> prefix.

    Text beyond the limits of `config` is cut, counted and reported.
    """
    tasks = list(dict.fromkeys(record.task for record in records))  # in the order of data.task
    questions = {}
    for stream in STREAMS:
        texts = [prefixes[record.task][stream] + record.question for record in records]
        questions[stream] = _encode(texts, tokenizer, config.max_question_tokens, f"{stream} questions")
    labels = [record.label for record in records]
    rationales = [record.rationale for record in records]
    return Features(
        ids=[record.id for record in records],
        groups=np.array([tasks.index(record.task) for record in records]),
        questions=questions,
        targets={
            "predict": _encode(labels, tokenizer, config.max_label_tokens, "labels"),
            "explain": _encode(rationales, tokenizer, config.max_rationale_tokens, "rationales"),
        },
    )


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, limit: int, what: str) -> Ragged:
    """Ids with the end token; a text that is too long loses its end but keeps the end token."""
    eos = tokenizer.eos_token_id
    sequences, cut = [], 0
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    for text, ids in zip(texts, encoded, strict=True):
        cut += len(ids) >= limit
        sequences.append([*ids[: limit - 1], eos] if text else [])
    if cut:
        logger.warning("%d of %d %s are longer than %d tokens and were cut", cut, len(texts), what, limit)
    return Ragged(sequences)


class Plan:
    """Which questions each step learns from.

    An epoch is a new permutation of the records, cut into length-bucketed batches in random
    order; the records that do not fill the last batch sit out, other ones each epoch. In a
    mixture each task gets its share of every epoch and walks through its own permutations,
    so a small task may come round several times an epoch.
    """

    def __init__(self, features: Features, config: DataConfig, *, batch_size: int, seed: int) -> None:
        """Raises ValueError if an epoch does not fill one batch."""
        self.batch_size = batch_size
        self._seed = seed
        self._features = features
        self._bucket_batches = config.bucket_batches
        self._epoch = -1
        self._members = [
            np.flatnonzero(features.groups == group) for group in range(int(features.groups.max()) + 1)
        ]
        sizes = np.array([len(rows) for rows in self._members], dtype=np.float64)
        shares = np.array(config.mixture_weights or sizes ** (1 / config.mixture_temperature))
        self._counts = np.floor(shares / shares.sum() * len(features) + 0.5).astype(int)
        self.steps_per_epoch = int(self._counts.sum()) // batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"optim.batch_size is {batch_size}, but there are only {len(features)} training records; "
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
        """This rank's micro-batches of a step.

        Neighbours in length go to the same micro-step on all ranks, so ranks wait little for
        each other.
        """
        rows = self.step(step).reshape(-1, world_size, micro_batch_size)
        return list(rows[:, rank])

    def counts(self, step: int) -> dict[str, int]:
        """Global target tokens of a step by stream; `questions`, `explained` (with a rationale), and
        `question_tokens` of the predict stream."""
        rows = self.step(step)
        lengths = {stream: self._features.targets[stream].lengths[rows] for stream in STREAMS}
        return {stream: int(lengths[stream].sum()) for stream in STREAMS} | {
            "questions": len(rows),
            "explained": int((lengths["explain"] > 0).sum()),
            "question_tokens": int(self._features.questions["predict"].lengths[rows].sum()),
        }

    def _draw(self, group: int, epoch: int) -> np.ndarray:
        """The records of a task in an epoch: the next `count` of its endless permuted walk."""
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
        rows = np.concatenate([self._draw(group, epoch) for group in range(len(self._members))])
        rows = rng.permutation(rows)[: self.steps_per_epoch * self.batch_size]
        pool = self._bucket_batches * self.batch_size
        batches = np.concatenate(
            [self._bucket(rows[start : start + pool]) for start in range(0, len(rows), pool)]
        )
        return batches[rng.permutation(len(batches))]

    def _bucket(self, rows: np.ndarray) -> np.ndarray:
        """A pool of records as batches of similar rationale and question length."""
        targets = sum(self._features.targets[stream].lengths[rows] for stream in STREAMS)
        questions = self._features.questions["predict"].lengths[rows]
        num_batches = len(rows) // self.batch_size
        slab = self.batch_size * max(1, round(num_batches**0.5))
        by_target = np.argsort(targets, kind="stable")
        order = [
            rows_of_slab[np.argsort(questions[rows_of_slab], kind="stable")]
            for rows_of_slab in (by_target[start : start + slab] for start in range(0, len(rows), slab))
        ]
        return rows[np.concatenate(order)].reshape(num_batches, self.batch_size)


def collate(
    features: Features, rows: Sequence[int], streams: Sequence[str], *, pad: int, start: int
) -> Batch:
    """The micro-batch of some records. `pad` and `start` are the padding and decoder start tokens."""
    inputs = [features.questions[stream][row] for stream in streams for row in rows]
    input_ids, attention_mask = _pad(inputs, pad)
    question_positions = attention_mask[: len(rows)].flatten().nonzero().squeeze(1)
    decoder_input_ids, positions, labels, cu = {}, {}, {}, {}
    for stream in streams:
        targets = [features.targets[stream][row] for row in rows]
        shifted = [np.concatenate([[start], target[:-1]]) if len(target) else target for target in targets]
        decoder_input_ids[stream], mask = _pad(shifted, pad)
        positions[stream] = mask.flatten().nonzero().squeeze(1)
        labels[stream] = torch.from_numpy(np.concatenate(targets)).long()
        cu[stream] = torch.tensor(np.cumsum([0, *map(len, targets)]), dtype=torch.int32)
    return Batch(
        question_ids=tuple(features.ids[row] for row in rows),
        input_ids=input_ids,
        attention_mask=attention_mask,
        question_positions=question_positions,
        decoder_input_ids=decoder_input_ids,
        positions=positions,
        labels=labels,
        cu=cu,
    )


def _pad(sequences: Sequence[np.ndarray], pad: int) -> tuple[Tensor, Tensor]:
    """[rows, longest] int64 ids, and the mask of real ones. At least one column, for models' sake."""
    lengths = np.array([len(sequence) for sequence in sequences])
    mask = np.arange(max(1, lengths.max(initial=0)))[None, :] < lengths[:, None]
    ids = np.full(mask.shape, pad, dtype=np.int64)
    ids[mask] = np.concatenate(sequences)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
