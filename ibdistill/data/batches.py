"""From records to batches: token tables, packed targets, rows for either family of models.

Questions and targets are tokenized apart, so both families and every teacher of the same
vocabulary see the same target tokens and the same question tokens.

An encoder-decoder model reads the question, end token included. A decoder-only model reads
`[BOS] question separator target` in one row:

- BOS is there if the tokenizer by itself puts one in front of a text, as the model was then
  pretrained with it. An encoder-decoder model's question has one on the same condition.
- The separator stands where an end token stands in the other family, so the
  question tokens of both families pair up one to one. It is the newline token where the
  vocabulary has one, else the end token. Something has to tell the model that the question is
  over; the end token is what pretrained decoder-only models have seen *between unrelated
  texts*, after which they forget, while a line break before an answer is ordinary text.
- Prompts are built by `id_rows.prompt` alone, in training and in decoding, from the ids that `token_ids`
  gives: tokenizing the joined text would merge `?` and newline into one token in many vocabularies (Qwen's).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ibdistill.data import id_rows
from ibdistill.data.features import Features
from ibdistill.data.records import SEGMENTS, segments_of
from ibdistill.ops.copies import to_device

logger = logging.getLogger("ibdistill")

TokenIds = dict[str, list[np.ndarray]]
"""Stream or segment -> token ids of each record."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B questions, S streams. Targets are packed: N tokens in all, no padding.

    The rows of all streams are stacked in the order of `streams`, so that one call serves all: of the
    encoder, or of a decoder-only model, whose rows hold the targets too. Padding is on the right.
    """

    streams: tuple[str, ...]
    question_ids: tuple[str, ...]
    input_ids: Tensor
    """[S * B, L] int64."""
    attention_mask: Tensor
    """[S * B, L] int64, 1 at real tokens and 0 at padding."""
    question_positions: Tensor
    """[N_question] int64: where the first stream's question tokens sit in its flattened [B * L], or in a
    packed row.

    The same tokens in the same order for both families: BOS is left out, and the separator of
    a decoder-only model stands for the end token of the other family."""
    decoder_input_ids: dict[str, Tensor]
    """Stream -> [B, T_stream] int64, targets shifted right behind the start token; in a packed batch
    [1, tokens]. Decoder-only: empty."""
    positions: dict[str, Tensor]
    """Segment -> [N_segment] int64: the places that predict the targets, in the flattened [B * T_stream] of
    the decoder; for a decoder-only model in the flattened [B * L] of the stream's rows. In a packed batch: in
    the row of all streams."""
    labels: dict[str, Tensor]
    """Segment -> [N_segment] int64."""
    cu: dict[str, Tensor]
    """Segment -> [B + 1] int32: question b's targets are `labels[cu[b]:cu[b + 1]]`."""
    own: int | None = None
    """How many questions, the last ones, have text of the student's own in the place of the rationale (and of
    the answer behind it); None: no record of the run has."""
    row_lengths: Tensor | None = None
    """[S * B] int32, if the batch is packed: `input_ids` are then one row [1, tokens] in which the rows lie
    one behind the other with these lengths, and `attention_mask` is all ones. None: rows are padded."""
    position_ids: Tensor | None = None
    """[1, tokens] int64, for a decoder-only model if the batch is packed: each token's place within its own
    row."""
    decoder_lengths: Tensor | None = None
    """[S * B] int32, for an encoder-decoder model if the batch is packed: the lengths of the targets, which
    lie one behind the other in `decoder_input_ids`, one stream after the other."""
    ranks: int = 1
    """Over how many ranks the packed row is cut. Above 1 this is one of the parts
    (`models.sequence_parallel.part_of`), and `row_lengths` are those of the whole row."""
    exchanges: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    """Segment, or `questions` -> how many states of it go to each of these ranks, and come from each, so that
    every question's come together on one; `labels` and `cu` are of what is there then. Empty: none do."""

    @property
    def num_tokens(self) -> int:
        """Real (unpadded) tokens that enter the model: questions and targets."""
        decoded = sum(len(self.labels[segment]) for segment in segments_of(self.decoder_input_ids))
        return int(self.attention_mask.sum()) + decoded

    @property
    def num_positions(self) -> int:
        """Positions that the model computes, padding included."""
        return self.input_ids.numel() + sum(ids.numel() for ids in self.decoder_input_ids.values())

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, except for `cu` and the lengths, which the host reads.

        The copy overlaps with what the device is doing.
        """
        if device.type == "cpu":
            return self
        return self.mapped(lambda tensor: to_device(tensor, device))

    def pinned(self) -> Batch:
        """The batch in memory that a GPU can read by itself, which is where `to` would copy it first."""
        return self.mapped(Tensor.pin_memory)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with this done to all its tensors but `cu` and the lengths, which the host reads."""

        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: changed(tensor) for key, tensor in value.items()}
            return function(value) if isinstance(value, Tensor) else value

        names = {f.name for f in dataclasses.fields(self)} - {"cu", "row_lengths", "decoder_lengths"}
        return dataclasses.replace(self, **{name: changed(getattr(self, name)) for name in names})


