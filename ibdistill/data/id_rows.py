"""Rows of token ids as models read them: prompts, and many rows side by side or one behind the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ibdistill.data import token_ids


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
    if as_written and separator is not None:
        return padded([with_bos(ids[:-1], lead) for ids in questions], pad, left=True)
    rows = [asked(ids, pad=pad, start=start, bos=bos, separator=separator) for ids in questions]
    return padded(rows, pad, left=separator is not None)


def asked(
    question: Sequence[int],
    *,
    pad: int,
    start: int | None,
    bos: int | None = None,
    separator: int | None = None,
) -> np.ndarray:
    """[tokens] int64: what a model of either family reads of a question. Arguments as those of `collate`."""
    return with_bos(question, bos) if separator is None else prompt(question, start, separator)


def whole_prompts(ids: Sequence[Sequence[int]], pad: int, *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Prompts as they are: ids and mask, [prompts, longest] int64, padded on the left as a decoder-only model
    needs, or on the right."""
    return padded([np.asarray(row, dtype=np.int64) for row in ids], pad, left=left)


def prompt(question: Sequence[int], bos: int | None, separator: int | None) -> np.ndarray:
    """[tokens] int64: what a decoder-only model reads before the target.

    The separator takes the place of the question's end token, and of those between its parts; None: the
    question is the whole prompt.
    """
    question = np.asarray(question)
    if separator is None:
        return question.astype(np.int64)
    return with_bos(np.where(question == question[-1], separator, question), bos)


def with_bos(ids: Sequence[int], bos: int | None) -> np.ndarray:
    """[tokens] int64: the ids with BOS in front, if there is one."""
    return np.array([*([] if bos is None else [bos]), *ids], dtype=np.int64)


def lay_out(
    rows: Sequence[np.ndarray], pad: int, multiple: int, packed: bool
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Ids, mask, and where each row begins in the flattened ids: rows side by side or in one."""
    if packed:
        lengths = np.array([len(row) for row in rows])
        return *padded([np.concatenate(rows)], pad), lengths.cumsum() - lengths
    ids, mask = padded(rows, pad, multiple=multiple)
    return ids, mask, np.arange(len(rows)) * ids.shape[1]


def places(starts: np.ndarray, counts: Sequence[int]) -> Tensor:
    """[positions] int64: of each row `count` places from its start on, in the flattened rows."""
    spans = zip(starts, counts, strict=True)
    return torch.from_numpy(np.concatenate([start + np.arange(count) for start, count in spans]))


def padded(
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
