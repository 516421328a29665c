"""Dry runs of a run's models, whatever the machines: activations, operations, what is gathered."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from ibdistill.config.sections import Config
from ibdistill.objectives import weights
from ibdistill.planning import dryrun, footprint
from ibdistill.planning import kernels as kernels_of
from ibdistill.planning.dryrun import Lengths, Skeleton
from ibdistill.planning.evaluation_memory import Decoding, sampling
from ibdistill.planning.footprint import WIDTH, Zero
from ibdistill.planning.head_loss_memory import aligned_bytes, head_loss_bytes
from plan import costs


class Traces:
    """The student, with and without checkpointing, and the teacher, if there is one, traced once each."""

    def __init__(
        self, config: Config, question: int, label: int, rationale: int, device: str = "cuda"
    ) -> None:
        """`question`, `label`, `rationale`: tokens of every question and of its targets. `device`: whose
        memory is planned."""
        self._config, self._shared, self._device = config, config.optim.sequence_parallel, device
        self._whole = Lengths(1, question, label, rationale)
        # a rank's part, where ranks share sequences
        self._tokens = tuple(-(-tokens // self._shared) for tokens in (question, label, rationale))
        self._streams = weights.streams_of(config.objective)
        self._scored = weights.teacher_streams(config.objective)
        self.wanted = weights.wanted(config.objective)
        self.students = {on: footprint.student_skeleton(self._checkpointing(on)) for on in (False, True)}
        self.teacher = footprint.teacher_skeleton(config) if self.wanted else None
        self.sizes = footprint.student_sizes(config, self.student, self.teacher)
        self._gathers: dict[Zero, footprint.Gathers | None] = {}
        self._traced: dict[bool, list[dryrun.Living]] = {}

    @property
    def student(self) -> Skeleton:
        """The student without checkpointing."""
        return self.students[False]

    def gathers(self, zero: Zero) -> footprint.Gathers | None:
        """What ZeRO stage 3 gathers of the student; None in other stages."""
        if zero not in self._gathers:
            args = self.student, self._lengths(1), self._streams, self.sizes
            self._gathers[zero] = footprint.student_gathers(zero, *args)
        return self._gathers[zero]

    def operations(self, checkpointing: bool, micro: int) -> costs.Operations:
        """Operations of one micro-batch of `micro` questions on one rank."""
        one = self._operations_of_one[checkpointing]
        return costs.Operations(one.student * micro, one.head * micro, one.teacher * micro)

    def kernels(self, checkpointing: bool, micro: int) -> int:
        """Kernels per micro-batch of `micro` questions, of student, head loss and teacher together."""
        head_loss = kernels_of.head_loss_launches(
            self._lengths(micro).targets(self._streams),
            self.student.head[0],
            WIDTH[self._config.student.precision],
            pooled=weights.mi_settings(self._config.objective) is not None,
            distils=self.teacher is not None and self.wanted.targets,
        )
        teacher = self._teacher_passes[0].kernels * self.readings if self.teacher else 0
        return self._student_steps(checkpointing)[0].kernels + head_loss + teacher

    def living(self, checkpointing: bool, micro: int) -> int:
        """Bytes of the student's activations, traced for one and two questions, on a straight line beyond."""
        one, two = self._student_steps(checkpointing)
        precision, objective = self._config.student.precision, self._config.objective
        theirs = self.teacher.head if self.teacher and self.wanted.targets else None
        is_aligned = theirs is not None and objective.alignment == "text"
        targets, more = self._targets(micro)
        inside = more * self.student.head[1] * WIDTH[precision]
        inside += head_loss_bytes(
            *(targets, micro, self.student.head),
            precision,
            mi=weights.mi_settings(objective) is not None,
            teacher=None if is_aligned else theirs,
            device=self._device,
        )
        if is_aligned:  # stream after stream, beside what the head loss and the first stream leave
            rows, (vocabulary, width) = micro * max(self._tokens[1:]), self.student.head
            left = 2 * WIDTH[precision] * width * (vocabulary + rows)
            more = {"device": self._device, "divergence": objective.divergence}
            inside = max(inside, left + aligned_bytes(rows, self.student.head, theirs, precision, **more))
        peak = one.peak + (micro - 1) * (two.peak - one.peak)
        return max(peak, one.at_head + (micro - 1) * (two.at_head - one.at_head) + inside)

    def _targets(self, micro: int) -> tuple[int, int]:
        """Target tokens in the head loss of the rank that has the most of them, and how many states of them
        there are beside those of a rank with its even part."""
        every, ranks = replace(self._whole, questions=micro).targets(self._streams), self._shared
        if ranks == 1:
            return every, 0
        if weights.whole_questions(self._config):  # after an exchange, which leaves the others in place
            mine = -(-micro // ranks) * every // micro
            return mine, mine
        rows = [
            np.repeat([False, True], [self._whole.question, self._whole.targets([stream])])
            for stream in self._streams
        ]
        row = np.concatenate([np.tile(one, micro) for one in rows])
        most = max(part.sum() for part in np.array_split(row, ranks))
        return int(most), int(most) - every // ranks

    def exchanged(self, checkpointing: bool, micro: int) -> tuple[int, int]:
        """Bytes that attention exchanges per micro-batch, where ranks share sequences: in a forward pass of
        the student, and in all passes of student and teacher."""
        if self._shared == 1:
            return 0, 0
        lengths, config = self._lengths(micro), self._config
        once = costs.exchanged(self.student, lengths, self._streams, config.student.precision, self._shared)
        every = (3 if checkpointing else 2) * once
        if self.teacher:
            scored, precision = self._scored or self._streams, config.teacher.precision
            every += costs.exchanged(self.teacher, lengths, scored, precision, self._shared)
        return once, every

    def teacher_living(self, micro: int) -> int:
        """Bytes of the teacher's activations, on the same line."""
        one, two = self._teacher_passes
        return one.peak + (micro - 1) * (two.peak - one.peak)

    def answer_bytes(self, micro: int) -> int:
        """Bytes of the teacher's answer about a micro-batch."""
        tokens = micro * self._tokens[0] if self.wanted.questions else 0
        tokens += self._lengths(micro).targets(self._streams) if self.wanted.targets else 0
        return tokens * self.teacher.head[1] * WIDTH[self._config.teacher.precision]

    @cached_property
    def sampled(self) -> Decoding | None:
        """What a rank needs to sample a batch of the student's own texts; None: it samples none."""
        return sampling(self.student, self._config, self._whole.question)

    @cached_property
    def teacher_gathers(self) -> footprint.Gathers:
        """What a sharded teacher gathers."""
        return footprint.teacher_gathers(self.teacher, self._read(1), self._scored)

    def _checkpointing(self, on: bool) -> Config:
        student = dataclasses.replace(self._config.student, gradient_checkpointing=on)
        return dataclasses.replace(self._config, student=student)

    def _lengths(self, questions: int) -> Lengths:
        return Lengths(questions, *self._tokens)

    @cached_property
    def _operations_of_one(self) -> dict[bool, costs.Operations]:
        args = self._lengths(1), self._config.objective, self.teacher
        return {
            on: costs.operations(self.student, *args, checkpointing=on, shared=self._shared)
            for on in (False, True)
        }

    def _student_steps(self, checkpointing: bool) -> list[dryrun.Living]:
        """The student's steps on one and on two questions."""
        if checkpointing not in self._traced:
            given = {"wanted": self.wanted, "teacher_head": self.teacher.head} if self.teacher else {}
            objective, student = self._config.objective, self.students[checkpointing]
            if weights.compares_questions(objective):
                # fake tensors cannot say which targets are ignored, which such a term asks; leaving it out
                # moves no peak, since it holds a copy of the targets' states, less than the head loss just
                # before it
                objective = dataclasses.replace(objective, beta=0.0)
            steps = [self._student_step(student, n, objective, **given) for n in (1, 2)]
            self._traced[checkpointing] = steps
        return self._traced[checkpointing]

    def _student_step(self, student: Skeleton, questions: int, *args: Any, **given: Any) -> dryrun.Living:
        given |= {"device": self._device, "shared": self._shared}
        return dryrun.student_step(student, self._lengths(questions), *args, **given)

    @cached_property
    def _teacher_passes(self) -> list[dryrun.Living]:
        where = self._scored, self._device, self._shared
        return [dryrun.teacher_forward(self.teacher, self._read(n), *where) for n in (1, 2)]

    @property
    def readings(self) -> int:
        """How often the teacher reads a micro-batch."""
        return len(costs.readings(self._lengths(1), self._config.objective))

    def _read(self, questions: int) -> Lengths:
        """The longest of what the teacher reads."""
        read = costs.readings(self._lengths(questions), self._config.objective)
        return max(read, key=lambda own: own.question)
