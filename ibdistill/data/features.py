"""The token ids of a run's records: tables that are read, cut and joined."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ibdistill.data.lazy import chained
from ibdistill.data.ragged import Ragged
from ibdistill.data.records import Record


@dataclass(frozen=True)
class Features:
    """The token ids of some records. Targets end with the end-of-sequence token."""

    ids: Sequence[str]
    """The records' names, for messages."""
    groups: np.ndarray
    """[records] int: the task of the mixture that each belongs to, counted in the order of `data.task`."""
    questions: dict[str, Ragged]
    """Stream -> prefix and question. The first stream's questions are those that question states are of."""
    targets: dict[str, Ragged]
    """Segment -> label or rationale; the explain target of a record without a rationale is empty."""
    whole_prompts: bool = False
    """The questions are whole prompts of decoder-only models, as chat templates render them."""
    samples: np.ndarray | None = None
    """[records] int: which question each record is a sample of; those of one question share a number, and
    one of them is drawn in each epoch. None: each record is a question of its own."""
    own: np.ndarray | None = None
    """[records] bool: whether the target that holds the rationale is the student's own text; None: none."""
    teacher_questions: dict[str, Ragged] = field(default_factory=dict)
    """`questions` in the tokens of a teacher of another vocabulary; empty without one."""
    with_reference: dict[str, Ragged] = field(default_factory=dict)
    """In the teacher's tokens, the question, and the record's rationale and label behind it; empty where no
    teacher reads these (`teacher.references`)."""
    reference_alone: dict[str, Ragged] = field(default_factory=dict)
    """The same without the question."""
    cut: dict[str, int] = field(default_factory=dict)
    """How many of the `predict questions`, `explain questions`, `labels`, `rationales` and so on were too
    long."""

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def joined(cls, parts: Sequence[Features], cut: dict[str, int], *, sampled: bool) -> Features:
        """The records of these blocks (`tokenizing.tokenized_blocks`); `sampled`: some questions have several
        samples."""
        first = parts[0]
        return replace(
            first,
            ids=[name for part in parts for name in part.ids],
            groups=np.concatenate([part.groups for part in parts]),
            samples=np.concatenate([part.samples for part in parts]) if sampled else None,
            questions={s: Ragged.joined([part.questions[s] for part in parts]) for s in first.questions},
            targets={s: Ragged.joined([part.targets[s] for part in parts]) for s in first.targets},
            cut=cut,
        )

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams, in order."""
        return tuple(self.questions)

    @property
    def first_questions(self) -> Ragged:
        """The questions of the first stream."""
        return self.questions[self.streams[0]]

    @property
    def text(self) -> str:
        """The segment that holds the rationale, or the student's own text in its place."""
        return "explain" if "explain" in self.targets else "rationale"

    @property
    def labels(self) -> Ragged:
        """The targets that hold the label."""
        return self.targets["predict" if "predict" in self.targets else "answer"]

    @property
    def rationales(self) -> Ragged:
        """The targets that hold the rationale."""
        return self.targets[self.text]

    def take(self, indices: Sequence[int]) -> Features:
        """The records with these indices alone."""
        return replace(
            self,
            ids=[self.ids[i] for i in indices],
            groups=self.groups[list(indices)],
            samples=None if self.samples is None else self.samples[list(indices)],
            own=None if self.own is None else self.own[list(indices)],
            questions=_taken(self.questions, indices),
            targets=_taken(self.targets, indices),
            teacher_questions=_taken(self.teacher_questions, indices),
            with_reference=_taken(self.with_reference, indices),
            reference_alone=_taken(self.reference_alone, indices),
        )

    def only(self, indices: Sequence[int], kept: np.ndarray) -> Features:
        """`take`, of which those records that are not `kept` [indices] have no tokens."""
        taken = self.take(indices)

        def emptied(tables: dict[str, Ragged]) -> dict[str, Ragged]:
            return {
                name: Ragged(ids if has else [] for ids, has in zip(own, kept, strict=True))
                for name, own in tables.items()
            }

        return replace(taken, questions=emptied(taken.questions), targets=emptied(taken.targets))

    def __add__(self, other: Features) -> Features:
        """These records and then the other ones, of the same tasks."""
        return Features(
            ids=chained([self.ids, other.ids]),
            groups=np.concatenate([self.groups, other.groups]),
            questions=_joined(self.questions, other.questions),
            targets=_joined(self.targets, other.targets),
            teacher_questions=_joined(self.teacher_questions, other.teacher_questions),
            with_reference=_joined(self.with_reference, other.with_reference),
            reference_alone=_joined(self.reference_alone, other.reference_alone),
            whole_prompts=self.whole_prompts,
            samples=self._samples_with(other),
            own=self._own_with(other),
            cut={what: self.cut.get(what, 0) + other.cut.get(what, 0) for what in self.cut | other.cut},
        )

    def with_own_text(self, indices: Sequence[int], texts: Iterable[Sequence[int]]) -> Features:
        """`take`, with token ids of the student's own in the place of the rationale, and of the answer behind
        it in a reason stream."""
        taken = self.take(indices)
        targets = taken.targets | {self.text: Ragged(texts)}
        if "answer" in targets:
            targets["answer"] = Ragged([[]] * len(indices))
        return replace(taken, targets=targets, own=np.ones(len(indices), dtype=bool))

    def own_alone(self, indices: Sequence[int], *, questions: bool) -> tuple[Features, list[int]]:
        """The records with these indices without any target but the student's own text, and their indices.

        `questions`: whether all their questions are wanted; else those with own text, or the first one where
        none has, in the stream of the text alone.
        """
        has = np.zeros(len(indices), dtype=bool) if self.own is None else self.own[list(indices)]
        chosen = list(indices)
        if not questions:
            chosen = [i for i, own in zip(indices, has, strict=True) if own] or chosen[:1]
        taken = self.take(chosen)
        targets = {segment: Ragged([[]] * len(chosen)) for segment in self.targets}
        if has.any():
            rows = zip(taken.targets[self.text], taken.own, strict=True)
            targets[self.text] = Ragged(ids if own else [] for ids, own in rows)
        kept = taken.questions if questions else {self.streams[-1]: taken.questions[self.streams[-1]]}
        return replace(taken, targets=targets, questions=kept), chosen

    def _own_with(self, other: Features) -> np.ndarray | None:
        if self.own is None and other.own is None:
            return None
        parts = (np.zeros(len(part), dtype=bool) if part.own is None else part.own for part in (self, other))
        return np.concatenate(list(parts))

    def _samples_with(self, other: Features) -> np.ndarray | None:
        if self.samples is None and other.samples is None:
            return None
        first, second = (
            np.arange(len(part)) if part.samples is None else part.samples for part in (self, other)
        )
        return np.concatenate([first, second + first.max(initial=-1) + 1])


def _taken(tables: dict[str, Ragged], indices: Sequence[int]) -> dict[str, Ragged]:
    return {name: Ragged(own[i] for i in indices) for name, own in tables.items()}


def _joined(tables: dict[str, Ragged], others: dict[str, Ragged]) -> dict[str, Ragged]:
    return {name: own + others[name] for name, own in tables.items()}


class Numbers:
    """Numbers of the tasks and questions of records in blocks, in the order in which they first come."""

    def __init__(self) -> None:
        self._tasks: dict[str, int] = {}
        self._questions: dict[str, int] = {}

    def groups(self, records: Sequence[Record]) -> np.ndarray:
        """`Features.groups`."""
        return _numbered((record.task for record in records), self._tasks)

    def samples(self, records: Sequence[Record]) -> np.ndarray:
        """`Features.samples`, for records that may all be questions of their own."""
        return _numbered((record.sample_of or record.id for record in records), self._questions)


def _numbered(names: Iterable[str], numbers: dict[str, int]) -> np.ndarray:
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)
