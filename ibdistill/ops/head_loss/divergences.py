"""Divergences between the teacher's and the student's distribution of a token.

The plain form is a small function of one signature,

    divergence(log_q, log_p, beta) -> loss [...]

of the teacher's log probabilities log_q and the student's log_p, [..., K], over the vocabulary or over
buckets of it. Losses are in nats, and 0 at p = q. With one line in DIVERGENCES the plain form is all that a
divergence needs.

The fused form, which is optional, returns the loss and its gradient [..., K] for the student's logits u, with
p = softmax(u). Where there is none, the torch implementation of the head loss differentiates the plain form
by `torch.func`, and says so once in the log. Where a divergence is not `in_triton`, the torch implementation
is taken on a GPU too.

forward KL: Hinton et al. 2015, arXiv 1503.02531. Reverse KL: Gu et al., ICLR 2024, arXiv 2306.08543.
Generalised JSD: Agarwal et al., ICLR 2024, arXiv 2306.13649, equation 1 (its P is the teacher).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ibdistill.ops.implementation import log_plain_form


def forward_kl(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """KL(q || p) = sum q (log q - log p). `beta` is unused."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def reverse_kl(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """KL(p || q) = sum p (log p - log q). `beta` is unused."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, 0 < beta < 1."""
    q, p = log_q.exp(), log_p.exp()
    log_m = (beta * q + (1 - beta) * p).log()
    return (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(-1)


def forward_kl_fused(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`forward_kl` and its gradient p - q."""
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(-1), log_p.exp() - q


def reverse_kl_fused(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`reverse_kl` and its gradient p (log p - log q - KL)."""
    return _centred(log_p.exp(), log_p - log_q)


def jsd_fused(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`jsd` and its gradient.

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


class Divergence(NamedTuple):
    """A divergence: its plain form, and its fused form where it has one. See the module's docstring."""

    function: Callable[[Tensor, Tensor, float], Tensor]
    """The plain form."""
    fused: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] | None = None
    """Loss and gradient for the student's logits. None: `torch.func` differentiates `function`."""
    in_triton: bool = False
    """Whether the Triton implementation of the head loss has it."""


DIVERGENCES = {
    "forward": Divergence(forward_kl, forward_kl_fused, in_triton=True),
    "reverse": Divergence(reverse_kl, reverse_kl_fused, in_triton=True),
    "jsd": Divergence(jsd, jsd_fused, in_triton=True),
}


def loss_and_gradient(name: str, log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """A divergence's loss [...] and its gradient [..., K] for the logits u, where log_p = log_softmax(u)."""
    divergence = DIVERGENCES[name]
    if divergence.fused is not None:
        return divergence.fused(log_q, log_p, beta)
    log_plain_form("head loss", "divergence", name)

    def total(log_p: Tensor) -> tuple[Tensor, Tensor]:
        loss = divergence.function(log_q, log_p, beta)
        return loss.sum(), loss

    # torch.func, because a custom op, inside which this runs, is hidden from torch.autograd
    d_log_p, loss = torch.func.grad(total, has_aux=True)(log_p)
    return loss, d_log_p - log_p.exp() * d_log_p.sum(-1, keepdim=True)
