"""Estimators on pooled hidden states. They need no logits, so plain autograd differentiates them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ibdistill.ops.head_loss.arguments import MISettings, Stream
from ibdistill.ops.head_loss.estimators import ESTIMATORS, pool_states
from ibdistill.ops.head_loss.packing import pack


# a compiler can do nothing with collectives and loops over questions, so torch.compile breaks the graph here
@torch.compiler.disable
def state_terms(predict: Stream, explain: Stream, mi: MISettings, group: Any) -> dict[str, Tensor]:
    """The estimator's terms, summed over questions with positions in both streams; mi has gradients."""
    rows = pack(predict, explain)
    dtype = torch.float64 if predict.hidden.dtype == torch.float64 else torch.float32
    states = torch.cat([predict.hidden, explain.hidden])[rows.order].to(dtype)
    questions = [(p, e, end) for p, e, end in rows.bounds if p < e < end]
    pooled = {
        "predict": [pool_states(states[p:e], mi.pool) for p, e, _ in questions],
        "explain": [pool_states(states[e:end], mi.pool) for _, e, end in questions],
    }
    # A rank without a question goes on too, because the other ranks wait for its part of the collective.
    stacked = {name: torch.stack(parts) if parts else states[:0] for name, parts in pooled.items()}
    terms: dict[str, Tensor] = {}
    for target, estimate in mi.directions:
        values = ESTIMATORS[mi.estimator].function(
            stacked[target].detach(), stacked[estimate], temperature=mi.temperature, group=group
        )
        for name, value in values.items():
            terms[name] = terms.get(name, 0) + value.sum() / len(mi.directions)
    return terms | {"mi_questions": states.new_tensor(float(len(questions)))}
