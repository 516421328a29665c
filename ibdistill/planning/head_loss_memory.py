"""What the head loss holds while it runs, by formula: a dry run cannot look into custom operators."""

from __future__ import annotations

from ibdistill.ops.cpu.products import multiplies_natively
from ibdistill.ops.head_loss.api import CHUNK_BYTES
from ibdistill.ops.head_loss.triton_weight import buffer_rows, keeps_all
from ibdistill.runtime.hardware import DTYPES


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
