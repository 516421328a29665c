"""A linear map applied chunk by chunk, and its gradients: the dense products of the torch paths."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

BLOCK_ROWS = 1024
"""Rows of the weight whose product is made at once where it has to be widened before it is added."""

HUGE_PAGE = 2 << 20

CACHED_BYTES = 1 << 20
"""Of logits that one operation after another works on: two blocks of them stay in a CPU core's cache."""


def multiplies_natively(device: str, dtype: torch.dtype) -> bool:
    """Whether a device's products in a dtype are worth their rounding; else weights are copied to fp32 once.

    Of CPUs those with AMX, and AMD's with avx512_bf16 (measured on a Zen 4 for a head's three products: 1.3
    to 2.2 times fp32's rate with 160 rows, 2.2 to 3.1 with 480), not Intel's with avx512_bf16 alone (0.7).
    """
    if device != "cpu" or dtype in (torch.float32, torch.float64):
        return True
    return torch.cpu._is_amx_tile_supported() or (dtype == torch.bfloat16 and _is_amd_with_bf16())


@cache
def _is_amd_with_bf16() -> bool:
    cpu = Path("/proc/cpuinfo")
    text = cpu.read_text() if cpu.is_file() else ""
    return "AuthenticAMD" in text and "avx512_bf16" in text


def empty_in_huge_pages(shape: Sequence[int], example: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised, beside `example`; on a Linux CPU in pages of 2 MiB where the kernel has some.

    torch's own memory comes in pages of 4 KiB: a head's gradient of 32128 x 512 is 16,000 page faults
    on first touch, which cost as much as several passes over it (0.66 against 0.61 of eager's time for
    the whole head loss). The alternative, THP_MEM_ALLOC_ENABLE=1 before torch starts, is the user's.
    """
    size = math.prod(shape) * dtype.itemsize
    if example.device.type != "cpu" or size < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return example.new_empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class ChunkedLinear:
    """y = hidden W^T + b for one chunk of rows after another, and the gradients that come back for them.

    hidden [N, D], weight [K, D], bias [K]. Products are made in the dtype that suits the device,
    accumulated in `accumulator`: float64 for float64 weights, else float32.

    Where products are made in a narrower dtype than they are added in, and all N rows of dy take no more
    memory in it than the weight's gradient in the wider one, those are kept for a single product at the
    end: less memory, one rounding of the sum, and no passes over a gradient as large as the head.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs=(False, False, False)):
        self.hidden = hidden
        self.accumulator = torch.float64 if weight.dtype == torch.float64 else torch.float32
        native = multiplies_natively(weight.device.type, weight.dtype) and hidden.dtype == weight.dtype
        self.weight = weight if native else weight.to(self.accumulator)
        self.bias = bias
        wide, narrow = self.accumulator.itemsize, self.weight.dtype.itemsize
        self.keeps = needs[1] and narrow < wide and len(hidden) * narrow <= hidden.shape[1] * wide
        self.narrow: Tensor | None = None  # y, then dy of a chunk, or of all rows if they are kept
        self.d_weight: Tensor | None = None
        if self.keeps:
            self.narrow = empty_in_huge_pages((len(hidden), len(weight)), weight, weight.dtype)
        elif needs[1]:
            # filled by the first product: zeros first would be a pass more over what is as large as the head
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
        """Of the rows a to b: write dy W into d_hidden, add dy^T hidden and sum dy to the other two."""
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
        if left.dtype == self.d_weight.dtype:
            if self.has_rows:
                self.d_weight.addmm_(left, right)
            else:
                torch.mm(left, right, out=self.d_weight)
        else:
            # on a CPU in parts: a product as large as the head would be half of its gradient once more
            size = BLOCK_ROWS if left.device.type == "cpu" else len(left)
            product = left.new_empty(min(size, len(left)), right.shape[1])
            wide = torch.empty_like(product, dtype=self.d_weight.dtype)
            for target, part in zip(self.d_weight.split(size), left.split(size), strict=True):
                narrow = torch.mm(part, right, out=product[: len(part)])
                if self.has_rows:
                    target.add_(wide[: len(part)].copy_(narrow))  # a sum of two dtypes would allocate
                else:
                    target.copy_(narrow)
        self.has_rows = True

    def weight_gradient(self) -> Tensor | None:
        """Of all rows."""
        if self.keeps:
            d_weight = empty_in_huge_pages(self.weight.shape, self.weight, self.weight.dtype)
            return torch.mm(self.narrow.T, self.hidden, out=d_weight)
        if self.d_weight is not None and not self.has_rows:
            self.d_weight.zero_()
        return self.d_weight


def log_softmax_(z: Tensor) -> Tensor:
    """log_softmax of each row, in place: each row is read whole before any of it is written."""
    return torch.log_softmax(z, -1, out=z)


def cached_rows(z: Tensor) -> int:
    """How many rows of [rows, V] are CACHED_BYTES; at least four."""
    return max(4, CACHED_BYTES // (z.shape[1] * z.element_size()))


def exp_times_(log_p: Tensor, factor: Tensor) -> Tensor:
    """exp(log_p) times a factor for each row, in place."""
    size = cached_rows(log_p)
    for block, its_factor in zip(log_p.split(size), factor.split(size), strict=True):
        block.exp_().mul_(its_factor[:, None])
    return log_p
