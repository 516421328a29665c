"""Bytes that a run puts on each rank, from shapes alone.

Student, with P parameters, T of them trained, N ranks, w = 4 (fp32) or 2 (bf16) bytes, as DeepSpeed 0.19.8
really allocates it (measured by `tests/planning/test_footprint.py`):

    stage  parameters   gradients  optimizer              buckets for reductions
    0      w P          w T        8 T, in bf16 12 T      none
    1, 2   w P          w T / N    12 T / N               reduce_bucket_size w, overlap_comm: twice
    3      w P / N + *  w T / N    12 T / N               reduce_bucket_size w

The optimizer column holds AdamW's two moments and a master copy in fp32, which ZeRO keeps even where the
parameters are fp32.

* With several ranks, small parameters stay whole on each rank (w bytes per element, beside the rank's share),
and whole copies of the others exist while modules need them (`gathers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ibdistill.config import zero_file
from ibdistill.config.sections import Config, TeacherConfig
from ibdistill.data import tokenizers
from ibdistill.data.tokenizers import load_tokenizer
from ibdistill.models import presets
from ibdistill.objectives import weights
from ibdistill.planning import dryrun
from ibdistill.planning.dryrun import Lengths, Skeleton, Use
from ibdistill.runtime import deepspeed_fixes
from ibdistill.teacher import sharding
from ibdistill.teacher.teacher import SHARDED

PLACED = ("replica", *SHARDED)
"""Placements in which there is a teacher in the job."""
WIDTH = {"fp32": 4, "bf16": 2}
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes per weight: 4 bits, an 8-bit scale for 64 weights and an fp32 one for 256 of these scales."""
Sizes = Sequence[tuple[int, bool]]
"""(elements, trained) of each parameter."""


