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
- Prompts are built by `_prompt` alone, in training and in decoding, from the ids that `token_ids`
  gives: tokenizing the joined text would merge `?` and newline into one token in many vocabularies (Qwen's).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ibdistill.data import token_ids
from ibdistill.data.features import Features
from ibdistill.data.records import SEGMENTS, segments_of
from ibdistill.ops.copies import to_device

logger = logging.getLogger("ibdistill")

Rows = dict[str, list[np.ndarray]]
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
    """Stream -> [B, T_stream] int64, targets shifted right behind the start token. Decoder-only: empty."""
    positions: dict[str, Tensor]
    """Segment -> [N_segment] int64: the places that predict the targets, in the flattened [B * T_stream] of
    the decoder; for a decoder-only model in the flattened [B * L] of the stream's rows, or in the packed row
    of all streams."""
    labels: dict[str, Tensor]
    """Segment -> [N_segment] int64."""
    cu: dict[str, Tensor]
    """Segment -> [B + 1] int32: question b's targets are `labels[cu[b]:cu[b + 1]]`."""
    row_lengths: Tensor | None = None
    """[S * B] int32, if the batch is packed: `input_ids` are then one row [1, tokens] in which the rows lie
    one behind the other with these lengths, and `attention_mask` is all ones. None: rows are padded."""
    position_ids: Tensor | None = None
    """[1, tokens] int64, if the batch is packed: each token's place within its own row."""

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
        """The batch on a device, except for `cu` and `row_lengths`, which the host reads.

        The copy overlaps with what the device is doing.
        """
        if device.type == "cpu":
            return self
        return self._mapped(lambda tensor: to_device(tensor, device))

    def pinned(self) -> Batch:
        """The batch in memory that a GPU can read by itself, which is where `to` would copy it first."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with this done to all its tensors but `cu` and `row_lengths`."""

        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: changed(tensor) for key, tensor in value.items()}
            return function(value) if isinstance(value, Tensor) else value

        fields = {f.name: changed(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return Batch(**fields | {"cu": self.cu, "row_lengths": self.row_lengths})


def collate(
    features: Features,
    rows: Sequence[int],
    streams: Sequence[str],
    *,
    pad: int,
    start: int | None,
    bos: int | None = None,
    separator: int | None = None,
    multiple: int = 1,
    packed: bool = False,
) -> Batch:
    """The micro-batch of the records `rows`. `models.families.layout` gives a model's keyword arguments.

    Args:
        pad: the padding token.
        start: the decoder's start token; for a decoder-only model its BOS, or None.
        bos: what an encoder-decoder model's questions begin with; None for most, and for a decoder-only
            model.
        separator: what stands between question and target for a decoder-only model; None for
            an encoder-decoder model.
        multiple: rows are padded to a width that is a multiple of this, see `hardware.width_multiple`.
        packed: lay the rows of a decoder-only model one behind the other, without padding.

    Of features whose questions are whole prompts, nothing comes in front of a prompt or behind it.
    """
    questions = {stream: [features.questions[stream][row] for row in rows] for stream in streams}
    segments = segments_of(streams)
    targets = {segment: [features.targets[segment][row] for row in rows] for segment in segments}
    if features.whole_prompts:
        inputs = _decoder_only(questions, targets, pad, None, None, multiple, packed)
    elif separator is None:
        assert not packed
        inputs = _encoder_decoder(questions, targets, pad, start, bos, multiple)
    else:
        inputs = _decoder_only(questions, targets, pad, start, separator, multiple, packed)
    return Batch(
        streams=tuple(streams),
        question_ids=tuple(features.ids[row] for row in rows),
        labels={segment: torch.from_numpy(np.concatenate(targets[segment])).long() for segment in segments},
        cu={
            segment: torch.tensor(np.cumsum([0, *map(len, targets[segment])]), dtype=torch.int32)
            for segment in segments
        },
        **inputs,
    )


def _encoder_decoder(
    questions: Rows, targets: Rows, pad: int, start: int, bos: int | None, multiple: int
) -> dict[str, Any]:
    rows = [_led(row, bos) for rows in questions.values() for row in rows]
    input_ids, attention_mask = _pad(rows, pad, multiple=multiple)
    lead = int(bos is not None)
    decoder_input_ids, positions = {}, {}
    for stream in questions:
        rows = _whole(targets, stream)
        shifted = [np.concatenate([[start], target[:-1]]) if len(target) else target for target in rows]
        decoder_input_ids[stream], mask = _pad(shifted, pad, multiple=multiple)
        positions |= _segment_places(targets, stream, np.arange(len(rows)) * mask.shape[1])
    first = next(iter(questions.values()))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "question_positions": _places(
            np.arange(len(first)) * input_ids.shape[1] + lead, [len(row) for row in first]
        ),
        "decoder_input_ids": decoder_input_ids,
        "positions": positions,
    }


def _decoder_only(
    questions: Rows,
    targets: Rows,
    pad: int,
    bos: int | None,
    separator: int | None,
    multiple: int,
    packed: bool,
) -> dict[str, Any]:
    """Rows of prompt and target; the last target token is predicted, never read."""
    prompts = {s: [_prompt(question, bos, separator) for question in questions[s]] for s in questions}
    rows = [
        np.concatenate([prompt, target[:-1]])
        for stream in prompts
        for prompt, target in zip(prompts[stream], _whole(targets, stream), strict=True)
    ]
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    input_ids, attention_mask = (
        _pad([np.concatenate(rows)], pad) if packed else _pad(rows, pad, multiple=multiple)
    )
    first, positions = next(iter(prompts.values())), {}
    size, lead = len(first), int(bos is not None)
    begins = np.cumsum(lengths) - lengths if packed else np.arange(len(rows)) * input_ids.shape[1]
    for number, (stream, own) in enumerate(prompts.items()):
        # a packed row is shared by all streams; padded rows are numbered within their own
        starts = begins[number * size :][:size] if packed else begins[:size]
        positions |= _segment_places(targets, stream, starts + [len(prompt) - 1 for prompt in own])
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "question_positions": _places(begins[:size] + lead, [len(p) - lead for p in first]),
        "decoder_input_ids": {},
        "positions": positions,
        **(_of_packed(lengths) if packed else {}),
    }


