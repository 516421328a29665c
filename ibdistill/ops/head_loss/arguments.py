"""The arguments of the head loss, shared by `head_loss` and its reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ibdistill.ops.checks import check_choice
from ibdistill.ops.head_loss.divergences import DIVERGENCES
from ibdistill.ops.head_loss.estimators import DIRECTIONS, ESTIMATORS, POOLS
from ibdistill.ops.head_loss.sampled_token import SAMPLED
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
    """[N, k] int64: k different tokens of each position; with estimates from the labels these alone."""
    probabilities: Tensor | None = None
    """[N, k]: their probabilities at `TeacherDistributions.temperature`. The rest of the probability is the
    tail, one bucket."""
    weights: Tensor | None = None
    """[N]: what each position's divergence is multiplied with; None: 1."""


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
    """A name in `divergences.DIVERGENCES`: forward KL(teacher || student), reverse, jsd, ...; or, where the
    labels are tokens that the student has drawn, an estimate in `sampled_token.SAMPLED`, from hidden states
    and at temperature 1."""
    beta: float = 0.5
    """The divergence's parameter, between 0 and 1 (jsd: the teacher's share in the mixture)."""
    temperature: float = 1.0
    """The temperature T of both distributions."""
    softcap: float | None = None
    """The cap of the teacher's logits, before the temperature (see `softcap`); None: they have none."""

    def __post_init__(self):
        check_choice("divergence", self.divergence, [*DIVERGENCES, *SAMPLED])
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta = {self.beta} must lie between 0 and 1 (use divergence = forward or reverse)"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature} must be positive")
        check_softcap("teacher.softcap", self.softcap)
        widths = [
            s.ids.shape[-1] for s in (self.predict, self.explain) if s is not None and s.ids is not None
        ]
        if self.is_sampled and (any(k != 1 for k in widths) or self.temperature != 1):
            found = (
                "a top k, which may lack the label"
                if any(k != 1 for k in widths)
                else f"temperature {self.temperature}"
            )
            raise ValueError(
                f"divergence = {self.divergence!r} compares the probabilities of the labels at temperature 1 "
                f"and got {found}; give the teacher's hidden states and temperature = 1, or use another"
            )

    @property
    def is_sampled(self) -> bool:
        """Whether the divergence is estimated from the labels (`sampled_token`)."""
        return self.divergence in SAMPLED

    @property
    def is_top_k(self) -> bool:
        """Whether the teacher is given by its top k instead of its hidden states."""
        return any(s is not None and s.ids is not None for s in (self.predict, self.explain))


def field_of_streams(teacher: TeacherDistributions, field: str, counts: Sequence[int]) -> list[Tensor] | None:
    """One field of the teacher's streams, [rows, ...] for each of `counts` streams; None where none has it.

    A stream without it gets ones as `weights` and else zeros, since it then has nothing to say.
    """
    given = [None if s is None else getattr(s, field) for s in (teacher.predict, teacher.explain)]
    example = next((x for x in given if x is not None), None)
    if example is None:
        return None
    fill = int(field == "weights")
    return [
        example.new_full((count, *example.shape[1:]), fill) if x is None else x.detach()
        for count, x in zip(counts, given, strict=False)
    ]


class Call(NamedTuple):
    """One checked call of the head loss."""

    predict: Stream
    explain: Stream | None
    weights: Weights
    mi: MISettings | None
    teacher: TeacherDistributions | None
    chunk_bytes: int
    softcap: float | None = None
