"""A linear map that is applied chunk by chunk, and its gradients. The losses make their products with it."""

from __future__ import annotations

import torch
from torch import Tensor

from ibdistill.ops.cpu import products
from ibdistill.ops.cpu.huge_pages import empty_in_huge_pages


class ChunkedLinear:
    """y = hidden W^T + b for one chunk of rows after another, and the gradients of hidden, W and b.

    hidden is [N, D], weight [K, D] and bias [K]. Products are made in the dtype that suits the device, and
    accumulated in `accumulator`: float64 for float64 weights, else float32.

    Where products are made in a narrower dtype than they are added in, and all N rows of dy take no more
    memory in it than the weight's gradient in the wider one, these rows are kept for a single product at the
    end. That takes less memory, rounds the sum once, and saves passes over a gradient as large as the head.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs=(False, False, False)):
        self.hidden = hidden
        self.accumulator = torch.float64 if weight.dtype == torch.float64 else torch.float32
        is_native = products.multiplies_natively(weight.device.type, weight.dtype)
        self.weight = weight if is_native and hidden.dtype == weight.dtype else weight.to(self.accumulator)
        self.bias = bias
        wide, narrow = self.accumulator.itemsize, self.weight.dtype.itemsize
        self.keeps = needs[1] and narrow < wide and len(hidden) * narrow <= hidden.shape[1] * wide
        self.narrow: Tensor | None = None  # y, then dy of a chunk, or of all rows if they are kept
        self.d_weight: Tensor | None = None
        if self.keeps:
            self.narrow = empty_in_huge_pages((len(hidden), len(weight)), weight, weight.dtype)
        elif needs[1]:
            # the first product fills it: writing zeros first would be one more pass over the head's size
            self.d_weight = empty_in_huge_pages(weight.shape, weight, self.accumulator)
        self.d_hidden = torch.zeros_like(hidden, dtype=self.accumulator) if needs[0] else None
        self.has_rows = False
        self.d_bias = torch.zeros_like(bias, dtype=self.accumulator) if needs[2] else None

    def forward(self, a: int, b: int, out: Tensor) -> Tensor:
        """hidden W^T + b of the rows a to b into the first rows of `out`."""
        if self.narrow is None and self.weight.dtype != out.dtype:
            self.narrow = empty_in_huge_pages(out.shape, out, self.weight.dtype)
        hidden, out = self.hidden[a:b], out[: b - a]
        if self.weight.dtype == out.dtype:
            torch.mm(hidden.to(out.dtype), self.weight.T, out=out)
        else:
            out.copy_(torch.mm(hidden, self.weight.T, out=self._narrow(a, b)))
        if self.bias is not None:
            out.add_(self.bias)
        return out

    def _narrow(self, a: int, b: int) -> Tensor:
        return self.narrow[a:b] if self.keeps else self.narrow[: b - a]

    def add_gradients(self, dy: Tensor, a: int, b: int) -> None:
        """For the rows a to b, write dy W into d_hidden; add dy^T hidden and the sum of dy to the other two.

        dy [b - a, K] is in the accumulator's dtype.
        """
        hidden, low = self.hidden[a:b], dy
        if self.narrow is not None:
            low = self._narrow(a, b).copy_(dy)
        if self.d_hidden is not None:
            self.d_hidden[a:b] = low @ self.weight
        if self.d_weight is not None:
            self._add_product(low.T, hidden.to(low.dtype))
        if self.d_bias is not None:
            self.d_bias.add_(dy.sum(0))

    def _add_product(self, left: Tensor, right: Tensor) -> None:
        """Add left right to the weight's gradient, which the first product writes."""
        if left.dtype != self.d_weight.dtype and left.device.type == "cpu":
            products.add_product_in_blocks(self.d_weight, left, right, is_first=not self.has_rows)
        elif left.dtype != self.d_weight.dtype:
            product = torch.mm(left, right)
            self.d_weight.add_(product) if self.has_rows else self.d_weight.copy_(product)
        elif self.has_rows:
            self.d_weight.addmm_(left, right)
        else:
            torch.mm(left, right, out=self.d_weight)
        self.has_rows = True

    def weight_gradient(self) -> Tensor | None:
        """The gradient [K, D] from all rows; None if it is not needed."""
        if self.keeps:
            d_weight = empty_in_huge_pages(self.weight.shape, self.weight, self.weight.dtype)
            return torch.mm(self.narrow.T, self.hidden, out=d_weight)
        if self.d_weight is not None and not self.has_rows:
            self.d_weight.zero_()
        return self.d_weight


def log_softmax_(z: Tensor) -> Tensor:
    """log_softmax of each row, in place: each row is read whole before any of it is written."""
    return torch.log_softmax(z, -1, out=z)
