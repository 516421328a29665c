"""The variational information bottleneck: noise on the question's states, and what they may say of it.

Alemi et al., ICLR 2017, arXiv 1612.00410. The decoder sees a random Z in place of a question X, and Z
should tell much about the target Y and little else about X: maximise I(Z; Y) - beta I(Z; X). Both terms have
bounds that can be trained on,

    I(Z; Y) >= H(Y) + E[log q(Y | Z)]       q: decoder and head, so the cross entropies are this bound
    I(Z; X) <= E[KL(p(Z | X) || r(Z))]      for any r; here the standard normal distribution

With Z = mu(X) + sigma * eps, eps ~ N(0, I) and sigma = exp(g / 2), the second bound is in closed form,

    KL = sum_d (mu_d^2 + exp(g_d) - 1 - g_d) / 2    nats per token.

mu is the encoder's last state itself, not a map of it, and g, one number per dimension, is all that is
learned besides the model. So nothing has to be kept after training: without noise the decoder reads mu, which
is what the model computes by itself. (In the paper mu and sigma are functions of X.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_noise(states: Tensor, log_variance: Tensor) -> Tensor:
    """A draw of Z for states mu [..., D] and g [D], in the states' dtype, by the default generator."""
    return states + torch.exp(0.5 * log_variance).to(states.dtype) * torch.randn_like(states)


def vib_terms(states: Tensor, log_variance: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over tokens of the KL (nats) and of |mu|^2, by which its gradient in the states is measured.

    Args:
        states: mu [rows, L, D], of any floating dtype.
        log_variance: g [D].
        mask: [rows, L], 1 where a token is and 0 where padding is.

    Returns:
        Two 0-d tensors, float32 (float64 for float64 states), with gradients for states and log_variance.
    """
    dtype = torch.promote_types(states.dtype, torch.float32)
    g = log_variance.to(dtype)
    squares = (states.to(dtype).square().sum(-1) * mask).sum()
    return 0.5 * (squares + mask.sum() * (torch.exp(g) - 1 - g).sum()), squares
