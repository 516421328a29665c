"""InfoNCE between the pooled hidden states of the two streams, over the questions of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_BYTES = 32 << 20
"""InfoNCE holds at most this many bytes of similarities at once, but at least one row of them."""


def infonce(
    target: Tensor, estimate: Tensor, *, temperature: float = 0.1, group: Any = None
) -> dict[str, Tensor]:
    """InfoNCE (van den Oord et al. 2018, arXiv 1807.03748): which estimate belongs to this target?

    mi[b] = -log( exp(s[b, b]) / sum_j exp(s[b, j]) ), where s[b, j] is the cosine of target b and estimate j
    divided by the temperature, and j runs over the questions of all ranks, which are
    those of the whole step. For any similarity
    I >= ln(B_global) - E[mi] (Poole et al. 2019, arXiv 1905.06922, equation 10), so the bound can never
    exceed ln(B_global). Estimates are gathered with gradients: a rank's estimate is a negative in the other
    ranks' losses and gets a gradient from there too, as if the sum of all ranks' losses had been computed in
    one place. Every rank must take part, even without a question. The matrix of similarities exists only in
    tiles. A row of zeros stands for no question: it is nobody's negative, and its own values mean nothing.

    Args:
        target, estimate: pooled hidden states [B, D], float32 or float64.
        temperature: divides the cosines.
        group: process group; None is the default group, or this process alone if there is none.

    Returns:
        mi, mi_bound (ln(B_global) - mi, nats), each [B].
    """
    anchors = torch.nn.functional.normalize(target.detach(), dim=-1)
    candidates = torch.nn.functional.normalize(estimate, dim=-1)
    if _world_size(group) > 1:
        candidates, first = _GatherRows.apply(candidates, group)
    else:
        first = 0
    there = candidates.detach().any(-1)
    absent = torch.zeros_like(candidates[:, 0]).masked_fill(~there, float("-inf"))
    loss = _TiledInfoNCE.apply(anchors, candidates, absent, first, temperature)
    bound = there.sum().clamp_min(1).to(loss.dtype).log() - loss.detach()
    return {"mi": loss, "mi_bound": bound}


def _world_size(group: Any) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def _count_device(group: Any, device: torch.device) -> torch.device:
    """Where ranks tell each other how many rows they have: between hosts, if the group can, so that none
    waits for its device."""
    return torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device


class _GatherRows(torch.autograd.Function):
    """Concatenate the ranks' rows [B_rank, D] in rank order; the gradient is summed over ranks and cut again.

    B may differ between ranks: rows are padded to the largest B for the collective. Returns the
    [B_global, D] rows and the index of this rank's first.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, group: Any):
        world, device = dist.get_world_size(group), _count_device(group, rows.device)
        counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
        dist.all_gather(counts, torch.tensor([rows.shape[0]], device=device), group=group)
        counts = torch.cat(counts).tolist()
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: rows.shape[0]] = rows
        gathered = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(gathered, padded, group=group)
        ctx.group, ctx.count = group, rows.shape[0]
        ctx.first = sum(counts[: dist.get_rank(group)])
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)]), ctx.first

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, _):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient[ctx.first : ctx.first + ctx.count], None


class _TiledInfoNCE(torch.autograd.Function):
    """Losses [B] of anchors [B, D] whose positives are candidates[first : first + B] of [B_global, D].

    `absent` [B_global] is added to each anchor's similarities: -inf for a candidate that is none, else 0.
    Similarities are made for as many anchors at a time as fit TILE_BYTES, and made again in the
    backward pass, so [B, B_global] is never whole in memory.
    """

    @staticmethod
    def forward(ctx, anchors: Tensor, candidates: Tensor, absent: Tensor, first: int, temperature: float):
        lse = anchors.new_empty(anchors.shape[0])
        for a, b in _tiles(anchors, candidates):
            lse[a:b] = torch.logsumexp((anchors[a:b] @ candidates.T / temperature).add_(absent), -1)
        # without any candidate it would be -inf, and the gradient no number
        lse.clamp_min_(torch.finfo(lse.dtype).min)
        positives = candidates[first : first + anchors.shape[0]]
        ctx.save_for_backward(anchors, candidates, absent, lse)
        ctx.first, ctx.temperature = first, temperature
        return lse - (anchors * positives).sum(-1) / temperature

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        anchors, candidates, absent, lse = ctx.saved_tensors
        need_anchors, need_candidates = ctx.needs_input_grad[:2]
        d_anchors = torch.zeros_like(anchors) if need_anchors else None
        d_candidates = torch.zeros_like(candidates) if need_candidates else None
        scale = gradient / ctx.temperature
        for a, b in _tiles(anchors, candidates):
            # d loss / d similarity = softmax - [the positive], times the row's upstream gradient
            weights = (anchors[a:b] @ candidates.T).div_(ctx.temperature).add_(absent)
            weights.sub_(lse[a:b, None]).exp_()
            weights.mul_(scale[a:b, None])
            weights.diagonal(ctx.first + a).sub_(scale[a:b])
            if need_anchors:
                d_anchors[a:b] = weights @ candidates
            if need_candidates:
                d_candidates.addmm_(weights.T, anchors[a:b])
        return d_anchors, d_candidates, None, None, None


def _tiles(anchors: Tensor, candidates: Tensor) -> list[tuple[int, int]]:
    rows = max(1, TILE_BYTES // (anchors.element_size() * max(candidates.shape[0], 1)))
    return [(a, min(a + rows, anchors.shape[0])) for a in range(0, anchors.shape[0], rows)]
