"""The head loss in Triton: the buffer of a group's logits, and the gradient of the head's weight from it.

A product with few rows of dL/dz moves a matrix as large as the head [V, D], however few the rows: with `b`
bytes per entry of the weight, the first product of several writes 4, each further one reads and writes 4,
and in the end 4 are read and b written. A head of 151,936 x 896 in bfloat16 with a distribution of the
teacher's beside it has room for 441 rows of logits: 2,304 rows in groups of so many are six products and
50 bytes per entry, 6.8 GB. A single product of all rows writes b bytes per entry.

So rows of dL/dz stay in the buffer when their group is done, until it is full. It holds

- all N rows, if they take no more memory than the float32 sum that is then not needed: N b <= 4 D,
- else at least D rows, which take what a product of the weight's dtype would take beside that sum.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds products of a narrower dtype to a float32 matrix; newer ones do, on a GPU."""
    total, factor = torch.zeros(16, 16, device=device), torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return True


def keeps_all(total: int, width: int, narrow: int) -> bool:
    """Whether a buffer holds dL/dz of all rows, for entries of `narrow` bytes and states of a width."""
    return total * narrow <= 4 * width


def buffer_rows(total: int, size: int, width: int, narrow: int, *, in_place: bool) -> int:
    """Rows of the buffer for logits in groups of `size`; `in_place`: see `adds_in_float32`."""
    if keeps_all(total, width, narrow):
        return total
    return min(total, max(size, width if narrow < 4 and in_place else 0))


class GroupBuffer:
    """Rows of logits, in whose place their gradient is written, and the weight's gradient from these rows."""

    def __init__(self, weight: Tensor, total: int, size: int, padded: int, *, needs_weight: bool):
        """
        Args:
            weight: [V, D].
            total: rows of all groups together.
            size: the most rows that are asked for at once.
            padded: elements of a row, V or more.
            needs_weight: whether the gradient of the weight is needed.
        """
        self.weight, self.needs_weight = weight, needs_weight
        narrow = weight.element_size()
        self.in_place = narrow == 4 or adds_in_float32(weight.device, weight.dtype)
        rows = min(size, total)
        if needs_weight:
            rows = buffer_rows(total, size, weight.shape[1], narrow, in_place=self.in_place)
        self.buffer = weight.new_empty(max(1, rows), padded)
        self.filled = 0
        self.hidden: list[Tensor] = []
        self.sum: Tensor | None = None

    def place(self, count: int) -> Tensor:
        """[count, padded], where the next logits belong: the same rows again until `keep` is called."""
        if self.filled + count > len(self.buffer):
            self._add()
        return self.buffer[self.filled : self.filled + count]

    def keep(self, hidden: Tensor) -> None:
        """The rows of `place` hold dL/dz now; `hidden` [count, D] are the states that they came from."""
        if self.needs_weight:
            self.hidden.append(hidden)
            self.filled += len(hidden)

    def weight_gradient(self) -> Tensor | None:
        """[V, D] in float32 or the weight's dtype, from all rows that were kept; None if it is not needed."""
        if not self.needs_weight:
            return None
        if self.sum is None and self.filled:
            return torch.mm(*self._factors())
        if self.filled:
            self._add()
        return torch.zeros_like(self.weight) if self.sum is None else self.sum

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.buffer[: self.filled, : len(self.weight)].T, torch.cat(self.hidden)

    def _add(self) -> None:
        """Add the product of the rows that are kept, and forget them."""
        left, right = self._factors()
        wide = {} if left.dtype == torch.float32 else {"out_dtype": torch.float32}
        is_first = self.sum is None
        if is_first:
            self.sum = torch.empty_like(self.weight, dtype=torch.float32)
        if not self.in_place:
            product = torch.mm(left, right)
            self.sum.copy_(product) if is_first else self.sum.add_(product)
        elif is_first:
            torch.mm(left, right, **wide, out=self.sum)
        else:
            torch.addmm(self.sum, left, right, **wide, out=self.sum)
        self.filled = 0
        self.hidden.clear()
