"""Attention whose scores get a learned bias for each distance between query and key, in linear memory.

T5 (Raffel et al., JMLR 2020, arXiv 1910.10683, section 2.1) adds to the score of key j for query i a number
that depends on j - i and on the head. As a mask for torch's SDPA this bias is a tensor [B, H, T, S] in every
layer, kept for the backward pass. For T5-base with 64 questions of 1024 tokens in bfloat16 these tensors are
most of 110 GiB. Here the bias stays a vector [H, T + S - 1] by distance, and nothing of size T S is kept or
made: the backward pass computes the probabilities again from each row's logarithm (FlashAttention, arXiv
2205.14135, section 3), and the dropout mask from a hash. FlexAttention could add such a bias too, but only
under torch.compile, and its gradient for a captured bias is added by atomics, whose order changes from run to
run.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibdistill.ops import custom, packed_attention
from ibdistill.ops.biased_attention import torch as in_torch
from ibdistill.ops.dropout_hash import draw, factor
from ibdistill.ops.implementation import choose

CHUNK_BYTES = 64 << 20
"""Bound of the scores that the torch implementation holds at once."""


def biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    causal: bool = False,
    rate: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """dropout(softmax(query key^T + bias)) value.

    Args:
        query: [B, H, T, D], of any strides; scores are not scaled.
        key, value: [B, H, S, D], in query's dtype.
        bias: [H, T + S - 1], float32 (float64 for a float64 query): that of key j for query i is at
            j - i + T - 1.
        mask: bool [B, S], True for keys that are seen; None: all. A query that sees no key gives zeros.
        lengths: of the sequences of packed rows, as `packed_attention.as_mask` gives them, in the place of a
            mask; None: rows are not packed. Query, key and value are then rows [1, H, tokens, D], sequences
            attend within themselves, i and j count within a sequence, and T and S are the lengths of the
            longest.
        causal: whether query i sees keys up to i only.
        rate: of dropout, in [0, 1); its seed is drawn from torch's generator of query's device.
        impl: triton (on a GPU, or anywhere under TRITON_INTERPRET=1), torch, or auto: triton for tensors on
            a GPU where triton is installed, but not for float64.

    Returns:
        [B, T, H, D], contiguous, in query's dtype, differentiable once for query, key, value and bias.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, unknown impl, impl = triton where it can't run.
    """
    sizes = None if lengths is None else packed_attention.sizes_of(lengths)
    _check(query, key, value, bias, mask, sizes, rate)
    seed, level, _ = draw(rate, query.device)
    ends, longest = None, 0
    if sizes is not None:
        ends, longest = packed_attention.ends(sizes, query.device), max(sizes[0])
    return _BiasedAttention.apply(query, key, value, bias, mask, ends, longest, seed, causal, level, impl)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, ends: Tensor | None,
    longest: int, seed: Tensor, causal: bool, level: int, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    arguments = query, key, value, bias, mask, ends, longest, seed, causal, level, factor(level)
    with torch.autocast(query.device.type, enabled=False):
        if choose("attention with a bias", impl, query) == "triton":
            from ibdistill.ops.biased_attention import triton

            return triton.forward(*arguments)
        return in_torch.forward(*arguments, CHUNK_BYTES)


def _backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None,
    ends: Tensor | None, longest: int, seed: Tensor, out: Tensor, logs: Tensor,
    causal: bool, level: int, impl: str, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    arguments = gradient, query, key, value, bias, mask, ends, longest, seed, out, logs
    settings = causal, level, factor(level)
    with torch.autocast(query.device.type, enabled=False):
        if choose("attention with a bias", impl, query) == "triton":
            from ibdistill.ops.biased_attention import triton

            return triton.backward(*arguments, *settings, needs_bias)
        return in_torch.backward(*arguments, *settings, CHUNK_BYTES, needs_bias)


def _fake_forward(query, key, value, bias, mask, ends, longest, seed, causal, level, impl):
    B, H, T, D = query.shape
    logs = (B, H, T) if ends is None else (ends.shape[1] - 1, H, longest)
    return query.new_empty(B, T, H, D), bias.new_empty(logs)


def _fake_backward(
    gradient, query, key, value, bias, mask, ends, longest, seed, out, logs, causal, level, impl, needs_bias
):  # fmt: skip
    d_bias = bias.new_empty(bias.shape if needs_bias else 0)
    gradients = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value))
    return *gradients, d_bias


_forward_op = custom.opaque("biased_attention", _forward, _fake_forward)
_backward_op = custom.opaque("biased_attention_backward", _backward, _fake_backward)


class _BiasedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, bias, mask, ends, longest: int, seed, causal: bool, level: int, impl):
        out, logs = _forward_op(query, key, value, bias, mask, ends, longest, seed, causal, level, impl)
        ctx.save_for_backward(query, key, value, bias, mask, ends, seed, out, logs)
        ctx.settings = longest, causal, level, impl
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        needs = ctx.needs_input_grad
        *tensors, seed, out, logs = ctx.saved_tensors
        longest, *settings = ctx.settings
        gradients = _backward_op(gradient, *tensors, longest, seed, out, logs, *settings, needs[3])
        wanted = (d if need else None for d, need in zip(gradients, needs, strict=False))
        return *wanted, *[None] * 7


def _check(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None,
    sizes: packed_attention.Sizes | None, rate: float,
) -> None:  # fmt: skip
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(f"query and key must be [B, H, T, D], not {list(query.shape)} and {list(key.shape)}")
    B, H, T, D = query.shape
    S = key.shape[2]
    if key.shape != (B, H, S, D) or value.shape != key.shape or min(T, S, D) == 0:
        raise ValueError(
            f"key and value must be [B, H, S, D] = [{B}, {H}, S, {D}] with S >= 1, not {list(key.shape)} and "
            f"{list(value.shape)}"
        )
    if sizes is not None:
        if B != 1 or mask is not None or (sum(sizes[0]), sum(sizes[1])) != (T, S):
            raise ValueError(
                f"packed rows must be one row each, without a mask, of the lengths' sums {sum(sizes[0])} and "
                f"{sum(sizes[1])}, not {B} of {T} and {S}" + (" with a mask" if mask is not None else "")
            )
        T, S = max(sizes[0]), max(sizes[1])
    if bias.shape != (H, T + S - 1):
        raise ValueError(f"bias must be [H, T + S - 1] = [{H}, {T + S - 1}], not {list(bias.shape)}")
    if mask is not None and (mask.shape != (B, S) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool [B, S] = [{B}, {S}], not {mask.dtype} {list(mask.shape)}")
    if not 0 <= rate < 1:
        raise ValueError(f"rate = {rate} is not in [0, 1)")
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not key.dtype == value.dtype == query.dtype or bias.dtype != wide:
        raise ValueError(
            f"key and value must have query's dtype {query.dtype} and bias {wide}, not {key.dtype}, "
            f"{value.dtype} and {bias.dtype}"
        )
    for name, x in {"key": key, "value": value, "bias": bias, "mask": mask}.items():
        if x is not None and x.device != query.device:
            raise ValueError(f"{name} is on {x.device}, query on {query.device}: put them on one device")
