"""The arguments of the head loss and their checks, shared by `head_loss` and its reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ibdistill.ops.checks import check_choice
from ibdistill.ops.head_loss.divergences import DIVERGENCES
from ibdistill.ops.head_loss.estimators import DIRECTIONS, ESTIMATORS, POOLS
from ibdistill.ops.head_loss.softcap import check_softcap

STREAMS = ("predict", "explain")

PAIRS = ("student", "teacher")

LARGEST_K = {torch.bfloat16: 1 << 8, torch.float16: 1 << 11, torch.float32: 1 << 24}
"""Dtype of the logits -> the largest k whose places 1 to k that dtype holds exactly, as Triton needs it."""

BLOCK_ROWS = 16
"""Number of rows that distillation works on at once, so that its temporaries are small beside the chunk. It
is also the number of rows of a program of the gradient kernel where there are no sequences to follow."""

IGNORED = -100
"""Label of a position that is left out."""

SMALLEST_PROBABILITY = 1e-8
"""Floor of a bucket's probability in a teacher's top k, so that reverse KL is finite for an empty tail."""


class Stream(NamedTuple):
    """One stream's packed target positions."""

    hidden: Tensor
    """[N, D] final hidden states, already scaled as the head expects (tied T5: d_model ** -0.5)."""
    labels: Tensor
    """[N] int64 target tokens; -100: the position is ignored (no cross entropy, not pooled)."""
    cu: Tensor
    """[B + 1] int32 offsets of the questions. Keep them on the CPU: from a GPU they must be copied back."""


@dataclass(frozen=True)
class Weights:
    """What each sum is multiplied with in the total.

    Under torch.compile a float is a constant, and another value compiles anew. A 0-d CPU tensor avoids that.
    """

    ce_predict: float | Tensor
    """Factor of the predict stream's cross entropy (a sum over tokens)."""
    ce_explain: float | Tensor = 0.0
    """Factor of the explain stream's cross entropy (a sum over tokens)."""
    mi: float | Tensor = 0.0
    """Factor of the mutual-information term (a sum over questions). InfoNCE: the same on all ranks."""
    kd_predict: float | Tensor = 0.0
    """Factor of the predict stream's divergence from the teacher (a sum over tokens)."""
    kd_explain: float | Tensor = 0.0
    """Factor of the explain stream's divergence from the teacher (a sum over tokens)."""


@dataclass(frozen=True)
class MISettings:
    """The mutual-information term: see `ibdistill.ops.head_loss.estimators`."""

    estimator: str = "paper"
    """A name in `estimators.ESTIMATORS`."""
    pool: str = "max"
    """How distributions are pooled over positions: max (the paper) or mean."""
    gradient: str = "explain"
    """The stream that gets the gradient, the other being the detached target; both: the mean of the two."""
    temperature: float = 0.1
    """The temperature of InfoNCE."""
    pair: str = "student"
    """Whose explain stream the student's predict stream is paired with: student (the paper), or teacher.

    The teacher's pooled distribution is always the detached target, so the gradient reaches the predict
    stream whatever `gradient` is. This works for estimators on distributions only, and needs
    `TeacherDistributions.explain`.
    """

    def __post_init__(self):
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("pool", self.pool, POOLS)
        check_choice("gradient", self.gradient, DIRECTIONS)
        check_choice("pair", self.pair, PAIRS)
        if self.pair == "teacher" and ESTIMATORS[self.estimator].space != "distribution":
            raise ValueError(
                f"pair = 'teacher' can't go with estimator = {self.estimator!r}, which compares hidden states"
                " of one model; use estimator = 'normalized' or 'paper', or pair = 'student'"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature} must be positive")

    @property
    def directions(self) -> tuple[tuple[str, str], ...]:
        """(target, estimate) pairs of streams; the term is the mean over them."""
        return DIRECTIONS["predict" if self.pair == "teacher" else self.gradient]


class TeacherStream(NamedTuple):
    """What the teacher says about one stream's positions: hidden states for its head, or its top k."""

    hidden: Tensor | None = None
    """[N, D_teacher] final hidden states, scaled as the teacher's head expects."""
    ids: Tensor | None = None
    """[N, k] int64: k different tokens of each position."""
    probabilities: Tensor | None = None
    """[N, k]: their probabilities at `TeacherDistributions.temperature`. The rest of the probability is the
    tail, one bucket."""


