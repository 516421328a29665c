"""Attention with a bias for each distance in plain torch: the truth for tests."""

from __future__ import annotations

import torch
from torch import Tensor


def biased_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    keep: Tensor | None = None,
) -> Tensor:
    """The value of `biased_attention`, [B, T, H, D], with its arguments in one dtype.

    `keep` [B, H, T, S] is what dropout multiplies the probabilities with.
    """
    T, S = query.shape[2], key.shape[2]
    place = torch.arange(max(S, T), device=query.device)
    distance = place[None, :S] - place[:T, None]
    scores = torch.einsum("bhtd,bhsd->bhts", query, key) + bias[:, distance + T - 1]
    seen = torch.ones(query.shape[0], 1, T, S, dtype=torch.bool, device=query.device)
    if mask is not None:
        seen &= mask[:, None, None, :]
    if causal:
        seen &= distance <= 0
    # rows of -inf would be NaN: their scores become 0, and their probabilities too
    scores = scores.masked_fill(~seen & seen.any(-1, keepdim=True), -torch.inf)
    p = torch.softmax(scores, -1).masked_fill(~seen, 0)
    return torch.einsum("bhts,bhsd->bthd", p if keep is None else p * keep, value)
