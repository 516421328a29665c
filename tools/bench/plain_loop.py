"""The loss of a plain transformers script for the two streams, as the reference computes it.

The reference is the published implementation of Chen et al., Findings of ACL 2024, arXiv 2403.03348.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ibdistill.config import sections
from ibdistill.data.features import Features
from ibdistill.data.records import STREAMS

PAD, IGNORED = 0, -100


def plain_batch(features: Features, rows: np.ndarray) -> dict[str, dict[str, torch.Tensor]]:
    """The arguments of a transformers forward pass for each stream, [B, S] int64 each, on the CPU."""
    batch = {}
    for stream in STREAMS:
        parts = [features.questions[stream], features.targets[stream]]
        ids, labels = ([torch.from_numpy(part[row]).long() for row in rows] for part in parts)
        batch[stream] = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }
    return batch


def plain_loss(model, batch, objective: sections.ObjectiveConfig, pool_padding: bool = True) -> torch.Tensor:
    """The reference's loss, a scalar. With `pool_padding` its pool sees padded positions too, as there."""
    batch = {
        stream: {name: ids.to(model.device) for name, ids in arguments.items()}
        for stream, arguments in batch.items()
    }
    outputs = {stream: model(**arguments) for stream, arguments in batch.items()}
    loss = objective.alpha * outputs["predict"].loss + (1 - objective.alpha) * outputs["explain"].loss
    if objective.method != "ib":
        return loss
    pooled = []
    for stream, output in outputs.items():
        p = torch.softmax(output.logits, -1)
        if not pool_padding:
            p = p.masked_fill(batch[stream]["labels"][..., None] == IGNORED, 0)
        pooled.append(p.max(1).values)
    return loss + objective.beta * nn.functional.cross_entropy(pooled[1], pooled[0].detach())
