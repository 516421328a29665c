"""Attention with a bias for each distance in Triton: the launches of `kernels`."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from ibdistill.ops.biased_attention import kernels

PROGRAMS = 1024
"""At least as many programs sum the bias's gradient, where the batch has rows for them."""


def block_of(width: int, itemsize: int) -> int:
    """Queries and keys of a block: fewer where a row takes more than 128 bytes, or accumulators would spill."""
    return 64 if width * itemsize <= 128 else 32


def _call(query: Tensor, key: Tensor, value: Tensor, bias, mask, seed, causal: bool, level: int, factor: float):
    """The arguments that all kernels but the last share: tensors, sizes and constants."""
    H, T, D = query.shape[1:]
    width = max(16, triton.next_power_of_2(D))
    tensors = [a for x in (query, key, value) for a in (x, *x.stride()[:3])]
    # without a mask or dropout the kernel gets a pointer that it never reads
    tensors += [bias, bias if mask is None else mask.view(torch.uint8), key.shape[2], seed]
    exact = query.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    constants = {
        "CAUSAL": causal, "MASKED": mask is not None, "DROPS": level > 0, "WIDTH": width,
        "PRECISION": "ieee" if exact else "tf32", "BLOCK": block_of(width, query.element_size()),
        "num_warps": 4,
    }  # fmt: skip
    return tensors, (H, T, key.shape[2], level, factor, D), constants


def _on(x: Tensor):
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _rows_in_memory(*tensors: Tensor) -> list[Tensor]:
    """The tensors, with the elements of a row side by side."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def forward(
    query, key, value, bias, mask, seed, causal: bool, level: int, factor: float
) -> tuple[Tensor, Tensor]:
    """The `forward` of `biased_attention.torch` in Triton."""
    query, key, value = _rows_in_memory(query, key, value)
    B, H, T, D = query.shape
    tensors, sizes, constants = _call(query, key, value, bias, mask, seed, causal, level, factor)
    out, logs = query.new_empty(B, T, H, D), bias.new_empty(B, H, T)
    grid = (triton.cdiv(T, constants["BLOCK"]), B * H)
    with _on(query):
        kernels.forward_kernel[grid](*tensors, out, logs, *sizes, **constants)
    return out, logs


def backward(
    gradient, query, key, value, bias, mask, seed, out, logs,
    causal: bool, level: int, factor: float, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The `backward` of `biased_attention.torch` in Triton."""
    query, key, value = _rows_in_memory(query, key, value)
    gradient = gradient.contiguous()
    B, H, T, D = query.shape
    S = key.shape[2]
    tensors, sizes, constants = _call(query, key, value, bias, mask, seed, causal, level, factor)
    d_q, (d_k, d_v) = query.new_empty(B, T, H, D), (query.new_empty(B, S, H, D) for _ in range(2))
    deltas, d_bias = torch.empty_like(logs), bias.new_empty(bias.shape if needs_bias else 0)
    blocks_m, blocks_n = (triton.cdiv(n, constants["BLOCK"]) for n in (T, S))
    with _on(query):
        kernels.query_kernel[blocks_m, B * H](
            *tensors, out, logs, gradient, deltas, d_q, *sizes, **constants
        )  # fmt: skip
        kernels.key_kernel[blocks_n, B * H](
            *tensors, logs, gradient, deltas, d_k, d_v, *sizes, **constants
        )  # fmt: skip
        if needs_bias:
            diagonals, block = blocks_m + blocks_n - 1, constants["BLOCK"]
            rows = triton.cdiv(B, min(B, triton.cdiv(PROGRAMS, diagonals * H)))
            splits = triton.cdiv(B, rows)
            parts = bias.new_empty(splits, H, diagonals, block, block)
            kernels.bias_kernel[diagonals, H, splits](
                *tensors, logs, gradient, deltas, parts, B, rows, *sizes, **constants
            )  # fmt: skip
            kernels.fold_kernel[diagonals + 1, H](
                parts, d_bias, splits, H, diagonals, T, S, BLOCK=block, num_warps=4
            )  # fmt: skip
    return *(x.transpose(1, 2) for x in (d_q, d_k, d_v)), d_bias