@dataclass(frozen=True, eq=False)
class TeacherDistributions:
    """The distributions to distil from, and how. The teacher gets no gradient.

    The loss of a position is T^2 D(softmax(teacher logits / T), softmax(student logits / T)). With a
    top k, D is between distributions over k + 1 buckets, the last of them all other tokens.
    """

    predict: TeacherStream | None = None
    explain: TeacherStream | None = None
    """None: nothing to distil in this stream."""
    weight: Tensor | None = None
    """[V, D_teacher] the teacher's head, for hidden states. The vocabulary must be the student's."""
    bias: Tensor | None = None
    """[V]"""
    divergence: str = "forward"
    """A name in `divergences.DIVERGENCES`: forward KL(teacher || student), reverse, jsd, ..."""
    beta: float = 0.5
    """The divergence's parameter, between 0 and 1 (jsd: the teacher's share in the mixture)."""
    temperature: float = 1.0
    """The temperature T of both distributions."""
    softcap: float | None = None
    """The cap of the teacher's logits, before the temperature (see `softcap`); None: they have none."""

    def __post_init__(self):
        check_choice("divergence", self.divergence, DIVERGENCES)
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta = {self.beta} must lie between 0 and 1 (use divergence = forward or reverse)"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature} must be positive")
        check_softcap("teacher.softcap", self.softcap)

    @property
    def is_top_k(self) -> bool:
        """Whether the teacher is given by its top k instead of its hidden states."""
        return any(s is not None and s.ids is not None for s in (self.predict, self.explain))


class Call(NamedTuple):
    """One checked call of the head loss."""

    predict: Stream
    explain: Stream | None
    weights: Weights
    mi: MISettings | None
    teacher: TeacherDistributions | None
    chunk_bytes: int
    softcap: float | None = None


def check_arguments(
    predict: Stream,
    explain: Stream | None,
    weight: Tensor,
    bias: Tensor | None,
    mi: MISettings | None,
    teacher: TeacherDistributions | None,
) -> None:
    """Raise ValueError if shapes, dtypes, devices or offsets don't fit together. No device sync."""
    if weight.ndim != 2:
        raise ValueError(f"weight must be [V, D], not {list(weight.shape)}")
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(
            f"weight has dtype {weight.dtype}; float64, float32, float16 and bfloat16 are supported"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}], not {list(bias.shape)}")
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias has dtype {bias.dtype}, weight {weight.dtype}: they must be the same")
    for name, stream in (("predict", predict), ("explain", explain)):
        if stream is not None:
            _check_stream(name, stream, weight)
    if explain is not None and explain.cu.shape != predict.cu.shape:
        raise ValueError(
            f"predict has {predict.cu.shape[0] - 1} questions, explain {explain.cu.shape[0] - 1}: give"
            " explain an empty sequence where a question has no rationale"
        )
    if mi is not None and explain is None:
        raise ValueError(
            "the mutual-information term (mi=...) needs an explain stream; pass mi=None without one"
        )
    if mi is not None and mi.pair == "teacher":
        _check_pair(teacher)
    if teacher is not None:
        targets = [s for s in (teacher.predict, teacher.explain) if s is not None]
        shapes = {tuple(None if x is None else x.shape[1:] for x in s) for s in targets}
        if len(shapes) != 1:
            raise ValueError("teacher: give one or both streams, both hidden states or both the same top k")
        for name, stream in (("predict", predict), ("explain", explain)):
            _check_teacher(name, getattr(teacher, name), teacher, stream, weight)


def _check_pair(teacher: TeacherDistributions | None) -> None:
    """Raise ValueError unless the teacher's explain distributions at temperature 1 are given."""
    if teacher is None or teacher.explain is None:
        raise ValueError(
            "mi.pair = 'teacher' needs the teacher's explain stream, and"
            f" {'there is no teacher' if teacher is None else 'teacher.explain is None'}; give it, or use"
            " pair = 'student'"
        )
    if teacher.explain.ids is not None and teacher.temperature != 1:
        raise ValueError(
            f"mi.pair = 'teacher' pools the teacher's probabilities at temperature 1, and its top k is at"
            f" {teacher.temperature}; use temperature = 1, the teacher's hidden states, or pair = 'student'"
        )