def collate(
    features: Features,
    indices: Sequence[int],
    streams: Sequence[str],
    *,
    pad: int,
    start: int | None,
    bos: int | None = None,
    separator: int | None = None,
    multiple: int = 1,
    packed: bool = False,
) -> Batch:
    """The micro-batch of the records with these indices.

    `models.families.layout` gives a model's keyword arguments.

    Args:
        pad: the padding token.
        start: the decoder's start token; for a decoder-only model its BOS, or None.
        bos: what an encoder-decoder model's questions begin with; None for most, and for a decoder-only
            model.
        separator: what stands between question and target for a decoder-only model; None for
            an encoder-decoder model.
        multiple: rows are padded to a width that is a multiple of this, see `hardware.width_multiple`.
        packed: lay rows one behind the other, without padding.

    Of features whose questions are whole prompts, nothing comes in front of a prompt or behind it.
    """
    questions = {stream: [features.questions[stream][i] for i in indices] for stream in streams}
    segments = segments_of(streams)
    targets = {segment: [features.targets[segment][i] for i in indices] for segment in segments}
    if features.whole_prompts:
        inputs = _decoder_only(questions, targets, pad, None, None, multiple, packed)
    elif separator is None:
        inputs = _encoder_decoder(questions, targets, pad, start, bos, multiple, packed)
    else:
        inputs = _decoder_only(questions, targets, pad, start, separator, multiple, packed)
    own = None if features.own is None else features.own[list(indices)]
    assert own is None or (np.diff(own.astype(int)) >= 0).all(), "own text comes last (OnPolicySampler)"
    return Batch(
        streams=tuple(streams),
        own=None if own is None else int(own.sum()),
        question_ids=tuple(features.ids[i] for i in indices),
        labels={segment: torch.from_numpy(np.concatenate(targets[segment])).long() for segment in segments},
        cu={
            segment: torch.tensor(np.cumsum([0, *map(len, targets[segment])]), dtype=torch.int32)
            for segment in segments
        },
        **inputs,
    )


def _encoder_decoder(
    questions: TokenIds, targets: TokenIds, pad: int, start: int, bos: int | None, multiple: int, packed: bool
) -> dict[str, Any]:
    rows = [id_rows.with_bos(row, bos) for rows in questions.values() for row in rows]
    input_ids, attention_mask, begins = id_rows.lay_out(rows, pad, multiple, packed)
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    decoder_input_ids, positions, decoded, before = {}, {}, [], 0
    for stream in questions:
        targeted = _whole(targets, stream)
        shifted = [np.concatenate([[start], target[:-1]]) if len(target) else target for target in targeted]
        decoder_input_ids[stream], mask, starts = id_rows.lay_out(shifted, pad, multiple, packed)
        positions |= _segment_places(targets, stream, starts + before)
        if packed:  # all streams are read as one row
            lengths_of_stream = [len(target) for target in shifted]
            lengths_of_stream[-1] += mask.shape[1] - sum(
                lengths_of_stream
            )  # a column where there is no target
            decoded += lengths_of_stream
            before += mask.shape[1]
    first = next(iter(questions.values()))
    of_packed = {"row_lengths": torch.from_numpy(lengths), "decoder_lengths": torch.tensor(decoded).int()}
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "question_positions": id_rows.places(
            begins[: len(first)] + int(bos is not None), [len(row) for row in first]
        ),
        "decoder_input_ids": decoder_input_ids,
        "positions": positions,
        **(of_packed if packed else {}),
    }


def _decoder_only(
    questions: TokenIds,
    targets: TokenIds,
    pad: int,
    bos: int | None,
    separator: int | None,
    multiple: int,
    packed: bool,
) -> dict[str, Any]:
    """Rows of prompt and target; the last target token is predicted, never read."""
    prompts = {s: [id_rows.prompt(question, bos, separator) for question in questions[s]] for s in questions}
    rows = [
        np.concatenate([prompt, target[:-1]])
        for stream in prompts
        for prompt, target in zip(prompts[stream], _whole(targets, stream), strict=True)
    ]
    input_ids, attention_mask, begins = id_rows.lay_out(rows, pad, multiple, packed)
    first, positions = next(iter(prompts.values())), {}
    size, lead = len(first), int(bos is not None)
    for number, (stream, own) in enumerate(prompts.items()):
        # a packed row is shared by all streams; padded rows are numbered within their own
        starts = begins[number * size :][:size] if packed else begins[:size]
        positions |= _segment_places(targets, stream, starts + [len(prompt) - 1 for prompt in own])
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "question_positions": id_rows.places(begins[:size] + lead, [len(p) - lead for p in first]),
        "decoder_input_ids": {},
        "positions": positions,
        **(_of_packed(rows) if packed else {}),
    }


def _of_packed(rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    places = torch.cat([torch.arange(len(row)) for row in rows])
    return {"row_lengths": lengths, "position_ids": places[None]}


def _whole(targets: TokenIds, stream: str) -> list[np.ndarray]:
    """Each record's target of a stream: its segments one after the other."""
    segments = [targets[segment] for segment in SEGMENTS[stream]]
    return (
        segments[0]
        if len(segments) == 1
        else [np.concatenate(parts) for parts in zip(*segments, strict=True)]
    )


def _segment_places(targets: TokenIds, stream: str, starts: np.ndarray) -> dict[str, Tensor]:
    """Segment -> the places that predict its tokens in a stream's flattened rows.

    `starts`: the place that predicts each target's first token.
    """
    places = {}
    for segment in SEGMENTS[stream]:
        lengths = [len(target) for target in targets[segment]]
        places[segment] = id_rows.places(starts, lengths)
        starts = starts + lengths
    return places