@dataclass(frozen=True)
class Zero:
    """The settings of a DeepSpeed file that bear on memory and communication. Sizes are in elements."""

    stage: int
    overlap: bool = False
    reduce_bucket: int = 500_000_000
    prefetch: int = 50_000_000
    persistence: int = 100_000
    reuse: int = 1_000_000_000
    """Stage 3 keeps a gathered parameter that is needed again within so many elements."""
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @classmethod
    def of(cls, ds_config: dict[str, Any]) -> Zero:
        """The settings in the content of a DeepSpeed file; what it leaves out has DeepSpeed's defaults."""
        zero = ds_config.get("zero_optimization", {})
        stage = zero.get("stage", 0)

        def offloads(what: str) -> bool:
            return zero.get(what, {}).get("device", "none") != "none"

        return cls(
            stage,
            overlap=zero.get("overlap_comm", stage == 3),
            reduce_bucket=int(zero.get("reduce_bucket_size", cls.reduce_bucket)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", cls.prefetch)),
            persistence=int(zero.get("stage3_param_persistence_threshold", cls.persistence)),
            reuse=int(zero.get("stage3_max_reuse_distance", cls.reuse)),
            offload_optimizer=offloads("offload_optimizer"),
            offload_parameters=offloads("offload_param"),
        )

    @classmethod
    def read(cls, name: str) -> Zero:
        """The settings in the file that `deepspeed.config` names; ValueError as
        `zero_file.read_ds_config`."""
        return cls.of(zero_file.read_ds_config(name))

    def persistent(self, sizes: Sizes) -> int:
        """Elements of the parameters that stay whole on every rank in stage 3."""
        return sum(n for n, _ in sizes if n <= self.persistence)


@dataclass(frozen=True)
class Gathers:
    """How much stage 3 gathers over one micro-batch, in elements."""

    moved: int
    """Elements that are gathered; those that are gathered twice count twice."""
    peak: int
    """The most elements that are whole at once, without the parameters that always are."""


def gathers(zero: Zero, uses: Sequence[Use], *, backward: bool) -> Gathers:
    """Follow stage 3 through a forward pass and, with `backward`, through the same modules in reverse.

    A module's parameters are gathered unless they are there already, and are let go unless they are needed
    again within `zero.reuse` elements. In the backward part embeddings stay to the end: ZeRO lets a module
    go when the gradient of its input arrives, and the input of an embedding has none.
    """
    order = [(use, False) for use in uses]
    order += [(use, True) for use in reversed(uses)] if backward else []
    keys = [[(id(p), p.numel()) for p in use.parameters if p.numel() > zero.persistence] for use, _ in order]
    following: dict[int, list[int]] = {}
    for index, step in enumerate(keys):
        for key, _ in step:
            following.setdefault(key, []).append(index)
    travelled = [0]
    for use, _ in order:
        travelled.append(travelled[-1] + sum(p.numel() for p in use.parameters))
    there: dict[int, int] = {}
    moved = peak = 0
    for index, (step, (use, back)) in enumerate(zip(keys, order, strict=True)):
        missing = {key: size for key, size in step if key not in there}
        there |= missing
        moved += sum(missing.values())
        peak = max(peak, sum(there.values()))
        for key, _ in step if not (back and use.is_embedding) else ():
            later = next((i for i in following[key] if i > index), None)
            if later is None or travelled[later] - travelled[index + 1] >= zero.reuse:
                there.pop(key, None)
    total = sum({key: size for step in keys for key, size in step}.values())
    return Gathers(moved, min(total, peak + zero.prefetch))


def student_gathers(
    zero: Zero, student: Skeleton, lengths: Lengths, streams: Sequence[str], sizes: Sizes
) -> Gathers | None:
    """The gathers of a student under stage 3, else None. `sizes` may hold vid's map behind the student's own
    parameters."""
    if zero.stage < 3:
        return None
    own = gathers(zero, dryrun.uses(student, lengths, streams, head=True), backward=True)
    beyond = sum(n for n, _ in sizes[len(student.sizes()) :] if n > zero.persistence)
    return Gathers(own.moved + beyond, own.peak + beyond)


def teacher_gathers(teacher: Skeleton, lengths: Lengths, streams: Sequence[str]) -> Gathers:
    """The gathers of a sharded teacher's forward pass, without its head, which is kept apart."""
    zero = Zero(3, persistence=sharding.persistence_threshold([n for n, _ in teacher.sizes()]))
    return gathers(zero, dryrun.uses(teacher, lengths, streams, head=False), backward=False)


def student_states(
    sizes: Sizes, precision: str, zero: Zero, ranks: int, *, gathered: int = 0, in_4bit: int = 0
) -> tuple[dict[str, int], int]:
    """Bytes of one rank on its device by part, and in the host's memory (offload).

    `gathered`: elements that stage 3 has whole at once (`Gathers.peak`); `in_4bit`: those of frozen weights
    that `student.load_in_4bit` keeps in NF4.
    """
    width, total, trained = WIDTH[precision], sum(n for n, _ in sizes), sum(n for n, t in sizes if t)
    share = -(-trained // ranks)
    master = 4 if precision == "bf16" or zero.stage else 0
    parameters = width * (total - in_4bit) + round(NF4 * in_4bit)
    parts = {"parameters": parameters, "gradients": width * trained, "optimizer": (8 + master) * trained}
    parts["buckets"] = 0
    host = 0
    if zero.stage:
        parts["gradients"], parts["optimizer"] = width * share, (8 + master) * share
        parts["buckets"] = zero.reduce_bucket * width * (2 if zero.overlap and zero.stage < 3 else 1)
    if zero.stage == 3:
        persistent = zero.persistent(sizes) if ranks > 1 else 0
        parts["parameters"] = width * (-(-total // ranks) + persistent)
        parts["gathered"] = width * gathered if ranks > 1 or zero.offload_parameters else 0
        if zero.offload_parameters:
            host += width * -(-total // ranks)
            parts["parameters"] = width * persistent
    if zero.offload_optimizer:
        host += (12 + 4) * share  # the master copy, the moments, and the gradients in fp32
        parts["optimizer"] = parts["gradients"] = 0
    return parts, host


def step_buffers(sizes: Sizes, precision: str, zero: Zero, ranks: int) -> int:
    """Bytes of the fp32 copies of gradients in the optimizer's step. By then the activations are gone."""
    trained = sum(n for n, t in sizes if t)
    if zero.offload_optimizer or (zero.stage == 0 and precision == "fp32"):
        return 0
    if zero.stage == 0:
        return 4 * max(min(deepspeed_fixes.step_elements(trained), trained), *(n for n, t in sizes if t))
    return 4 * min(-(-trained // ranks), 1_000_000_000 if zero.stage == 3 else trained)


def teacher_states(
    sizes: Sizes,
    head: tuple[int, int],
    config: TeacherConfig,
    ranks: int,
    on_node: int,
    *,
    wants_head: bool,
    gathered: int = 0,
) -> tuple[dict[str, int], int]:
    """Bytes of one rank on its device by part, and in the host's memory, of an online teacher.

    `sizes` includes its head, tied or not. `gathered`: elements that a sharded teacher has whole at once.
    """
    width = 1 if config.load_in_8bit else WIDTH[config.precision]
    total = sum(n for n, _ in sizes)
    if config.placement == "replica":
        return {"teacher": width * total}, 0
    group = on_node if config.placement == "zero3_node" else ranks
    persistent = Zero(3, persistence=sharding.persistence_threshold([n for n, _ in sizes])).persistent(sizes)
    share = width * -(-total // group)
    parts = {"teacher": share + width * persistent, "teacher gathered": width * gathered}
    if wants_head:  # a plain tensor beside the engine, which is whole while it is used
        parts["teacher"] += width * -(-head[0] // group) * head[1]
        parts["teacher gathered"] += width * head[0] * head[1]
    if config.placement == "cpu_offload":
        parts["teacher"] -= share
        return parts, share
    return parts, 0


def student_skeleton(config: Config) -> Skeleton:
    """The run's student on fake tensors. Raises ValueError as `Skeleton` does."""
    student = config.student
    return Skeleton(student.model, "student.model", _tokenizer(config), student.precision, student)


def teacher_skeleton(config: Config) -> Skeleton | None:
    """The run's teacher on fake tensors, or None if no teacher is in the job. Raises ValueError as `Skeleton`
    does."""
    teacher = config.teacher
    if teacher.placement not in PLACED:
        return None
    return Skeleton(teacher.model, "teacher.model", _tokenizer(config), teacher.precision)


class _Untrained:
    """Stands for a tokenizer that the run will train, where only its length matters."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


def _tokenizer(config: Config) -> PreTrainedTokenizerBase | _Untrained | None:
    """The tokenizer whose length is a preset's vocabulary; None if neither model is a preset.

    One that is trained has at most `student.vocab_size` pieces, which is its length here.
    """
    student = config.student
    if not {student.model, config.teacher.model} & presets.PRESETS.keys():
        return None
    if student.tokenizer not in ("", "train"):
        return load_tokenizer(student.tokenizer, "student.tokenizer")
    if student.tokenizer == "" and student.model.startswith("demo-"):
        return tokenizers.demo_tokenizer()
    return _Untrained(student.vocab_size)


def student_sizes(config: Config, student: Skeleton, teacher: Skeleton | None) -> Sizes:
    """The sizes of the student's parameters and of those of vid's map or vib's noise."""
    if weights.uses_vib(config.objective):
        return [*student.sizes(), (student.head[1], True)]
    if teacher is None or not weights.uses_vid(config.objective):
        return student.sizes()
    width = teacher.head[1]
    return [*student.sizes(), (width * student.head[1], True), (width, True), (width, True)]
