"""An estimator and a divergence, each of one function."""

import torch
from torch import Tensor


def overlap(target: Tensor, estimate: Tensor, *, temperature: float, group: object) -> dict[str, Tensor]:
    """mi[b] = -log sum_v sqrt(P'[b, v] E'[b, v]), the Bhattacharyya distance; from logarithms [B, V]."""
    both = torch.log_softmax(target, -1) + torch.log_softmax(estimate, -1)
    return {"mi": -torch.logsumexp(both / 2, -1)}


def squared_difference(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """sum_v (q[v] - p[v])^2, from log probabilities [..., K] to [...]."""
    return (log_q.exp() - log_p.exp()).square().sum(-1)
