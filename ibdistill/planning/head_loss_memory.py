"""What the head loss holds while it runs, by formula: a dry run cannot look into custom operators."""

from __future__ import annotations

from ibdistill.ops.cpu.products import multiplies_natively
from ibdistill.ops.head_loss import aligned
from ibdistill.ops.head_loss.api import CHUNK_BYTES
from ibdistill.ops.head_loss.triton_weight import buffer_rows, keeps_all
from ibdistill.runtime.hardware import DTYPES

_EVENTS = {"jsd": 13.25, "skew_reverse": 13.25, "skew_forward": 10.25, "adaptive": 9.5}
"""Divergence -> tensors of the events' size in `aligned_bytes`; 7.5 for the others."""


def head_loss_bytes(
    rows: int,
    questions: int,
    head: tuple[int, int],
    precision: str,
    *,
    mi: bool,
    teacher: tuple[int, int] | None,
    device: str,
) -> int:
    """Bytes that the head loss on `rows` target tokens holds: logits, fp32 gradients, packed states.

    `head`: the shape [V, D] of its weight. `teacher`: that of the teacher's head, if its distributions are
    distilled.
    """
    (vocabulary, width), narrow = head, DTYPES[precision].itemsize
    chunk = CHUNK_BYTES["cpu" if device == "cpu" else "gpu"]
    copied = device == "cpu" and not multiplies_natively("cpu", DTYPES[precision])
    # a GPU holds logits in the dtype of its products
    wide = 4 if device == "cpu" else narrow
    in_chunk = max(1, min(rows, chunk // (wide * vocabulary * (2 if teacher else 1))))
    kept, summed = in_chunk, 4 * vocabulary * width
    if device == "cpu" and narrow < 4 and not copied:
        # `ChunkedLinear` keeps the narrow rows where that is less
        summed = min(summed, narrow * vocabulary * rows)
    elif device != "cpu":
        kept = buffer_rows(rows, in_chunk, width, narrow, in_place=True)
        summed = 0 if keeps_all(rows, width, narrow) else summed
    total = wide * vocabulary * (kept + (in_chunk if teacher else 0)) + summed
    total += 4 * rows * width + narrow * rows * width
    total += 4 * vocabulary * width if copied else 0
    total += narrow * (vocabulary * width + rows * width)  # the results, in the parameters' dtype
    if mi:  # pooled log probabilities, their gradients and the winning positions of a chunk's questions
        total += 4 * 4 * vocabulary * max(1, in_chunk * questions // max(1, rows))
    if teacher:
        total += narrow * rows * teacher[1] + (4 * teacher[0] * teacher[1] if copied else 0)
    return total


def aligned_bytes(
    rows: int,
    head: tuple[int, int],
    teacher: tuple[int, int],
    precision: str,
    *,
    device: str,
    divergence: str = "forward",
    shared: int = 0,
) -> int:
    """Bytes that `aligned.aligned_loss` holds on a stream of `rows` tokens, all spans of one token.

    `head` and `teacher`: the shapes [V, D] of the two heads. `shared`: tokens of both; 0: as many as there
    can be, with which it takes the most.
    """
    (vocabulary, width), (theirs, wide) = head, teacher
    chunk = aligned.CHUNK_BYTES["cpu" if device == "cpu" else "gpu"]
    in_chunk = max(1, min(rows, chunk // (4 * (vocabulary + theirs))))
    ours, yours, events = (4 * in_chunk * n for n in (vocabulary, theirs, shared or min(vocabulary, theirs)))
    # in the backward pass through the events, in the divergence, and while the teacher's events are made;
    # the counts of tensors were measured, and are those of torch's own allocations to the byte per row
    total = max(
        7 * ours + yours - events,
        3 * ours + yours + _EVENTS.get(divergence, 7.5) * events,
        ours + 5 * yours - 2 * events,
    )
    narrow, summed = DTYPES[precision].itemsize, 4 * vocabulary * width
    total += rows * (narrow * (width + wide) + 4 * width)
    if not multiplies_natively(device, DTYPES[precision]):
        total += 4 * (vocabulary * width + theirs * wide)
    elif narrow < 4:
        kept = narrow * rows <= 4 * width  # by `ChunkedLinear`, in the place of the fp32 sum
        total += narrow * (in_chunk * theirs + (rows if kept else in_chunk) * vocabulary)
        summed = 0 if kept else summed
    return int(total + summed)
