"""One forward for all streams, without the head.

The head loss works on packed hidden states, so a model's forward here ends before the head:
`states` gives the decoder's states at the real target positions of each segment. The streams of
an encoder-decoder model share one encoder call. Where rows are padded its decoder runs once per
stream, because a label is a few tokens long and a rationale a hundred, and padding one to the
other would cost more than a second call; packed rows go through it at once. A decoder-only
model, whose rows hold the question too, runs once for all. All of it happens within one
`engine(...)`, so ZeRO-3 sees the same sequence of modules in each step and its prefetch trace
completes. With a call of the engine for each stream, as in the reference implementation, it
would not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ibdistill.data.batches import Batch
from ibdistill.data.records import SEGMENTS
from ibdistill.models.architectures import ENCODER_DECODER, family, state_factor
from ibdistill.models.families import base_of
from ibdistill.models.sequence_parallel import together
from ibdistill.ops import packed_attention


@dataclass(frozen=True)
class States:
    """A model's final hidden states of a batch, before its head."""

    targets: dict[str, Tensor]
    """Segment -> [N_segment, D] final hidden states at the packed target positions, ready for the head;
    empty if they were not asked for."""
    questions: Tensor
    """[N_question, D] final hidden states of the first stream's question tokens."""
    bottleneck: tuple[Tensor, ...] = ()
    """What a bottleneck returned besides the states."""


def states(
    model: nn.Module, batch: Batch, *, targets: bool = True, bottleneck: nn.Module | None = None
) -> States:
    """One forward of all streams, without the head; without `targets` only as much as the questions need.

    `bottleneck` stands between encoder and decoder. It is called with the encoder's states [S * B, L, D] and
    their mask, and returns a tuple: first what the decoder is to see in their place, then anything more.

    Padded positions come last in their row, so under the causal mask no real position sees
    them. A decoder therefore needs no mask of its own, and its positions count from the row's start. In a
    packed row positions restart with each sequence, and the sequences' lengths stand for the mask.
    """
    base = base_of(model)
    if not targets and batch.ranks == 1:  # other ranks read on where this one's part ends
        batch = questions_only(batch)
    if family(base) == ENCODER_DECODER:
        return _encoder_decoder(base, batch, bottleneck)
    return _decoder_only(base, batch)


def questions_only(batch: Batch) -> Batch:
    """The batch without targets, and with the rows of the first stream alone."""
    if batch.row_lengths is not None:
        own = batch.row_lengths[: len(batch.row_lengths) // len(batch.streams)]
        tokens = int(own.sum())
        kept = {
            "input_ids": batch.input_ids[:, :tokens],
            "attention_mask": batch.attention_mask[:, :tokens],
            "row_lengths": own,
            "position_ids": None if batch.position_ids is None else batch.position_ids[:, :tokens],
            "decoder_lengths": None,
        }
    else:
        rows = len(batch.input_ids) // len(batch.streams)
        kept = {"input_ids": batch.input_ids[:rows], "attention_mask": batch.attention_mask[:rows]}
    return replace(batch, streams=batch.streams[:1], decoder_input_ids={}, positions={}, **kept)


def _encoder_decoder(model: PreTrainedModel, batch: Batch, bottleneck: nn.Module | None) -> States:
    ids = [batch.input_ids, *batch.decoder_input_ids.values()]
    # one lookup for all inputs, because the gradient of each lookup is as large as the table
    embedded = model.get_input_embeddings()(torch.cat([part.flatten() for part in ids]))
    questions, *rest = (
        rows.unflatten(0, part.shape)
        for rows, part in zip(embedded.split([part.numel() for part in ids]), ids, strict=True)
    )
    mask = batch.attention_mask if batch.row_lengths is None else packed_attention.as_mask(batch.row_lengths)
    encoded = model.get_encoder()(inputs_embeds=questions, attention_mask=mask)[0]
    seen, *more = (encoded,) if bottleneck is None else bottleneck(encoded, batch.attention_mask)
    found = encoded.flatten(0, 1).index_select(0, batch.question_positions)
    decode = _decode_padded if batch.decoder_lengths is None else _decode_packed
    return States(decode(model, batch, rest, seen) if rest else {}, found, tuple(more))


def _decode_packed(
    model: PreTrainedModel, batch: Batch, inputs: list[Tensor], seen: Tensor
) -> dict[str, Tensor]:
    """The targets' states of all streams, whose sequences lie in one row."""
    decoded = model.get_decoder()(
        inputs_embeds=torch.cat(inputs, 1),
        attention_mask=packed_attention.as_mask(batch.decoder_lengths),
        encoder_hidden_states=seen,
        encoder_attention_mask=packed_attention.as_mask(batch.decoder_lengths, batch.row_lengths),
        use_cache=False,
    )[0][0]
    return {s: _for_head(decoded.index_select(0, places), model) for s, places in batch.positions.items()}


def _decode_padded(
    model: PreTrainedModel, batch: Batch, rest: list[Tensor], seen: Tensor
) -> dict[str, Tensor]:
    """The targets' states, of one stream after the other."""
    targets = {}
    for index, (stream, inputs) in enumerate(zip(batch.decoder_input_ids, rest, strict=True)):
        rows = slice(index * len(inputs), (index + 1) * len(inputs))
        decoded = model.get_decoder()(
            inputs_embeds=inputs,
            encoder_hidden_states=seen[rows],
            encoder_attention_mask=batch.attention_mask[rows],
            use_cache=False,
        )[0]
        for segment in SEGMENTS[stream]:
            hidden = decoded.flatten(0, 1).index_select(0, batch.positions[segment])
            targets[segment] = _for_head(hidden, model)
    return targets


def _decoder_only(model: PreTrainedModel, batch: Batch) -> States:
    packed = batch.row_lengths is not None
    seen = _packed_arguments(batch) if packed else {"attention_mask": no_padding(batch.input_ids)}
    hidden = model.get_decoder()(input_ids=batch.input_ids, use_cache=False, **seen)[0]
    # positions count within a stream's rows, but within the whole of a packed row
    parts = [hidden] * len(batch.streams) if packed else hidden.chunk(len(batch.streams))
    of_stream = dict(zip(batch.streams, parts, strict=True))
    targets = {
        segment: together(
            _for_head(rows.flatten(0, 1).index_select(0, batch.positions[segment]), model), batch, segment
        )
        for stream, rows in of_stream.items()
        for segment in SEGMENTS[stream]
        if segment in batch.positions
    }
    questions = hidden.flatten(0, 1).index_select(0, batch.question_positions)
    return States(targets, together(questions, batch, "questions"))


def no_padding(input_ids: Tensor) -> Tensor:
    """[B, L] bool: a mask without padding, one value in memory, which `fused` tells by that.

    Without any mask transformers would ask the device whether the positions are those of packed rows.
    """
    return torch.ones((), dtype=torch.bool, device=input_ids.device).expand(input_ids.shape)


def _packed_arguments(batch: Batch) -> dict[str, Tensor]:
    """What a decoder reads beside a packed row: positions that restart, and lengths in the mask's place."""
    mask = packed_attention.as_mask(batch.row_lengths, is_part=batch.ranks > 1)
    return {"position_ids": batch.position_ids, "attention_mask": mask}


def _for_head(hidden: Tensor, model: PreTrainedModel) -> Tensor:
    """Final states [N, D] as the head takes them: with the factor that the model gives its logits."""
    factor = state_factor(model.config)
    return hidden if factor == 1 else hidden * factor
