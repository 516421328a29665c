"""The token ids of a run's records: each text is encoded once, at the start, and stays in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ibdistill.config.sections import DataConfig
from ibdistill.data.records import STREAMS, Record

logger = logging.getLogger("ibdistill")


class Ragged:
    """Token sequences as one flat array (int32) and offsets: four bytes per token, however many records."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        arrays = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
        self.offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(array) for array in arrays], out=self.offsets[1:])
        self.flat = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids of one sequence, [tokens] int32; a view."""
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __add__(self, other: Ragged) -> Ragged:
        """These sequences and then the other ones."""
        joined = Ragged([])
        joined.offsets = np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]])
        joined.flat = np.concatenate([self.flat, other.flat])
        return joined

    @property
    def lengths(self) -> np.ndarray:
        """[sequences] int64: the number of tokens of each."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Features:
    """The token ids of some records. Targets end with the end-of-sequence token."""

    ids: list[str]
    """The records' names, for messages."""
    groups: np.ndarray
    """[records] int: the task of the mixture that each belongs to, counted in the order of `data.task`."""
    questions: dict[str, Ragged]
    """Stream -> prefix and question."""
    targets: dict[str, Ragged]
    """Stream -> label or rationale; the explain target of a record without a rationale is empty."""

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: Features) -> Features:
        """These records and then the other ones, of the same tasks."""
        return Features(
            ids=self.ids + other.ids,
            groups=np.concatenate([self.groups, other.groups]),
            questions={stream: self.questions[stream] + other.questions[stream] for stream in STREAMS},
            targets={stream: self.targets[stream] + other.targets[stream] for stream in STREAMS},
        )


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
