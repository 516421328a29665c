"""Attention with a bias for each distance in Triton: the launches of `kernels`."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from ibdistill.ops import launch
from ibdistill.ops.biased_attention import kernels

PROGRAMS = 1024
"""At least as many programs sum the bias's gradient, where the batch has rows for them."""


def block_of(width: int, itemsize: int) -> int:
    """Queries and keys of a block: fewer for float32, whose accumulators would spill."""
    return 64 if itemsize == 2 else 32 if width <= 64 else 16


def _precision(dtype: torch.dtype) -> str:
    """How products of float32 are made: as torch's setting says; exactly is three TF32 products on NVIDIA."""
    if dtype == torch.float32 and not torch.version.hip:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    return "ieee"


def _call(
    query: Tensor, key: Tensor, value: Tensor, bias, mask, ends, longest: int, seed,
    causal: bool, level: int, factor: float,
):  # fmt: skip
    """What all kernels but the last share: tensors, sizes, and the options of both kinds of kernels.

    The kernels of keys and of the bias hold two blocks of accumulators; with more warps and no pipeline these
    stay in registers (`tools/bench/kernel_report.py` counts the spills).
    """
    H, D = query.shape[1], query.shape[3]
    _, T, S = sequences(query, key, bias, ends, longest)
    width = max(16, triton.next_power_of_2(D))
    tensors = [a for x in (query, key, value) for a in (x, *x.stride()[:3])]
    # without a mask, ends or dropout the kernel gets pointers that it never reads
    tensors += [bias, bias if mask is None else mask.view(torch.uint8), S]
    tensors += [*((bias, bias) if ends is None else ends), seed]
    constants = {
        "CAUSAL": causal, "MASKED": mask is not None, "PACKED": ends is not None, "DROPS": level > 0,
        "WIDTH": width, "PRECISION": _precision(query.dtype), "BLOCK": block_of(width, query.element_size()),
    }  # fmt: skip
    sizes = H, T, S, level, factor, D
    if launch.LANES == 64:  # lanes of AMD's CDNA have twice the registers
        return tensors, sizes, *[constants | {"num_warps": 4, "num_stages": 1}] * 2
    narrow = {"num_warps": 4 if width <= 64 else 8, "num_stages": 2}
    return tensors, sizes, constants | narrow, constants | {"num_warps": 8, "num_stages": 1}


def sequences(query: Tensor, key: Tensor, bias: Tensor, ends, longest: int) -> tuple[int, int, int]:
    """B, T, S: how many sequences there are, and the longest one's queries and keys."""
    if ends is None:
        return query.shape[0], query.shape[2], key.shape[2]
    return ends.shape[1] - 1, longest, bias.shape[1] + 1 - longest


def _on(x: Tensor):
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _rows_in_memory(*tensors: Tensor) -> list[Tensor]:
    """The tensors, with the elements of a row side by side."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def forward(
    query, key, value, bias, mask, ends, longest: int, seed, causal: bool, level: int, factor: float
) -> tuple[Tensor, Tensor]:
    """The `forward` of `biased_attention.torch` in Triton."""
    query, key, value = _rows_in_memory(query, key, value)
    tensors, sizes, options, _ = _call(
        query, key, value, bias, mask, ends, longest, seed, causal, level, factor
    )
    (B, T, _), H = sequences(query, key, bias, ends, longest), query.shape[1]
    out, logs = query.new_empty(query.transpose(1, 2).shape), bias.new_empty(B, H, T)
    grid = (triton.cdiv(T, options["BLOCK"]), B * H)
    with _on(query):
        kernels.forward_kernel[grid](*tensors, out, logs, *sizes, **options)
    return out, logs


def backward(
    gradient, query, key, value, bias, mask, ends, longest: int, seed, out, logs,
    causal: bool, level: int, factor: float, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The `backward` of `biased_attention.torch` in Triton."""
    query, key, value = _rows_in_memory(query, key, value)
    gradient = gradient.contiguous()
    (B, T, S), H = sequences(query, key, bias, ends, longest), query.shape[1]
    tensors, sizes, narrow, wide = _call(
        query, key, value, bias, mask, ends, longest, seed, causal, level, factor
    )
    d_q, d_k, d_v = (query.new_empty(x.transpose(1, 2).shape) for x in (query, key, value))
    deltas, d_bias = torch.empty_like(logs), bias.new_empty(bias.shape if needs_bias else 0)
    block = wide["BLOCK"]
    blocks_m, blocks_n = triton.cdiv(T, block), triton.cdiv(S, block)
    with _on(query):
        kernels.query_kernel[blocks_m, B * H](*tensors, out, logs, gradient, deltas, d_q, *sizes, **narrow)
        kernels.key_kernel[blocks_n, B * H](*tensors, logs, gradient, deltas, d_k, d_v, *sizes, **wide)
        if needs_bias:
            diagonals = blocks_m + blocks_n - 1
            rows = triton.cdiv(B, min(B, triton.cdiv(PROGRAMS, diagonals * H)))
            splits = triton.cdiv(B, rows)
            parts = bias.new_empty(splits, H, diagonals, block, block)
            kernels.bias_kernel[diagonals, H, splits](
                *tensors, logs, gradient, deltas, parts, B, rows, *sizes, **wide
            )  # fmt: skip
            kernels.fold_kernel[diagonals + 1, H](
                parts, d_bias, splits, H, diagonals, T, S, BLOCK=block, num_warps=8
            )  # fmt: skip
    return *(x.transpose(1, 2) for x in (d_q, d_k, d_v)), d_bias
