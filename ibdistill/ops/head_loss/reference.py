"""The head loss in plain torch: full logits, loops over questions, autograd. The truth for tests.

Shapes: B questions; a stream's target positions are packed, N of them, `cu[B + 1]` their offsets;
D hidden size, V vocabulary.

    z = hidden W^T + bias (with a softcap: cap tanh(z / cap) in its place), p = softmax(z)
    total = ce_predict * CE_predict + ce_explain * CE_explain + mi * MI
            + kd_predict * KD_predict + kd_explain * KD_explain

with the factors of `Weights`. CE and KD are sums over a stream's target tokens, MI a sum over the
questions that have targets in both streams. Everything is a sum, because only the caller knows how many
tokens and questions the whole step has: it puts the reciprocals of these numbers into the weights.

Ignored positions (label -100) take no part in anything: no cross entropy, not pooled.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ibdistill.ops.head_loss.argument_checks import check_arguments, check_values
from ibdistill.ops.head_loss.arguments import (
    IGNORED,
    SMALLEST_PROBABILITY,
    MISettings,
    Stream,
    TeacherDistributions,
    TeacherStream,
    Weights,
)
from ibdistill.ops.head_loss.divergences import DIVERGENCES
from ibdistill.ops.head_loss.estimators import ESTIMATORS, barber_agakov, pool_states
from ibdistill.ops.head_loss.sampled_token import value_and_factor
from ibdistill.ops.head_loss.softcap import capped, check_softcap


def head_loss_reference(
    predict: Stream,
    explain: Stream | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weights: Weights,
    mi: MISettings | None = None,
    teacher: TeacherDistributions | None = None,
    group: Any = None,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See `head_loss`, whose results these are.

    Computed in `dtype`, by default float64 for float64 inputs and float32 for all others;
    torch.bfloat16 gives what eager torch would do in bfloat16.
    """
    check_arguments(predict, explain, weight, bias, mi, teacher)
    check_softcap("softcap", softcap)
    for name, stream in (("predict", predict), ("explain", explain)):
        check_values(name, stream, weight.shape[0])
    dtype = dtype or (torch.float64 if weight.dtype == torch.float64 else torch.float32)
    streams = {"predict": predict} | ({} if explain is None else {"explain": explain})
    space = "none" if mi is None else ESTIMATORS[mi.estimator].space
    # stream -> for each question the pooled [width], or None if it has no position there
    pooled: dict[str, list[Tensor | None]] = {}
    # stream -> [0, width], for a batch in which no question has positions in both streams
    empty: dict[str, Tensor] = {}
    terms: dict[str, Tensor] = {}
    for name, stream in streams.items():
        hidden = stream.hidden.to(dtype)
        logits = hidden @ weight.to(dtype).T
        if bias is not None:
            logits = logits + bias.to(dtype)
        logits = capped(logits, softcap)
        log_p = torch.log_softmax(logits, -1)
        keep = stream.labels != IGNORED
        label_log_p = log_p[keep].gather(1, stream.labels[keep, None])[:, 0]
        terms[f"ce_{name}"] = -label_log_p.sum()
        terms[f"correct_{name}"] = (label_log_p == log_p[keep].amax(-1)).sum().to(dtype)
        target = None if teacher is None else getattr(teacher, name)
        if target is not None:
            if teacher.is_sampled:
                kd = _estimate(label_log_p, teacher, target, stream.labels, dtype, keep)
            else:
                student = torch.log_softmax(logits / teacher.temperature, -1)
                kd = _distil(student, teacher, target, dtype)[keep]
            if target.weights is not None:
                kd = kd * target.weights[keep].to(dtype)
            terms[f"kd_{name}"] = kd.sum()
        values, pool = (hidden, pool_states) if space == "state" else (log_p, pool_logs)
        if name == "explain" and mi is not None and mi.pair == "teacher":
            values = _teacher_logs(teacher, target, weight.shape[0], dtype)
        spans = zip(stream.cu[:-1].tolist(), stream.cu[1:].tolist(), strict=True)
        parts = [values[a:b][keep[a:b]] for a, b in spans]
        if mi is not None:
            pooled[name] = [pool(part, mi.pool) if len(part) else None for part in parts]
            empty[name] = values[:0]
    if mi is not None:
        terms |= _mi(pooled, empty, mi, group)
    factors = vars(weights)
    total = sum(factors[name] * terms[name] for name in factors if name in terms)
    return total, {name: term.detach() for name, term in terms.items()}


