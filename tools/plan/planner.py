"""The choices that a run has on given GPUs: what each needs, how long its step would be, which is best."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ibdistill.config import consistency, zero_file
from ibdistill.config.sections import Config
from ibdistill.models import sequence_parallel
from ibdistill.models.families import base_of
from ibdistill.objectives import weights
from ibdistill.planning import footprint
from ibdistill.planning import kernels as kernels_of
from ibdistill.planning.dryrun import Lengths
from ibdistill.planning.evaluation_memory import Decoding, copied_bytes
from ibdistill.planning.footprint import PLACED, WIDTH, Zero
from ibdistill.runtime.hardware import GIB
from plan import checkpoints, costs, step_time
from plan.accelerators import Accelerator
from plan.choice import Choice
from plan.traces import Traces

FILES = ("zero2", "zero0", "zero1", "zero3", "zero2_offload", "zero3_offload")
"""In order of preference where they are about equally fast; offloading is for when nothing else fits."""
ABOUT = 1.1
"""Steps within this factor of the fastest count as equally fast: predictions are no better than that."""


@dataclass
class Planner:
    """A run and the machines that it is planned for. Raises ValueError as `zero_file.split_batch` does."""

    config: Config
    gpu: Accelerator
    nodes: int
    on_node: int
    question: int
    """Tokens of every question; `label` and `rationale` are those of every target."""
    label: int
    rationale: int

    def __post_init__(self) -> None:
        self._count_questions()
        self._check_division()
        self.config = dataclasses.replace(self.config, student=dataclasses.replace(self.config.student))
        consistency.settle_precision(self.config, multiplies_bf16=True)  # as all of these GPUs do
        self.traces = Traces(self.config, self.question, self.label, self.rationale)
        self.student, self.teacher, self.sizes = self.traces.student, self.traces.teacher, self.traces.sizes
        for setting, name, read in (
            ("student.model", self.config.student.model, self.student),
            ("teacher.model", self.config.teacher.model, self.teacher),
        ):
            if read is not None:
                shape = base_of(read.model).config
                sequence_parallel.check_model(setting, name, shape, self.config.optim.sequence_parallel)

    def _count_questions(self) -> None:
        """Let `optim.batch_size` and `micro_batch_size` say what the recipe's tokens are in questions.

        All questions have one length here, so packed and padded rows are the same.
        """
        optim = self.config.optim
        if not optim.tokens_per_batch:
            return
        streams = weights.streams_of(self.config.objective)
        of_one = Lengths(1, self.question, self.label, self.rationale)
        tokens = len(streams) * self.question + of_one.targets(streams)
        _, forwards = zero_file.split_batch(optim, self.readers)
        size = max(1, optim.tokens_per_batch // (tokens * forwards * self.readers))
        counted = {
            "batch_size": size * forwards * self.readers,
            "micro_batch_size": size if forwards > 1 else 0,
        }
        counted |= {"tokens_per_batch": 0, "tokens_per_forward": 0}
        self.config = dataclasses.replace(self.config, optim=dataclasses.replace(optim, **counted))

    def _check_division(self) -> None:
        zero_file.split_batch(dataclasses.replace(self.config.optim, micro_batch_size=0), self.readers)

    def on(self, nodes: int, on_node: int, batch_size: int) -> Planner:
        """The same models on other machines. What was traced is kept, since it does not depend on them."""
        other = copy.copy(self)
        other.nodes, other.on_node = nodes, on_node
        optim = dataclasses.replace(self.config.optim, batch_size=batch_size)
        other.config = dataclasses.replace(self.config, optim=optim)
        other._check_division()
        return other

    @property
    def ranks(self) -> int:
        return self.nodes * self.on_node

    @property
    def readers(self) -> int:
        """Ranks, or groups of ranks that share sequences: how many micro-batches are read at a time."""
        return zero_file.readers(self.config.optim, self.ranks)

    @property
    def per_rank(self) -> int:
        """Questions per rank and step, of the rank with the most; those of a group where ranks share them."""
        return -(-self.config.optim.batch_size // self.readers)

    @property
    def sampled_per_step(self) -> float:
        """Texts of the student's own that a rank samples for a step, on average."""
        texts = -(-self.config.optim.batch_size // self.ranks)  # whole texts, on each rank
        return self.config.on_policy.share * texts / max(1.0, self.config.on_policy.every)

    def _at_once(self, sampled: Decoding) -> Decoding:
        """With the texts that are decoded together: where text is sampled within an epoch, those of a step,
        as if that were before every step."""
        texts = sampled.texts if self.config.on_policy.every >= 1 else self.sampled_per_step
        texts = min(sampled.texts, math.ceil(texts))
        return dataclasses.replace(sampled, texts=texts, cache=sampled.cache * texts // sampled.texts)

    def micro_batch_sizes(self) -> list[int]:
        """The sizes that a run can have, largest first.

        They divide a rank's questions, and 1 is none where the ranks have different numbers of them. A recipe
        that sets the size leaves only that one, and an objective that compares questions leaves only a rank's
        whole share. Raises ValueError as `zero_file.split_batch` and `weights.check_split` do where the
        recipe's own size is none of them.
        """
        optim = self.config.optim
        if optim.micro_batch_size:
            size, micro_batches = zero_file.split_batch(optim, self.readers)
            weights.check_split(self.config.objective, optim, micro_batches)
            return [size]
        if weights.compares_questions(self.config.objective):
            return [self.per_rank]
        least = 2 if optim.batch_size % self.readers else 1
        return [size for size in range(self.per_rank, least - 1, -1) if self.per_rank % size == 0]

    def placements(self) -> tuple[str, ...]:
        """Every placement that a run would take of an online teacher; else only the recipe's."""
        if self.teacher and self.config.teacher.load_in_8bit:
            return ("replica",)  # weights of 8 bits are not sharded
        if self.teacher and self.config.optim.sequence_parallel > 1:
            return ("replica",)  # which scores the parts of the ranks that share a sequence
        return PLACED if self.teacher else (self.config.teacher.placement,)

    def files(self) -> tuple[str, ...]:
        """Every DeepSpeed file that a run would take: weights of 4 bits are not sharded."""
        if self.config.student.load_in_4bit:
            return tuple(file for file in FILES if Zero.read(file).stage < 3)
        return FILES

    def choices(self, micro_batch_size: int) -> list[Choice]:
        """Every placement, ZeRO file and checkpointing at one micro-batch size."""
        return [
            self.choice(placement, file, checkpointing, micro_batch_size)
            for placement in self.placements()
            for file in self.files()
            for checkpointing in (False, True)
        ]

    def options(self) -> list[Choice]:
        """The choices at every micro-batch size."""
        return [choice for size in self.micro_batch_sizes() for choice in self.choices(size)]

    def best(self, options: Sequence[Choice] = ()) -> Choice | None:
        """The simplest of the choices that fit and are about as fast as the fastest; None where nothing fits.

        `options`: the result of `options()` where the caller has it.
        """
        fitting = [choice for choice in options or self.options() if choice.fits]
        if not fitting:
            return None
        fitting = [c for c in fitting if not c.offloads] or fitting
        limit = ABOUT * min(c.step for c in fitting)
        return min((c for c in fitting if c.step <= limit), key=self._complexity)

    def _complexity(self, choice: Choice) -> tuple:
        order = self.placements().index(choice.placement), FILES.index(choice.file)
        return choice.checkpointing, *order, -choice.micro_batch_size

    def smallest(self) -> Choice:
        """The choice that needs least memory."""
        return min(self.choices(self.micro_batch_sizes()[-1]), key=lambda c: c.bytes)

    def choice(self, placement: str, file: str, checkpointing: bool, micro: int) -> Choice:
        """What one combination needs, and how long its step would be. `micro` is the micro-batch size."""
        config, zero = self.config, Zero.read(file)
        precision, teacher = config.student.precision, self.teacher
        gathered = self.traces.gathers(zero)
        states, host = footprint.student_states(
            *(self.sizes, precision, zero, self.ranks),
            gathered=gathered.peak if gathered else 0,
            in_4bit=self.student.frozen_linear if config.student.load_in_4bit else 0,
        )
        activations = {
            "student": self.traces.living(checkpointing, micro),
            "update": footprint.step_buffers(self.sizes, precision, zero, self.ranks),
        }
        in_4bit = config.student.load_in_4bit
        activations["evaluation"] = copied_bytes(self.student, precision, zero.stage, in_4bit=in_4bit)
        micro_batches = -(-self.per_rank // micro)
        traffic = costs.student_traffic(self.sizes, precision, zero, micro_batches, gathered)
        if self.ranks == 1:
            traffic = {}
        shared = config.optim.sequence_parallel
        if shared > 1:
            traffic["all_to_all"] = micro_batches * self.traces.exchanged(checkpointing, micro)[1]
        theirs, teacher_bytes, group = 0, 0, self.ranks
        if teacher is not None:
            asked = dataclasses.replace(config.teacher, placement=placement)
            sharded, group = placement != "replica", self._group(placement)
            moves = sharded and (group > 1 or placement == "cpu_offload")
            more, hosted = footprint.teacher_states(
                *(teacher.sizes(), teacher.head, asked, self.ranks, self.on_node),
                wants_head=self.traces.wanted.targets,
                gathered=self.traces.teacher_gathers.peak if moves else 0,
            )
            states, host = states | more, host + hosted
            activations["student"] += self.traces.answer_bytes(micro)
            activations["teacher"] = self.traces.teacher_living(micro)
            teacher_bytes = WIDTH[asked.precision] * sum(n for n, _ in teacher.sizes())
            if moves:
                theirs = costs.teacher_traffic(
                    *(teacher.head, asked.precision, micro_batches, self.traces.teacher_gathers),
                    targets=self.traces.wanted.targets,
                    readings=self.traces.readings,
                )
        trained = sum(n for n, t in self.sizes if t)
        reductions = {name: traffic[name] for name in traffic.keys() & {"all_reduce", "reduce_scatter"}}
        load = step_time.Load(
            operations=self.traces.operations(checkpointing, micro),
            micro_batches=micro_batches,
            student_bytes=WIDTH[precision] * sum(n for n, _ in self.sizes),
            teacher_bytes=teacher_bytes,
            reduced=costs.sent(reductions, self.ranks),
            gathered=costs.sent({"all_gather": traffic.get("all_gather", 0)}, self.ranks),
            teacher_gathered=theirs if group == 1 else costs.sent({"all_gather": theirs}, group),
            exchanged=costs.sent({"all_to_all": traffic.get("all_to_all", 0)}, shared),
            updated=trained // self.ranks if zero.stage else trained,
            overlaps_reduction=zero.overlap,
            overlaps_gathers=zero.stage == 3,
            launches=self._launches(checkpointing, micro, micro_batches, zero),
        )
        rates = step_time.Rates.of(
            *(self.gpu, self.ranks, self.on_node, placement, precision, config.teacher.precision),
            shared=shared,
        )
        seconds = self._seconds(load, rates, zero, precision)
        if sampled := self.traces.sampled:
            activations["sampling"] = activations["evaluation"] + sampled.cache
        host_room = int(self.gpu.host_memory_gib * GIB / self.on_node)
        run = config.run
        every = min(run.save_every, run.eval_every or run.save_every)  # an evaluation saves too
        saved = checkpoints.checkpoint(
            *(self.sizes, precision, zero, self.ranks, self.gpu),
            **{"every": every, "free": host_room - host, "on_node": self.on_node if run.local_dir else 0},
        )
        seconds["checkpoint"] = saved.stall(sum(seconds.values()))
        return Choice(
            *(placement, file, checkpointing, micro, states, activations, host, self.gpu.room(), host_room),
            *(traffic | ({"teacher": theirs} if theirs else {}), seconds, saved),
        )

    def _seconds(self, load: step_time.Load, rates: step_time.Rates, zero: Zero, precision: str) -> dict:
        seconds = step_time.step_seconds(load, rates)
        if zero.offload_optimizer:  # gradients go to the host, which updates, and weights come back
            there_and_back = (4 + WIDTH[precision]) * load.updated
            seconds["optimizer"] = (28 * load.updated + there_and_back) / (self.gpu.host_gbs * 1e9)
        seconds = step_time.with_launches(seconds, load, rates)
        if sampled := self.traces.sampled:
            args = self.student.sizes(), precision, rates, self.question, self.sampled_per_step
            seconds["sampling"] = step_time.sampling_seconds(self._at_once(sampled), *args)
        return seconds

    def loading(self, placement: str) -> int:
        """Bytes of a node's memory while models are loaded.

        Each rank reads the student in fp32, and one rank for each copy of the teacher reads that, whole.
        """
        student = 4 * self.on_node * sum(n for n, _ in self.student.sizes())
        if self.teacher is None:
            return student
        copies = self.on_node if placement == "replica" else 1
        teacher = WIDTH[self.config.teacher.precision] * sum(n for n, _ in self.teacher.sizes())
        return max(student, copies * teacher)

    def _group(self, placement: str) -> int:
        return self.on_node if placement == "zero3_node" else self.ranks

    def _launches(self, checkpointing: bool, micro: int, micro_batches: int, zero: Zero) -> int:
        """Kernels per step: those of the dry run and of the head loss, and what the update and ZeRO do with
        each tensor."""
        kernels = micro_batches * self.traces.kernels(checkpointing, micro)
        trained = sum(1 for _, is_trained in self.sizes if is_trained)
        # ZeRO copies each gradient into a bucket; without it the update takes whole lists of tensors
        return kernels + kernels_of.UPDATE + (micro_batches * trained if zero.stage else 0)
