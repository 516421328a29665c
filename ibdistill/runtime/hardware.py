"""What the device can do and what a run takes of it: precision, peak rate, memory, time."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import deepspeed  # takes a second, and tells the console of the accelerator

GIB = 2**30
"""Bytes."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Value of a setting `precision` -> dtype."""


_WIDTHS_ON_GPU = 8
_CUDNN = "IBDISTILL_CUDNN_ATTENTION"


def choose_attention_kernels() -> None:
    """Leave cuDNN out of the kernels that torch chooses from for attention on a GPU.

    For each shape that cuDNN has not seen it may build a plan, for which users of H100s report 40 to 400 ms,
    and nearly every micro-batch here has a shape of its own. The environment variable
    IBDISTILL_CUDNN_ATTENTION=1 leaves torch its own order.
    """
    torch.backends.cuda.enable_cudnn_sdp(os.environ.get(_CUDNN) == "1")


def width_multiple(device: torch.device, positions: int | None) -> int:
    """The multiple to which the width of padded rows is rounded for a model with so many positions, if it has
    a limit: 8 on a GPU, and 1 elsewhere.

    On a GPU products of 16 bits want rows of whole 16-byte words, and fewer widths are fewer shapes to choose
    kernels for. A model whose positions end between two multiples takes the width as it is.
    """
    fits = not positions or positions % _WIDTHS_ON_GPU == 0
    return _WIDTHS_ON_GPU if device.type == "cuda" and fits else 1


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has units for products in bf16: NVIDIA's from the A100 (2020) on do."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True)
class Card:
    """Peak rates of a GPU for dense products, in 10^12 operations per second, from its maker's data sheet.

    Figures "with sparsity" are halved. bf16 accumulates in fp32. fp32 is full precision, without TF32.
    """

    words: tuple[str, ...]
    """The words of torch's name of the device that tell this card, in small letters."""
    bf16: float
    """0 where the card has no units for bf16."""
    fp32: float
    source: str


# Compared on 2026-11-26 with copies of the data sheets' tables and with other projects' tables of peaks, such
# as that of nanochat (github.com/karpathy/nanochat, nanochat/common.py). Not found there, and left as they
# were: the GH200, the V100 PCIe, and the fp32 rates of the H100 PCIe and NVL, H200 NVL and A30.
CARDS = (  # a card whose words include those of another stands before it
    Card(("h100", "pcie"), 756, 51, "NVIDIA H100 data sheet 2287922 (PCIe)"),
    Card(("h100", "nvl"), 835, 60, "NVIDIA H100 data sheet 3240456 (NVL)"),
    Card(("h100",), 989, 67, "NVIDIA H100 data sheet 2287922 (SXM)"),
    Card(("gh200",), 990, 67, "NVIDIA GH200 data sheet"),
    Card(("h200", "nvl"), 836, 60, "NVIDIA H200 data sheet 3002446 (NVL)"),
    Card(("h200",), 989, 67, "NVIDIA H200 data sheet 3002446 (SXM)"),
    Card(("b200",), 2250, 75, "NVIDIA HGX B200 data sheet, an eighth of the board's"),
    Card(("a100",), 312, 19.5, "NVIDIA A100 data sheet"),
    Card(("a30",), 165, 10.3, "NVIDIA A30 data sheet"),
    Card(("a40",), 149.7, 37.4, "NVIDIA A40 data sheet"),
    Card(("a10",), 125, 31.2, "NVIDIA A10 data sheet"),
    Card(("a6000",), 154.8, 38.7, "NVIDIA RTX A6000 data sheet"),
    Card(("l40s",), 362, 91.6, "NVIDIA L40S data sheet"),
    Card(("l40",), 181, 90.5, "NVIDIA L40 data sheet"),
    Card(("l4",), 121, 30.3, "NVIDIA L4 data sheet"),
    Card(("4090",), 165.2, 82.6, "NVIDIA Ada GPU architecture, appendix A"),
    Card(("3090",), 71, 35.6, "NVIDIA GA102 GPU architecture, appendix A"),
    Card(("v100", "pcie"), 0, 14, "NVIDIA V100 data sheet (PCIe)"),
    Card(("v100",), 0, 15.7, "NVIDIA V100 data sheet (SXM2)"),
    Card(("t4",), 0, 8.1, "NVIDIA T4 data sheet"),
)


def card(name: str) -> Card | None:
    """The card of a device that torch calls `name`, "NVIDIA A100-SXM4-80GB" say; None if it is not known.

    A part of a card (MIG) and a card's variants of other rates, such as a laptop's, are not known.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    if words & {"mig", "laptop", "ti", "d"}:
        return None
    return next((card for card in CARDS if words.issuperset(card.words)), None)


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of dense products: the data sheet's for a known card, else a measured rate."""
    found = card(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    sheet = 0.0 if found is None else found.bf16 if dtype == torch.bfloat16 else found.fp32
    return 1e12 * sheet or measured_peak(device, dtype)


@cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a large square matrix product on this device, in operations per second.

    It is measured at the first call for a device and dtype, which takes a moment.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use: on a GPU by torch's allocator since the last call, else by the whole
    process (its resident set) since it started."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def model_states(engine: deepspeed.DeepSpeedEngine) -> int:
    """Bytes of weights, master weights and optimizer states on this rank, without gradients."""
    tensors = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    optimizer = engine.basic_optimizer
    tensors += [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


class ToHost:
    """Copies of tensors in the host's memory, which the host does not wait for until it needs them."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to copy, on the current stream. What is on the host already is not copied."""
        self._copies = {name: self._begin(tensor.detach()) for name, tensor in tensors.items()}
        self._event = None
        if any(tensor.device.type == "cuda" for tensor in tensors.values()):
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def is_there(self) -> bool:
        """Whether nothing has to be waited for, because all was on the host."""
        return self._event is None

    def wait(self) -> dict[str, Tensor]:
        """The copies, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies

    @staticmethod
    def _begin(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor
        # pageable memory would make the copy wait
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)


class Clock:
    """Sums of seconds by name. A GPU's time is taken by events, so that measuring does not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time what happens within, on the current stream."""
        start = self._now()
        try:
            yield
        finally:
            self._spans.setdefault(name, []).append((start, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by name since the last call. Waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        spans, self._spans = self._spans, {}
        return {
            name: sum(a.elapsed_time(b) / 1000 if self._on_gpu else b - a for a, b in pairs)
            for name, pairs in spans.items()
        }

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
