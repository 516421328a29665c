"""A tiny T5, and the loss that transformers itself computes for it."""

from __future__ import annotations

import torch

from ibdistill.data import batches

SHAPE = dict(
    vocab_size=20_000, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0
)


def two_forwards(model, batch: batches.Batch, stream: str) -> torch.Tensor:
    """transformers' own mean loss of one stream on padded labels."""
    index = list(batch.decoder_input_ids).index(stream)
    size = len(batch.question_ids)
    rows = slice(index * size, (index + 1) * size)
    labels = torch.full(batch.decoder_input_ids[stream].shape, -100).flatten()
    labels[batch.positions[stream]] = batch.labels[stream]
    return model(
        input_ids=batch.input_ids[rows],
        attention_mask=batch.attention_mask[rows],
        labels=labels.view(size, -1),
    ).loss
