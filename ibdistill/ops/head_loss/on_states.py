"""Estimators on pooled hidden states. They need no logits, so plain autograd differentiates them.

The host does not wait for the device: which positions are ignored, and so which questions have positions in
both streams, is not asked but stays a mask.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ibdistill.ops.copies import to_device
from ibdistill.ops.head_loss.arguments import IGNORED, MISettings, Stream
from ibdistill.ops.head_loss.estimators import ESTIMATORS


# a compiler can do nothing with collectives and loops over questions, so torch.compile breaks the graph here
@torch.compiler.disable
def state_terms(predict: Stream, explain: Stream, mi: MISettings, group: Any) -> dict[str, Tensor]:
    """The estimator's terms, summed over questions with positions in both streams; mi has gradients."""
    counts = {name: _counts(stream) for name, stream in (("predict", predict), ("explain", explain))}
    both = (counts["predict"] > 0) & (counts["explain"] > 0)
    pooled = {
        name: torch.where(both[:, None], _pooled(stream, counts[name], mi.pool), 0.0)
        for name, stream in (("predict", predict), ("explain", explain))
    }
    terms: dict[str, Tensor] = {}
    for target, estimate in mi.directions:
        values = ESTIMATORS[mi.estimator].function(
            pooled[target].detach(), pooled[estimate], temperature=mi.temperature, group=group
        )
        for name, value in values.items():
            total = torch.where(both, value, 0.0).sum()
            terms[name] = terms.get(name, 0) + total / len(mi.directions)
    return terms | {"mi_questions": both.sum().to(pooled["predict"].dtype)}


def _counts(stream: Stream) -> Tensor:
    """[B] int64: each question's positions that are not ignored."""
    seen = torch.nn.functional.pad((stream.labels != IGNORED).cumsum(0), (1, 0))
    return seen[to_device(stream.cu.long(), seen.device)].diff()


def _pooled(stream: Stream, counts: Tensor, pool: str) -> Tensor:
    """[B, D]: each question's states, pooled over its positions that are not ignored; any value without."""
    dtype = torch.float64 if stream.hidden.dtype == torch.float64 else torch.float32
    outside = float("-inf") if pool == "max" else 0.0
    states = stream.hidden.to(dtype).masked_fill((stream.labels == IGNORED)[:, None], outside)
    # a sum of no rows is zeros of the graph: without any, a rank still takes part in the backward pass
    parts = [
        states[a:b].max(0).values if pool == "max" and a < b else states[a:b].sum(0)
        for a, b in itertools.pairwise(stream.cu.tolist())
    ]
    rows = torch.stack(parts) if parts else states[:0]
    return rows if pool == "max" else rows / counts.clamp_min(1)[:, None]
