"""Divergences between the teacher's and the student's distribution of a token, with their gradients.

Each is a small function of one signature,

    divergence(log_q, log_p, beta) -> loss [...], gradient [..., K]

of the teacher's log probabilities log_q and the student's log_p, [..., K], over the vocabulary or
over buckets of it. The gradient is that of the loss for the student's logits u with
p = softmax(u). Losses are in nats, and 0 at p = q.

forward KL: Hinton et al. 2015, arXiv 1503.02531. Reverse KL: Gu et al., ICLR 2024, arXiv 2306.08543.
Generalised JSD: Agarwal et al., ICLR 2024, arXiv 2306.13649, equation 1 (its P is the teacher).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward_kl(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum q (log q - log p); gradient p - q. `beta` is unused."""
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(-1), log_p.exp() - q


def reverse_kl(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum p (log p - log q); gradient p (log p - log q - KL). `beta` is unused."""
    return _centred(log_p.exp(), log_p - log_q)


def jsd(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, 0 < beta < 1.

    The derivative for p is (1 - beta) log(p / m): what m contributes sums to a constant.
    """
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    student, gradient = _centred(log_p.exp(), log_p - log_m)
    teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * teacher + (1 - beta) * student, (1 - beta) * gradient


def _centred(p: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """sum p ratio, and p (ratio - that sum)."""
    # 0 * -inf is not a number; an entry that the student can't produce has no part in either
    mean = torch.where(p > 0, p * ratio, 0).sum(-1)
    return mean, torch.where(p > 0, p * (ratio - mean[..., None]), 0)


DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "jsd": jsd}
