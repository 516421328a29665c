"""Attention with a bias for each distance in torch with bounded memory: queries are taken chunk by chunk.

The scores of a chunk exist while it is worked on, in the forward pass and again in the backward pass, which
keeps the logarithm of each row's sum in between. Dropout decides by a hash (`ops.dropout_hash`), so that
both implementations drop the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ibdistill.ops.dropout_hash import keep


class _Chunks:
    """The scores and dropout masks of chunks of queries."""

    def __init__(self, query, key, bias, mask, causal: bool, level: int, seed, chunk_bytes: int) -> None:
        self.query, self.key, self.bias, self.mask = query, key, bias, mask
        self.causal, self.level, self.seed = causal, level, seed
        B, H, self.T, _ = query.shape
        self.S = key.shape[2]
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.size = max(1, chunk_bytes // (B * H * self.S * self.dtype.itemsize))

    def __iter__(self):
        return ((a, min(a + self.size, self.T)) for a in range(0, self.T, self.size))

    def scores(self, a: int, b: int) -> Tensor:
        """[B, H, b - a, S] with -inf where a query does not see a key."""
        # window i of the bias starts at the distance of key 0 for the last query but i
        windows = self.bias[:, self.T - b : self.T - a + self.S - 1].unfold(1, self.S, 1).flip(1)
        scores = (self.query[:, :, a:b] @ self.key.mT).to(self.dtype) + windows
        if self.mask is not None:
            scores.masked_fill_(~self.mask[:, None, None, :], -torch.inf)
        if self.causal:
            scores.masked_fill_(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(a + 1), -torch.inf)
        return scores

    def keep(self, a: int, b: int) -> Tensor | None:
        """What dropout leaves of the chunk's probabilities, None for all."""
        if not self.level:
            return None
        B, H = self.query.shape[:2]
        device = self.query.device
        sequences = torch.arange(B * H, device=device).view(B, H, 1, 1) * self.T
        rows = sequences + torch.arange(a, b, device=device)[:, None]
        return keep(self.seed, rows, torch.arange(self.S, device=device), self.level)


class _Sides:
    """The sequences of a packed row side by side, and one behind the other again."""

    def __init__(self, ends: Tensor, longest: int) -> None:
        places = torch.arange(longest, device=ends.device)
        self.real = places < ends.diff()[:, None]
        """[B, longest] bool."""
        self.places = (ends[:-1, None] + places).masked_fill_(~self.real, 0)

    def of(self, row: Tensor) -> Tensor:
        """[B, H, longest, D] of a row [1, H, T, D], zeros behind each sequence."""
        return (row[0][:, self.places] * self.real[..., None]).transpose(0, 1)

    def back(self, sides: Tensor) -> Tensor:
        """The row [1, H, T, D]."""
        return sides.transpose(0, 1)[:, self.real][None]


def forward(
    query, key, value, bias, mask, ends, longest: int, seed,
    causal: bool, level: int, factor: float, chunk_bytes: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [B, T, H, D] and the logarithms [B, H, T] of the rows' sums, inf for a query that sees no key."""
    if ends is not None:  # its sequences side by side
        queries, keys = _Sides(ends[0], longest), _Sides(ends[1], bias.shape[1] + 1 - longest)
        sides = queries.of(query), keys.of(key), keys.of(value)
        settings = causal, level, factor, chunk_bytes
        out, logs = forward(*sides, bias, keys.real, None, 0, seed, *settings)
        return queries.back(out.transpose(1, 2)).transpose(1, 2).contiguous(), logs
    B, H, T, _ = query.shape
    chunks = _Chunks(query, key, bias, mask, causal, level, seed, chunk_bytes)
    out = query.new_empty(B, T, H, value.shape[3])
    logs = query.new_empty(B, H, T, dtype=chunks.dtype)
    for a, b in chunks:
        scores = chunks.scores(a, b)
        logs[:, :, a:b] = scores.logsumexp(-1).masked_fill_(scores.amax(-1) == -torch.inf, torch.inf)
        p = scores.sub_(logs[:, :, a:b, None]).exp_()
        if (kept := chunks.keep(a, b)) is not None:
            p.mul_(kept).mul_(factor)
        out[:, a:b] = (p.to(value.dtype) @ value).transpose(1, 2)
    return out, logs


def backward(
    gradient, query, key, value, bias, mask, ends, longest: int, seed, out, logs,
    causal: bool, level: int, factor: float, chunk_bytes: int, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key, value and bias; the last is empty where it is not needed."""
    if ends is not None:
        queries, keys = _Sides(ends[0], longest), _Sides(ends[1], bias.shape[1] + 1 - longest)
        d_out, outs = (queries.of(x.transpose(1, 2)).transpose(1, 2) for x in (gradient, out))
        sides = queries.of(query), keys.of(key), keys.of(value)
        settings = causal, level, factor, chunk_bytes, needs_bias
        found = backward(d_out, *sides, bias, keys.real, None, 0, seed, outs, logs, *settings)
        d_q, d_k, d_v, d_bias = found
        return queries.back(d_q), keys.back(d_k), keys.back(d_v), d_bias
    chunks = _Chunks(query, key, bias, mask, causal, level, seed, chunk_bytes)
    d_out = gradient.transpose(1, 2)
    deltas = (d_out.to(chunks.dtype) * out.transpose(1, 2)).sum(-1, keepdim=True)
    d_q = torch.empty_like(query)
    d_k, d_v = (torch.zeros(x.shape, dtype=chunks.dtype, device=x.device) for x in (key, value))
    d_bias = torch.zeros_like(bias) if needs_bias else bias.new_empty(0)
    for a, b in chunks:
        p = chunks.scores(a, b).sub_(logs[:, :, a:b, None]).exp_()
        d_p, dropped = (d_out[:, :, a:b] @ value.mT).to(chunks.dtype), p
        if (kept := chunks.keep(a, b)) is not None:
            kept = kept.to(p.dtype).mul_(factor)
            d_p, dropped = d_p.mul_(kept), p * kept
        d_v += dropped.to(value.dtype).mT @ d_out[:, :, a:b]
        d_s = d_p.sub_(deltas[:, :, a:b]).mul_(p)
        if needs_bias:
            d_bias[:, chunks.T - b : chunks.T - a + chunks.S - 1] += _diagonals(d_s.sum(0))
        d_s = d_s.to(query.dtype)
        d_q[:, :, a:b] = d_s @ key
        d_k += d_s.mT @ query[:, :, a:b]
    return d_q, d_k.to(key.dtype), d_v.to(value.dtype), d_bias


def _diagonals(x: Tensor) -> Tensor:
    """Sums [H, C + S - 1] of the diagonals of x [H, C, S], from its lower left corner to the upper right."""
    H, C, S = x.shape
    # rows of C zeros more, read as rows that are one shorter: each is one further to the right than the last
    flat = F.pad(x.flip(1), (0, C)).flatten(1)[:, : C * (S + C - 1)]
    return flat.view(H, C, S + C - 1).sum(1)
