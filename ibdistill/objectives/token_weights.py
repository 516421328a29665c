"""Weights of a text's tokens in the distillation term, by their position and by an entropy.

    w[t] = L v[t] / sum of v over the text's L tokens,    v[t] = first[t] later[t] entropy[t]

    first     1 for the first tokens of the text (`objective.kd_first`), else 0: Zhang et al., "Fast and
              Effective On-policy Distillation from Reasoning Prefixes", 2026, arXiv 2602.15260. Xie et al.,
              "On the Position Bias of On-Policy Distillation", 2026, arXiv 2606.22600, find the first 30 % of
              the tokens to do about as well as all
    later     ((t + 1/2) / L)^`objective.kd_later`, t from 0: weights that rise with the position, as in Liu
              et al., "When Are Teacher Tokens Reliable? Position-Weighted On-Policy Self-Distillation for
              Reasoning", 2026, arXiv 2605.21606. The power is this project's form
    entropy   the entropy of the student's or the teacher's distribution at the token
              (`objective.kd_entropy`); or, with `objective.kd_entropy_share`, 1 for that share of the text's
              tokens with the largest, else 0: Tavor et al., "Rethinking Selective Knowledge Distillation",
              2026, arXiv 2602.01395, who take a fifth of the tokens by the student's. The teacher's guides
              Zhang et al., "EGAD: Entropy-Guided Adaptive Distillation for Token-Level Knowledge Transfer",
              2026, arXiv 2605.01732

A text's weights have the mean 1, so gamma means the same with and without them, and sums over tokens are
still divided by the step's global counts: no rank needs to know another's tokens, and the gradient depends
neither on ranks nor on micro-batches. A text all of whose v are 0 has no part in the term.

A text is a rationale or the student's own text. The tokens of labels and answers, which are few, have
weight 1. Entropies cost one more product of the texts' states with the head of the model they are of.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ibdistill.config.sections import ObjectiveConfig
from ibdistill.ops.copies import to_device
from ibdistill.ops.head_loss.arguments import (
    SMALLEST_PROBABILITY,
    Stream,
    TeacherDistributions,
    TeacherStream,
)
from ibdistill.ops.head_loss.softcap import capped

TEXTS = ("explain", "rationale", "sampled")
"""The segments whose tokens have weights."""

Head = tuple[Tensor, Tensor | None, float | None]
"""Weight [V, D], bias [V] and cap of a head's logits."""


def weighed(
    objective: ObjectiveConfig,
    teacher: TeacherDistributions,
    segments: tuple[str, str | None],
    streams: tuple[Stream, Stream | None],
    head: Head,
) -> TeacherDistributions:
    """What the teacher says about a pair of segments, with the weights of their tokens.

    `head` is the student's.
    """
    if not (objective.kd_first or objective.kd_later or objective.kd_entropy != "none"):
        return teacher
    found = {}
    for side, segment, stream in zip(("predict", "explain"), segments, streams, strict=True):
        target = getattr(teacher, side)
        if segment in TEXTS and target is not None:
            entropy = None
            if objective.kd_entropy == "student":
                entropy = entropies(stream.hidden.detach(), *head)
            elif objective.kd_entropy == "teacher":
                entropy = _entropy_of(target, teacher)
            found[side] = target._replace(weights=token_weights(objective, stream, entropy))
    return replace(teacher, **found)


def token_weights(objective: ObjectiveConfig, stream: Stream, entropy: Tensor | None) -> Tensor:
    """[N] fp32, the weights of a stream's tokens. `entropy` [N]: None where it has no say."""
    cu, device = stream.cu.long(), stream.labels.device
    lengths = cu.diff()
    owner = to_device(torch.repeat_interleave(torch.arange(len(lengths)), lengths), device)
    cu, lengths = to_device(cu, device), to_device(lengths, device)
    place, length = torch.arange(len(owner), device=device) - cu[owner], lengths[owner]
    # logarithms, of which each text's largest becomes 0: no power is too large for it
    value = torch.zeros(len(owner), dtype=torch.float64, device=device)
    if objective.kd_first:
        limit = objective.kd_first if objective.kd_first >= 1 else (objective.kd_first * length).ceil()
        value.masked_fill_(place >= limit, -torch.inf)
    if objective.kd_later:
        value += objective.kd_later * ((place.double() + 0.5) / length).log()
    if entropy is not None and objective.kd_entropy_share < 1:
        order = entropy.argsort(descending=True, stable=True)
        order = order[owner[order].argsort(stable=True)]  # by text, in each by entropy
        rank = torch.empty_like(place).scatter_(0, order, place)
        value.masked_fill_(rank >= (objective.kd_entropy_share * length).ceil(), -torch.inf)
    elif entropy is not None:
        value += entropy.double().log()
    largest = value.new_full((len(lengths),), -torch.inf).scatter_reduce(0, owner, value, "amax")
    value = (value - largest.nan_to_num(neginf=0.0)[owner]).exp()
    # differences of a running sum, because adding by owner has no fixed order on a GPU
    sums = torch.nn.functional.pad(value.cumsum(0), (1, 0))
    total = (sums[cu[1:]] - sums[cu[:-1]])[owner]
    return torch.where(total > 0, length * value / total, 0.0).float()


def _entropy_of(target: TeacherStream, teacher: TeacherDistributions) -> Tensor:
    """The entropy of the teacher's distributions, [N] nats; the tail of a top k counts as one token."""
    if target.hidden is not None:
        return entropies(target.hidden, teacher.weight, teacher.bias, teacher.softcap)
    q = target.probabilities
    tail = (1 - q.sum(-1, keepdim=True)).clamp_min(SMALLEST_PROBABILITY)
    return torch.special.entr(torch.cat([q, tail], -1)).sum(-1)


@torch.no_grad()
def entropies(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, chunk_bytes: int = 20 << 20
) -> Tensor:
    """Entropies in nats of softmax(hidden W^T + bias), [N] in fp32 (fp64 for fp64): one more product.

    `softcap` caps the logits. At most about `chunk_bytes` are taken for them at a time.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows = max(1, chunk_bytes // (len(weight) * wide.itemsize))
    found = []
    for part in hidden.split(rows):
        logits = capped(torch.nn.functional.linear(part, weight, bias).to(wide), softcap)
        found.append(torch.special.entr(torch.softmax(logits, -1)).sum(-1))
    return torch.cat(found)