def _check_teacher(
    name: str,
    target: TeacherStream | None,
    teacher: TeacherDistributions,
    stream: Stream | None,
    weight: Tensor,
) -> None:
    if target is None:
        return
    if stream is None:
        raise ValueError(f"teacher.{name} is given, but there is no {name} stream")
    n, vocabulary = stream.hidden.shape[0], weight.shape[0]
    if target.hidden is not None and target.ids is None and target.probabilities is None:
        head, hidden = teacher.weight, target.hidden
        if head is None or head.ndim != 2 or head.shape[0] != vocabulary:
            raise ValueError(
                f"teacher.weight must be [V, D_teacher] with the student's V = {vocabulary}, not"
                f" {None if head is None else list(head.shape)}; cut or pad the teacher's head to it"
            )
        if hidden.shape != (n, head.shape[1]) or hidden.dtype != head.dtype:
            raise ValueError(
                f"teacher.{name}.hidden must be [N, D_teacher] = [{n}, {head.shape[1]}] {head.dtype}, not"
                f" {list(hidden.shape)} {hidden.dtype}"
            )
        if teacher.bias is not None and teacher.bias.shape != (vocabulary,):
            raise ValueError(f"teacher.bias must be [V] = [{vocabulary}], not {list(teacher.bias.shape)}")
    elif target.hidden is None and target.ids is not None and target.probabilities is not None:
        ids, probabilities = target.ids, target.probabilities
        if ids.ndim != 2 or ids.shape[0] != n or ids.dtype != torch.int64 or probabilities.shape != ids.shape:
            raise ValueError(
                f"teacher.{name}: ids must be [N, k] int64 and probabilities [N, k] with N = {n}, not"
                f" {list(ids.shape)} {ids.dtype} and {list(probabilities.shape)}"
            )
    else:
        raise ValueError(f"teacher.{name} must have either hidden, or ids and probabilities")


def _check_stream(name: str, stream: Stream, weight: Tensor) -> None:
    hidden, labels, cu = stream
    if hidden.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}.hidden must be [N, D] with D = {weight.shape[1]} as in weight, not {list(hidden.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"{name}.hidden has dtype {hidden.dtype}, weight {weight.dtype}: they must be the same"
        )
    if hidden.device != weight.device or labels.device != weight.device:
        raise ValueError(
            f"{name}: hidden is on {hidden.device}, labels on {labels.device}, weight on {weight.device}:"
            " they must be on the same device"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{name}.labels must be [N] = [{hidden.shape[0]}] int64, not {list(labels.shape)} {labels.dtype}"
        )
    if cu.ndim != 1 or cu.shape[0] < 1 or cu.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}.cu must be [B + 1] int32 offsets, not {list(cu.shape)} {cu.dtype}")


def check_values(name: str, stream: Stream | None, vocabulary: int) -> None:
    """Raise ValueError if offsets or labels are out of bounds.

    Tensors on a GPU are not looked at, because the host would have to wait for them.
    """
    if stream is None:
        return
    hidden, labels, cu = stream
    if cu.device.type == "cpu":
        offsets = cu.tolist()
        if offsets[0] != 0 or offsets[-1] != hidden.shape[0] or offsets != sorted(offsets):
            raise ValueError(
                f"{name}.cu must rise from 0 to N = {hidden.shape[0]}; it starts with {offsets[0]}, ends with"
                f" {offsets[-1]}{'' if offsets == sorted(offsets) else ', and falls in between'}"
            )
    if labels.device.type == "cpu" and labels.numel():
        low, high = labels[labels != IGNORED].aminmax() if bool((labels != IGNORED).any()) else (0, 0)
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"{name}.labels lie between {int(low)} and {int(high)}; they must be {IGNORED} (ignored) or"
                f" in [0, V) = [0, {vocabulary})"
            )
