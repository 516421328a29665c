"""Whether the arguments of a call of the head loss fit together, for `head_loss` and its reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ibdistill.ops.head_loss.arguments import (
    IGNORED,
    MISettings,
    Stream,
    TeacherDistributions,
    TeacherStream,
)


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
        shapes = {tuple(None if x is None else x.shape[1:] for x in s[:3]) for s in targets}
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
    if target.weights is not None and target.weights.shape != (n,):
        raise ValueError(f"teacher.{name}.weights must be [N] = [{n}], not {list(target.weights.shape)}")
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
