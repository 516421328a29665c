"""What the device can do and what a run takes of it: peak rate, memory, time."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import deepspeed
import torch

GIB = 2**30
"""Bytes."""


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
