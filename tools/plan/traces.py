"""Dry runs of a run's models, whatever the machines: activations, operations, what is gathered."""

from __future__ import annotations

import dataclasses
from functools import cached_property

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

    def __init__(self, config: Config, question: int, label: int, rationale: int) -> None:
        """`question`, `label`, `rationale`: tokens of every question and of its targets."""
        self._config, self._shared = config, config.optim.sequence_parallel
        # a rank's part, where ranks share sequences
        self._tokens = tuple(-(-tokens // self._shared) for tokens in (question, label, rationale))
        self._whole_question = question
        self._streams = weights.streams_of(config.objective)
        self._scored = weights.teacher_streams(config.objective)
        self.wanted = weights.wanted(config.objective)
        self.students = {on: footprint.student_skeleton(self._checkpointing(on)) for on in (False, True)}
        self.teacher = footprint.teacher_skeleton(config) if self.wanted else None
        self.sizes = footprint.student_sizes(config, self.student, self.teacher)
        self._gathers: dict[Zero, footprint.Gathers | None] = {}

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
        return self._student_steps[checkpointing][0].kernels + head_loss + teacher

    def living(self, checkpointing: bool, micro: int) -> int:
        """Bytes of the student's activations, traced for one and two questions, on a straight line beyond."""
        one, two = self._student_steps[checkpointing]
        precision, objective = self._config.student.precision, self._config.objective
        theirs = self.teacher.head if self.teacher and self.wanted.targets else None
        is_aligned = theirs is not None and objective.alignment == "text"
        inside = head_loss_bytes(
            *(self._lengths(micro).targets(self._streams), micro, self.student.head),
            precision,
            mi=weights.mi_settings(objective) is not None,
            teacher=None if is_aligned else theirs,
            device="cuda",
        )
        if is_aligned:  # stream after stream, beside what the head loss and the first stream leave
            rows, (vocabulary, width) = micro * max(self._tokens[1:]), self.student.head
            left = 2 * WIDTH[precision] * width * (vocabulary + rows)
            more = {"device": "cuda", "divergence": objective.divergence}
            inside = max(inside, left + aligned_bytes(rows, self.student.head, theirs, precision, **more))
        peak = one.peak + (micro - 1) * (two.peak - one.peak)
        peak = max(peak, one.at_head + (micro - 1) * (two.at_head - one.at_head) + inside)
        if self._shared == 1:
            return peak
        # a layer's tensors on their way: what is sent, and what is received
        return peak + 2 * self.exchanged(False, micro)[0] // self.student.model.config.num_hidden_layers

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
        return sampling(self.student, self._config, self._whole_question)

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

    @cached_property
    def _student_steps(self) -> dict[bool, list[dryrun.Living]]:
        given = {"wanted": self.wanted, "teacher_head": self.teacher.head} if self.teacher else {}
        objective = self._config.objective
        if weights.compares_questions(objective):
            # fake tensors cannot say which targets are ignored, which such a term asks; leaving it out moves
            # no peak, since it holds a copy of the targets' states, less than the head loss just before it
            objective = dataclasses.replace(objective, beta=0.0)
        return {
            on: [dryrun.student_step(student, self._lengths(n), objective, **given) for n in (1, 2)]
            for on, student in self.students.items()
        }

    @cached_property
    def _teacher_passes(self) -> list[dryrun.Living]:
        return [dryrun.teacher_forward(self.teacher, self._read(n), self._scored, "cuda") for n in (1, 2)]

    @property
    def readings(self) -> int:
        """How often the teacher reads a micro-batch."""
        return len(costs.readings(self._lengths(1), self._config.objective))

    def _read(self, questions: int) -> Lengths:
        """The longest of what the teacher reads."""
        read = costs.readings(self._lengths(questions), self._config.objective)
        return max(read, key=lambda own: own.question)
