"""Divergences between the teacher's and the student's distribution of a token.

The plain form is a small function of one signature,

    divergence(log_q, log_p, beta) -> loss [...]

of the teacher's log probabilities log_q and the student's log_p, [..., K], over the vocabulary or over
buckets of it: the teacher's k most probable tokens and, last, all others as one. Losses are in nats, and 0 at
p = q (`top1` and `total_variation` say what theirs are). `beta` lies between 0 and 1, and each divergence
that has such a parameter names its default. With one line in DIVERGENCES the plain form is all that a
divergence needs.

The fused form, which is optional, returns the loss and its gradient [..., K] for the student's logits u, with
p = softmax(u). Where there is none, the torch implementation of the head loss differentiates the plain form
by `torch.func`, and says so once in the log. Where a divergence is not `in_triton`, the torch implementation
is taken on a GPU too.

Each entry of DIVERGENCES names its paper.
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


def skew_forward_kl(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """KL(q || m), m = beta q + (1 - beta) p: finite wherever the student's probability is 0."""
    return (log_q.exp() * (log_q - _log_mixture(log_q, log_p, beta))).sum(-1)


def skew_reverse_kl(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """KL(p || m), m = (1 - beta) q + beta p: finite wherever the teacher's probability is 0."""
    return (log_p.exp() * (log_p - _log_mixture(log_p, log_q, beta))).sum(-1)


def adaptive_kl(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """w KL(q || p) + (1 - w) KL(p || q), where w is the head's share of sum |q - p|, without gradient.

    The head is the teacher's fewest most probable tokens that together have the probability `beta`. Forward
    KL learns the head first and reverse KL the tail, so each gets the share in which p is still wrong.
    """
    weight = _head_share(log_q, log_p, beta)
    return weight * forward_kl(log_q, log_p, beta) + (1 - weight) * reverse_kl(log_q, log_p, beta)


def total_variation(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """sum |q - p| / 2, a probability and no number of nats. `beta` is unused."""
    return (log_q.exp() - log_p.exp()).abs().sum(-1) / 2


def top1(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """-log p of the teacher's most probable token (or bucket), so 0 where p is certain of it, not at p = q.

    `beta` is unused.
    """
    return -log_p.gather(-1, log_q.argmax(-1, keepdim=True))[..., 0]


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
    log_m = _log_mixture(log_q, log_p, beta)
    student, gradient = _centred(log_p.exp(), log_p - log_m)
    teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * teacher + (1 - beta) * student, (1 - beta) * gradient


def skew_forward_kl_fused(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`skew_forward_kl` and its gradient p R - r, where r = (1 - beta) q p / m and R is their sum."""
    log_m = _log_mixture(log_q, log_p, beta)
    r = (1 - beta) * (log_q + log_p - log_m).exp()
    return (log_q.exp() * (log_q - log_m)).sum(-1), log_p.exp() * r.sum(-1, keepdim=True) - r


def skew_reverse_kl_fused(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`skew_reverse_kl` and its gradient p (t - sum p t), where t = log(p / m) - beta p / m."""
    log_m, p = _log_mixture(log_p, log_q, beta), log_p.exp()
    loss, gradient = _centred(p, log_p - log_m)
    return loss, gradient - _centred(p, beta * (log_p - log_m).exp())[1]


def adaptive_kl_fused(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`adaptive_kl` and its gradient."""
    weight = _head_share(log_q, log_p, beta)
    forward, d_forward = forward_kl_fused(log_q, log_p, beta)
    reverse, d_reverse = reverse_kl_fused(log_q, log_p, beta)
    gradient = d_reverse.lerp_(d_forward, weight[..., None].expand_as(d_forward))
    return weight * forward + (1 - weight) * reverse, gradient


def total_variation_fused(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`total_variation` and its gradient p (s - sum p s), where s = sign(p - q) / 2."""
    p = log_p.exp()
    difference = p - log_q.exp()
    return difference.abs().sum(-1) / 2, _centred(p, difference.sign() / 2)[1]


def top1_fused(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """`top1` and its gradient: p, less 1 at the teacher's most probable token."""
    best = log_q.argmax(-1, keepdim=True)
    gradient = log_p.exp()
    return -log_p.gather(-1, best)[..., 0], gradient.scatter_add_(
        -1, best, -torch.ones_like(best, dtype=gradient.dtype)
    )


def _log_mixture(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p)."""
    return torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))


def _head_share(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """The head's share of sum |q - p| (see `adaptive_kl`), [...], without gradient; 1/2 at p = q."""
    q, order = log_q.detach().exp().sort(-1, descending=True)
    gap = (q - log_p.detach().gather(-1, order).exp()).abs()
    is_head = q.cumsum(-1) - q < beta
    total = gap.sum(-1)
    return torch.where(total > 0, (gap * is_head).sum(-1) / total, 0.5)


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
    beta: float = 0.5
    """The default of its parameter, where it has one."""
    paper: str = ""
    """Where it comes from, for the model card."""
    in_triton: bool = False
    """Whether the Triton implementation of the head loss has it."""


_DISTILLM = (
    'Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024, arXiv '
    "2402.03898"
)

DIVERGENCES = {
    "forward": Divergence(
        forward_kl,
        forward_kl_fused,
        paper='Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531',
        in_triton=True,
    ),
    "reverse": Divergence(
        reverse_kl,
        reverse_kl_fused,
        paper='Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024, '
        "arXiv 2306.08543",
        in_triton=True,
    ),
    "jsd": Divergence(
        jsd,
        jsd_fused,
        paper='Agarwal et al., "On-Policy Distillation of Language Models", ICLR 2024, arXiv 2306.13649',
        in_triton=True,
    ),
    "skew_forward": Divergence(skew_forward_kl, skew_forward_kl_fused, 0.1, _DISTILLM),
    "skew_reverse": Divergence(skew_reverse_kl, skew_reverse_kl_fused, 0.1, _DISTILLM),
    "adaptive": Divergence(
        adaptive_kl,
        adaptive_kl_fused,
        paper='Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large '
        'Language Models", 2024, arXiv 2404.02657',
    ),
    "total_variation": Divergence(
        total_variation,
        total_variation_fused,
        paper='Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023, '
        "arXiv 2307.15190",
    ),
    "top1": Divergence(top1, top1_fused, paper="the teacher's most probable token as a hard label"),
}
"""Name -> divergence. The generalised JSD is equation 1 of its paper, whose P is the teacher."""


def loss_and_gradient(name: str, log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """A divergence's loss [...] and its gradient [..., K] for the logits u, where log_p = log_softmax(u)."""
    divergence = DIVERGENCES[name]
    if divergence.fused is not None:
        return divergence.fused(log_q, log_p, beta)
    log_plain_form("divergence", name)

    def total(log_p: Tensor) -> tuple[Tensor, Tensor]:
        loss = divergence.function(log_q, log_p, beta)
        return loss.sum(), loss

    # torch.func, because a custom op, inside which this runs, is hidden from torch.autograd
    d_log_p, loss = torch.func.grad(total, has_aux=True)(log_p)
    return loss, d_log_p - log_p.exp() * d_log_p.sum(-1, keepdim=True)
