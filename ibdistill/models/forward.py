"""One forward for both streams, without the head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ibdistill.data.batches import Batch
from ibdistill.models.families import ENCODER_DECODER, base_of, family


@dataclass(frozen=True)
class States:
    """What a model says about a batch, before its head."""

    targets: dict[str, Tensor]
    """Stream -> [N_stream, D] final hidden states at the packed target positions, ready for the head;
    empty if they were not asked for."""
    questions: Tensor
    """[N_question, D] states of the predict stream's question tokens."""
    bottleneck: tuple[Tensor, ...] = ()
    """What a bottleneck returned besides the states."""


def states(
    model: nn.Module, batch: Batch, *, targets: bool = True, bottleneck: nn.Module | None = None
) -> States:
    """One forward of both streams, without the head. Without `targets` only what the questions need.

    `bottleneck`, for an encoder-decoder model, stands between the two: called with the encoder's states
    [S * B, L, D] and their mask it returns what the decoder is to see in their place, and more.

    Padded positions come last in their row, so under the causal mask no real position sees
    them: a decoder needs no mask of its own, and positions count from the row's start.
    """
    base = base_of(model)
    batch = batch if targets else questions_only(batch)
    if family(base) == ENCODER_DECODER:
        return _encoder_decoder(base, batch, bottleneck)
    return _decoder_only(base, batch)


def questions_only(batch: Batch) -> Batch:
    """The rows of the predict stream, which are the first, and no target positions."""
    rows = len(batch.input_ids) // len(batch.positions)
    return replace(
        batch,
        input_ids=batch.input_ids[:rows],
        attention_mask=batch.attention_mask[:rows],
        decoder_input_ids={},
        positions={},
    )


def _encoder_decoder(model: PreTrainedModel, batch: Batch, bottleneck: nn.Module | None) -> States:
    ids = [batch.input_ids, *batch.decoder_input_ids.values()]
    # one lookup: the gradient of each is as large as the table
    embedded = model.get_input_embeddings()(torch.cat([part.flatten() for part in ids]))
    questions, *rest = (
        rows.unflatten(0, part.shape)
        for rows, part in zip(embedded.split([part.numel() for part in ids]), ids, strict=True)
    )
    encoded = model.get_encoder()(inputs_embeds=questions, attention_mask=batch.attention_mask)[0]
    seen, *more = (encoded,) if bottleneck is None else bottleneck(encoded, batch.attention_mask)
    targets = {}
    for index, (stream, inputs) in enumerate(zip(batch.decoder_input_ids, rest, strict=True)):
        rows = slice(index * len(inputs), (index + 1) * len(inputs))
        decoded = model.get_decoder()(
            inputs_embeds=inputs,
            encoder_hidden_states=seen[rows],
            encoder_attention_mask=batch.attention_mask[rows],
            use_cache=False,
        )[0]
        hidden = decoded.flatten(0, 1).index_select(0, batch.positions[stream])
        # T5 with tied embeddings scales what goes into the head
        scales = getattr(model.config, "scale_decoder_outputs", False)
        targets[stream] = hidden * model.config.d_model**-0.5 if scales else hidden
    return States(targets, encoded.flatten(0, 1).index_select(0, batch.question_positions), tuple(more))


def _decoder_only(model: PreTrainedModel, batch: Batch) -> States:
    hidden = model.get_decoder()(input_ids=batch.input_ids, use_cache=False)[0]
    of_stream = dict(zip(batch.positions, hidden.chunk(len(batch.positions) or 1), strict=False))
    targets = {
        stream: rows.flatten(0, 1).index_select(0, batch.positions[stream])
        for stream, rows in of_stream.items()
    }
    return States(targets, hidden.flatten(0, 1).index_select(0, batch.question_positions))
