"""Estimators on pooled hidden states: no logits in them, so plain autograd does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ibdistill.ops.head_loss.arguments import MISettings, Stream
from ibdistill.ops.head_loss.estimators import ESTIMATORS, pool_states
from ibdistill.ops.head_loss.packing import pack


# its collectives and loops over questions are nothing for a compiler: torch.compile breaks the graph here
@torch.compiler.disable
def state_terms(predict: Stream, explain: Stream, mi: MISettings, group: Any) -> dict[str, Tensor]:
    """Terms of the estimator, sums over questions with positions in both streams; mi has gradients."""
    rows = pack(predict, explain)
    dtype = torch.float64 if predict.hidden.dtype == torch.float64 else torch.float32
    states = torch.cat([predict.hidden, explain.hidden])[rows.order].to(dtype)
    questions = [(p, e, end) for p, e, end in rows.bounds if p < e < end]
    pooled = {
        "predict": [pool_states(states[p:e], mi.pool) for p, e, _ in questions],
        "explain": [pool_states(states[e:end], mi.pool) for _, e, end in questions],
    }
    # also with no question of our own: the other ranks wait for our part of the collective
    stacked = {name: torch.stack(parts) if parts else states[:0] for name, parts in pooled.items()}
    terms: dict[str, Tensor] = {}
    for target, estimate in mi.directions:
        values = ESTIMATORS[mi.estimator].function(
            stacked[target].detach(), stacked[estimate], temperature=mi.temperature, group=group
        )
        for name, value in values.items():
            terms[name] = terms.get(name, 0) + value.sum() / len(mi.directions)
    return terms | {"mi_questions": states.new_tensor(float(len(questions)))}
