"""What a step asks of the device, and what the device has: operations, peak rate, memory, time."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import deepspeed
import torch
from torch import nn

GIB = 2**30


def operations_per_token(model: nn.Module) -> tuple[int, int]:
    """Floating point operations of one training step for a token of a question and of a target.

    6 for each weight that the token meets: 2 in the forward pass, 4 in the backward pass (Kaplan et al.,
    arXiv 2001.08361, section 2.1). Attention's own products are left out, and so is what is computed
    twice under `student.gradient_checkpointing`. Question tokens of an encoder-decoder model meet its
    encoder, target tokens its decoder and head; those of a decoder-only model meet all blocks.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if base.config.is_encoder_decoder:
        question = _weights(base.get_encoder()) - _weights(embedding)
        target = _weights(base.get_decoder()) - _weights(embedding)
    else:
        tied = embedding.weight is head.weight
        question = target = _weights(base) - _weights(embedding) - (0 if tied else _weights(head))
    return 6 * question, 6 * (target + _weights(head))


def _weights(module: nn.Module) -> int:
    """Number of weights, also where ZeRO-3 has partitioned them."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())


@cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Best rate of a large square product on this device, in operations a second. Takes a moment, once."""
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
    """Bytes: on a GPU the allocator's high-water mark since the last call, else that of the process's
    resident set since its start."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def model_states(engine: deepspeed.DeepSpeedEngine) -> int:
    """Bytes of weights, master weights and optimizer states on this rank; gradients are left out."""
    tensors = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    optimizer = engine.basic_optimizer
    tensors += [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


class Clock:
    """Sums of seconds by name, by events on a GPU, so that measuring does not wait for it."""

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