def _mi(
    pooled: dict[str, list[Tensor | None]], empty: dict[str, Tensor], mi: MISettings, group: Any
) -> dict[str, Tensor]:
    """The terms of the mutual-information estimator, summed over questions with positions in both streams."""
    estimator = ESTIMATORS[mi.estimator]
    pairs = zip(pooled["predict"], pooled["explain"], strict=True)
    both = [b for b, (p, e) in enumerate(pairs) if p is not None and e is not None]
    stacked = {
        name: torch.stack([rows[b] for b in both]) if both else empty[name] for name, rows in pooled.items()
    }
    terms: dict[str, Tensor] = {}
    directions = mi.directions
    for target, estimate in directions:
        values = estimator.function(
            stacked[target].detach(),
            stacked[estimate],
            temperature=mi.temperature,
            group=group if estimator.space == "state" else None,
        )
        sums = {name: value.sum() for name, value in values.items()}
        if estimator.is_cross_entropy:
            target_sum = torch.softmax(stacked[target].detach(), -1).sum(0)
            sums["mi_bound"] = barber_agakov(target_sum, sums["mi"].detach(), len(both))
        for name, value in sums.items():
            terms[name] = terms.get(name, 0) + value / len(directions)
    terms["mi_questions"] = torch.tensor(float(len(both)), dtype=terms["mi"].dtype, device=terms["mi"].device)
    return terms


def pool_logs(log_p: Tensor, pool: str) -> Tensor:
    """Logarithm of the pooled distribution of one stream: [n, V] log probabilities, n >= 1, to [V]."""
    if pool == "max":
        return log_p.max(0).values
    return torch.logsumexp(log_p, 0) - torch.log(torch.tensor(float(len(log_p)), dtype=log_p.dtype))


def _teacher_logits(teacher: TeacherDistributions, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    logits = hidden.to(dtype) @ teacher.weight.to(dtype).T
    logits = logits if teacher.bias is None else logits + teacher.bias.to(dtype)
    return capped(logits, teacher.softcap).detach()


def _teacher_logs(
    teacher: TeacherDistributions, target: TeacherStream, vocabulary: int, dtype: torch.dtype
) -> Tensor:
    """The teacher's log probabilities at temperature 1, [N, V]; a top k's tail in equal shares."""
    if target.hidden is not None:
        return torch.log_softmax(_teacher_logits(teacher, target.hidden, dtype), -1)
    q = target.probabilities.detach().to(dtype)
    n, k = q.shape
    tail = (1 - q.sum(-1, keepdim=True)).clamp_min(SMALLEST_PROBABILITY) / max(vocabulary - k, 1)
    full = tail.expand(n, vocabulary).scatter(1, target.ids, q)
    return full.clamp_min(torch.finfo(dtype).tiny).log()


def _estimate(
    log_p: Tensor,
    teacher: TeacherDistributions,
    target: TeacherStream,
    labels: Tensor,
    dtype: torch.dtype,
    keep: Tensor,
) -> Tensor:
    """Estimates of the divergence from the labels, [n], with the gradient that belongs to them."""
    if target.hidden is None:
        log_q = target.probabilities[keep, 0].to(dtype).log()
    else:
        logits = _teacher_logits(teacher, target.hidden[keep], dtype)
        log_q = torch.log_softmax(logits, -1).gather(1, labels[keep, None])[:, 0]
    value, factor = value_and_factor(teacher.divergence, log_q, log_p.detach())
    return value + factor * (log_p - log_p.detach())


def _distil(
    student: Tensor, teacher: TeacherDistributions, target: TeacherStream, dtype: torch.dtype
) -> Tensor:
    """T^2 times the divergence of each position, [N], from the student's log probabilities at T."""
    if target.hidden is not None:
        logits = _teacher_logits(teacher, target.hidden, dtype)
        log_q, log_p = torch.log_softmax(logits / teacher.temperature, -1), student
    else:
        # k + 1 buckets: the k tokens, and the rest of each distribution
        rest = torch.logsumexp(student.scatter(1, target.ids, -torch.inf), -1, keepdim=True)
        rest = rest.clamp_min(math.log(torch.finfo(dtype).tiny))
        log_p = torch.cat([student.gather(1, target.ids), rest], -1)
        q = target.probabilities.detach().to(dtype)
        log_q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1).clamp_min(SMALLEST_PROBABILITY).log()
    loss = DIVERGENCES[teacher.divergence].function(log_q, log_p, teacher.beta)
    return loss * teacher.temperature**2
