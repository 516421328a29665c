"""What an objective asks of a teacher, and what it gets."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor

from ibdistill.ops.head_loss.aligned import AlignedStream, Side
from ibdistill.ops.head_loss.arguments import TeacherStream

logger = logging.getLogger("ibdistill")


@dataclass(frozen=True)
class TeacherAnswer:
    """What the teacher says about one micro-batch, whether it was asked just now or long ago."""

    questions: Tensor | None = None
    """[N_question, D_teacher] states of the first stream's question tokens; None: not asked for."""
    targets: dict[str, TeacherStream | AlignedStream] = field(default_factory=dict)
    """Segment -> hidden states [N, D_teacher] or top k at the target positions; empty: not asked for."""
    weight: Tensor | None = None
    """[V, D_teacher] the teacher's head on the student's vocabulary, for hidden states; of a teacher of
    another vocabulary its own head."""
    bias: Tensor | None = None
    """[V]"""
    softcap: float | None = None
    """The cap of the head's logits (`ops.head_loss.softcap`)."""
    vocabularies: tuple[tuple[Side, Side], ...] = ()
    """Of a teacher of another vocabulary: what it shares with the student (`AlignedTeacher`)."""

    def tensors(self) -> list[Tensor]:
        """All tensors of it."""
        streams = [t for stream in self.targets.values() for t in stream]
        return [t for t in (self.questions, self.weight, self.bias, *streams) if t is not None]


@dataclass(frozen=True)
class Wanted:
    """What an objective asks of the teacher."""

    questions: bool
    """States of the question's tokens."""
    targets: bool
    """States at the target positions, and the head."""
    temperature: float = 1.0
    """Temperature of the distributions, for a teacher's top k."""
    pmi: bool = False
    """The states are those of the target `pmi` (`teacher.references`)."""
    own: bool = False
    """Of the student's own text alone: other targets have no rows."""
    text: bool = False
    """Text that it writes."""
