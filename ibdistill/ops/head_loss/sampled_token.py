"""The divergence from the teacher, estimated from the one token of each position that the student has drawn.

They need the two models' log probabilities of that token and nothing else. With log q the teacher's, log p
the student's and r = log q - log p, an estimate is a function of one signature,

    estimate(r [N]) -> value [N], factor [N]

whose gradient is factor times the gradient of log p. Over tokens drawn from the student's distribution p at
temperature 1, exactly and for each position by itself:

    name  value           factor       mean of the value             mean of the gradient
    k1    -r              -r           KL(p || q)                    that of the reverse KL(p || q)
    k2    r^2 / 2         -r           close to it where p is q      that of the reverse KL(p || q)
    k3    exp(r) - 1 - r  1 - exp(r)   KL(p || q), never negative    that of the FORWARD KL(q || p)

So k3 is the better figure to look at and another objective to learn from. k1 is a policy gradient
(REINFORCE) whose advantage is r, a constant in the gradient, so its value is not the function that its
gradient belongs to. The gradient of k2, a plain derivative, is the same number for each token. Over other
text, or text that an older student has drawn, none of this holds.

Values: Schulman, "Approximating KL Divergence", 2020. The policy gradient on sampled tokens, without the
returns of later tokens: Lu et al., "On-Policy Distillation", Thinking Machines Lab, 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CLIP = 10.0
"""Log ratios are clipped to [-CLIP, CLIP] before value and factor are taken from them, so that a token
outside of these bounds still has a gradient. At 10 nats one model gives the token e^10 = 22026 times the
other's probability: a larger number would say nothing more of the token, and exp(r) would let one token
outweigh all others of a batch (and overflow)."""


def k1(r: Tensor) -> tuple[Tensor, Tensor]:
    """-r, and the factor -r of a policy gradient."""
    return -r, -r


def k2(r: Tensor) -> tuple[Tensor, Tensor]:
    """r^2 / 2, and its derivative's factor."""
    return r.square() / 2, -r


def k3(r: Tensor) -> tuple[Tensor, Tensor]:
    """exp(r) - 1 - r, and its derivative's factor."""
    return torch.expm1(r) - r, -torch.expm1(r)


class SampledToken(NamedTuple):
    """An estimate of a divergence. See the module's docstring."""

    function: Callable[[Tensor], tuple[Tensor, Tensor]]
    paper: str
    """Where it comes from, for the model card."""


_NOTE = 'Schulman, "Approximating KL Divergence", 2020'

SAMPLED = {
    "k1": SampledToken(
        k1,
        "the policy gradient of the reverse KL on tokens that the student draws: Lu et al., "
        '"On-Policy Distillation", Thinking Machines Lab, 2025',
    ),
    "k2": SampledToken(k2, f"half the squared log ratio of tokens that the student draws: {_NOTE}"),
    "k3": SampledToken(k3, f"the estimate k3 on tokens that the student draws: {_NOTE}"),
}
"""Name -> estimate, beside the divergences between whole distributions (`divergences.DIVERGENCES`)."""


def value_and_factor(name: str, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Value [N] and factor [N] of an estimate, from the log probabilities [N] of the drawn tokens."""
    return SAMPLED[name].function((log_q - log_p).clamp(-CLIP, CLIP))
