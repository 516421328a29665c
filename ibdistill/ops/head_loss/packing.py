"""The rows of both streams in the order in which the torch implementation walks over them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ibdistill.ops.head_loss.arguments import IGNORED, Stream


class Rows(NamedTuple):
    """The rows of both streams that are not ignored, those of a question side by side: predict, explain."""

    order: Tensor
    """[M] int64, the row in the concatenated streams."""
    labels: Tensor
    """[M] int64, the label of each row."""
    is_explain: Tensor
    """[M] bool, whether the row belongs to the explain stream."""
    bounds: list[tuple[int, int, int]]
    """Per question: first row of predict, first of explain, one past its last."""


def pack(predict: Stream, explain: Stream | None) -> Rows:
    """Drop ignored rows and bring those of a question together. The host waits for the device."""
    streams = [s for s in (predict, explain) if s is not None]
    questions = predict.cu.shape[0] - 1
    orders, labels, owners, is_explain, offset = [], [], [], [], 0
    for i, (hidden, stream_labels, cu) in enumerate(streams):
        kept = (stream_labels != IGNORED).nonzero()[:, 0]
        lengths = cu.to(stream_labels.device).diff()
        owner = torch.repeat_interleave(
            torch.arange(questions, device=kept.device), lengths, output_size=hidden.shape[0]
        )
        orders.append(kept + offset)
        labels.append(stream_labels[kept])
        owners.append(owner[kept])
        is_explain.append(torch.full_like(kept, i, dtype=torch.bool))
        offset += hidden.shape[0]
    counts = [torch.bincount(owner, minlength=questions).tolist() for owner in owners]
    # stable: predict before explain, positions in order
    by_question = torch.cat(owners).argsort(stable=True)
    bounds, start = [], 0
    for b in range(questions):
        middle = start + counts[0][b]
        stop = middle + (counts[1][b] if len(counts) > 1 else 0)
        bounds.append((start, middle, stop))
        start = stop
    return Rows(
        torch.cat(orders)[by_question],
        torch.cat(labels)[by_question],
        torch.cat(is_explain)[by_question],
        bounds,
    )


def groups(rows: Rows, size: int, whole_questions: bool) -> Iterator[tuple[int, int, int, int]]:
    """Cut the rows into groups: (first row, last row + 1, first question, last question + 1).

    A group has at most `size` rows, or is one larger question. Without `whole_questions` both numbers of
    questions are 0.
    """
    total = rows.order.shape[0]
    if not whole_questions:
        for start in range(0, total, size):
            yield start, min(start + size, total), 0, 0
        return
    first = 0
    for b in range(len(rows.bounds)):
        last = b + 1 == len(rows.bounds)
        if last or rows.bounds[b + 1][2] - rows.bounds[first][0] > size:
            yield rows.bounds[first][0], rows.bounds[b][2], first, b + 1
            first = b + 1