def _of_packed(lengths: np.ndarray) -> dict[str, Tensor]:
    places = np.concatenate([np.arange(length) for length in lengths])
    return {"row_lengths": torch.from_numpy(lengths), "position_ids": torch.from_numpy(places)[None]}


def _whole(targets: Rows, stream: str) -> list[np.ndarray]:
    """Each record's target of a stream: its segments one after the other."""
    segments = [targets[segment] for segment in SEGMENTS[stream]]
    return (
        segments[0]
        if len(segments) == 1
        else [np.concatenate(parts) for parts in zip(*segments, strict=True)]
    )


def _segment_places(targets: Rows, stream: str, starts: np.ndarray) -> dict[str, Tensor]:
    """Segment -> the places that predict its tokens in a stream's flattened rows.

    `starts`: the place that predicts each target's first token.
    """
    places = {}
    for segment in SEGMENTS[stream]:
        lengths = [len(target) for target in targets[segment]]
        places[segment] = _places(starts, lengths)
        starts = starts + lengths
    return places


def _places(starts: np.ndarray, counts: Sequence[int]) -> Tensor:
    """[positions] int64: of each row `count` places from its start on, in the flattened rows."""
    spans = zip(starts, counts, strict=True)
    return torch.from_numpy(np.concatenate([start + np.arange(count) for start, count in spans]))


def _prompt(question: Sequence[int], bos: int | None, separator: int | None) -> np.ndarray:
    """[tokens] int64: what a decoder-only model reads before the target.

    The separator takes the place of the question's end token, and of those between its parts; None: the
    question is the whole prompt.
    """
    question = np.asarray(question)
    if separator is None:
        return question.astype(np.int64)
    return _led(np.where(question == question[-1], separator, question), bos)


def _led(ids: Sequence[int], bos: int | None) -> np.ndarray:
    """[tokens] int64: the ids with BOS in front, if there is one."""
    return np.array([*([] if bos is None else [bos]), *ids], dtype=np.int64)


def prompts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    *,
    pad: int,
    start: int | None,
    bos: int | None = None,
    separator: int | None = None,
    as_written: bool = False,
) -> tuple[Tensor, Tensor]:
    """The rows that a model of either family answers, with the same ids as in its training rows.

    `limit` counts a question's tokens with the end token or separator, not BOS; longer ones lose their end.
    The other arguments are those of `collate`.

    Args:
        as_written: the texts are whole prompts made from `teacher.template`; a decoder-only model goes on
            where they end, without a separator.

    Returns ids and mask, [texts, longest] int64, padded on the left for a decoder-only model.
    """
    lead = bos if separator is None else start
    if as_written:
        encoded = token_ids.written_ids(texts, tokenizer, bos=lead)
    else:
        encoded = token_ids.question_ids(texts, tokenizer)
    questions = [token_ids.cut(ids, limit) for ids in encoded]
    if separator is None:
        return _pad([_led(ids, lead) for ids in questions], pad)
    if as_written:
        return _pad([_led(ids[:-1], lead) for ids in questions], pad, left=True)
    return _pad([_prompt(ids, lead, separator) for ids in questions], pad, left=True)


def whole_prompts(ids: Sequence[Sequence[int]], pad: int, *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Prompts as they are: ids and mask, [prompts, longest] int64, padded on the left as a decoder-only model
    needs, or on the right."""
    return _pad([np.asarray(row, dtype=np.int64) for row in ids], pad, left=left)


def _pad(
    sequences: Sequence[np.ndarray], pad: int, left: bool = False, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Ids and mask of real ones, both [rows, longest] int64, with the longest rounded up to a multiple; at
    least one column, which models need."""
    lengths = np.array([len(sequence) for sequence in sequences])
    width = -(-max(1, lengths.max(initial=0)) // multiple) * multiple
    mask = np.arange(width)[None, :] < lengths[:, None]
    mask = mask[:, ::-1] if left else mask
    ids = np.full(mask.shape, pad, dtype=np.int64)
    ids[mask] = np.concatenate(sequences)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
