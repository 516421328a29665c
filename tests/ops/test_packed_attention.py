"""Attention within packed sequences against a formula, and what is handed to a GPU's kernel."""

from __future__ import annotations

import pytest
import torch

from ibdistill.ops import packed_attention as ops

LENGTHS = torch.tensor([7, 1, 19, 6, 18, 2], dtype=torch.int32)


def formula(query, key, value, lengths, scale, window=None):
    """One sequence after the other, from the definition: [1, T, H, D]."""
    repeats, outs, start = query.shape[1] // key.shape[1], [], 0
    key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
    for length in lengths.tolist():
        q, k, v = (part[0, :, start : start + length] for part in (query, key, value))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance < (window or length))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
        start += length
    return torch.cat(outs)[None]


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    total = int(LENGTHS.sum())
    return [torch.randn(1, heads, total, 4, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]


def attend(query, key, value, mask):
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=0.3, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("slack", [0.0, 0.1, 0.5, 1.0])
def test_values_and_gradients(monkeypatch, window, slack):
    monkeypatch.setattr(ops, "SLACK", slack)
    for cached in (ops._blocks, ops._places):
        cached.cache_clear()
    q, k, v = inputs()
    got = ops.packed_attention(attend, q, k, v, ops.as_mask(LENGTHS), scale=0.3, window=window)
    expected = formula(q, k, v, LENGTHS, 0.3, window)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(out, (q, k, v), upstream) for out in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for cached in (ops._blocks, ops._places):
        cached.cache_clear()


def test_the_variable_length_kernel_gets_the_row_as_it_is(monkeypatch):
    """The kernel runs on a GPU alone; here a formula that reads its arguments stands for it."""

    def kernel(query, key, value, ends, ends_k, longest, longest_k, *, scale, window_size, enable_gqa):
        assert ends.dtype == torch.int32 and ends is ends_k and longest == longest_k == 19
        assert query.is_contiguous() and enable_gqa and window_size[1] == 0
        window = None if window_size[0] < 0 else window_size[0] + 1
        rows = [part.transpose(0, 1)[None] for part in (query, key, value)]
        return formula(*rows, ends.diff(), scale, window)[0]

    monkeypatch.setattr(ops.varlen, "varlen_attn", kernel)
    rows = inputs()
    for window in (None, 5):
        got = ops._varlen(*rows, tuple(LENGTHS.tolist()), 0.3, window)
        torch.testing.assert_close(got, formula(*rows, LENGTHS, 0.3, window), rtol=0, atol=0)


def test_sequences_of_near_equal_length_share_a_block():
    assert ops.groups(LENGTHS.tolist()) == [[2, 4], [0], [3], [5], [1]]
    assert not ops.is_packed(None) and not ops.is_packed(torch.ones(1, 1, 2, 2, dtype=torch.bool))
