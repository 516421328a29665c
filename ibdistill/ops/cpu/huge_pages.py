"""Memory for tensors as large as the head, in pages of 2 MiB instead of 4 KiB."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def empty_in_huge_pages(shape: Sequence[int], example: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on `example`'s device; on a Linux CPU in huge pages where the kernel has some.

    Elsewhere, and for tensors below two huge pages, this is `example.new_empty(shape, dtype=dtype)`.

    torch's own memory comes in pages of 4 KiB: a head's gradient of 32128 x 512 is 16,000 page faults
    on first touch, which cost as much as several passes over it (0.66 against 0.61 of eager's time for
    the whole head loss). The alternative, THP_MEM_ALLOC_ENABLE=1 before torch starts, is the user's.
    """
    size = math.prod(shape) * dtype.itemsize
    if example.device.type != "cpu" or size < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return example.new_empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
