"""Attention within packed sequences against a formula, and what is handed to a GPU's kernel."""

from __future__ import annotations

import pytest
import torch

from ibdistill.ops import packed_attention as ops

LENGTHS = torch.tensor([7, 1, 19, 6, 18, 2], dtype=torch.int32)
FEWER = torch.tensor([3, 1, 0, 4, 20, 4], dtype=torch.int32)
"""Queries in cross-attention: one sequence has none."""


def formula(query, key, value, lengths, scale=0.3, causal=True, window=None, bias=None):
    """One sequence after the other, from the definition: [1, T, H, D]. `bias`: [H], times the distance."""
    repeats, outs, starts = query.shape[1] // key.shape[1], [], [0, 0]
    key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
    for length, length_k in zip(*lengths, strict=True):
        ends = [starts[0] + length, starts[1] + length_k]
        q, k, v = (p[0, :, starts[s] : ends[s]] for p, s in ((query, 0), (key, 1), (value, 1)))
        distance = torch.arange(length_k) - torch.arange(length)[:, None]
        scores = q @ k.transpose(1, 2) * scale
        if bias is not None:
            scores = scores + bias[:, None, None] * distance
        seen = (distance <= 0) & (distance > -(window or length_k)) if causal else distance > -length
        scores = scores.masked_fill(~seen, -torch.inf)
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
        starts = ends
    return torch.cat(outs)[None]


def inputs(lengths=LENGTHS, dtype=torch.float64):
    torch.manual_seed(0)
    totals = (int(lengths.sum()), int(LENGTHS.sum()), int(LENGTHS.sum()))
    shapes = zip((4, 2, 2), totals, strict=True)
    return [torch.randn(1, heads, total, 4, dtype=dtype, requires_grad=True) for heads, total in shapes]


def attend(query, key, value, mask, bias, causal=True):
    if bias is not None:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool) if mask is None else mask
        mask = bias.masked_fill(~(seen.tril() if causal else seen), -torch.inf)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal and mask is None, scale=0.3, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.fixture(params=[0.0, 0.1, 0.5, 1.0])
def _slack(request, monkeypatch):
    monkeypatch.setattr(ops, "SLACK", request.param)
    ops._plan.cache_clear()
    yield
    ops._plan.cache_clear()


def check(got, expected, leaves):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(out, leaves, upstream) for out in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)


@pytest.mark.usefixtures("_slack")
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_causal_values_and_gradients(window):
    leaves = inputs()
    got = ops.packed_attention(attend, *leaves, ops.as_mask(LENGTHS), scale=0.3, window=window)
    check(got, formula(*leaves, (LENGTHS, LENGTHS), window=window), leaves)


@pytest.mark.usefixtures("_slack")
@pytest.mark.parametrize(
    ("queries", "causal"),
    [(LENGTHS, True), (LENGTHS, False), (FEWER, False)],
    ids=["causal", "self", "cross"],
)
def test_a_bias_by_distance_and_attention_to_another_row(queries, causal):
    leaves, slope = inputs(queries), torch.randn(4, dtype=torch.float64, requires_grad=True)
    lengths = ops.as_mask(queries, LENGTHS)
    bias = slope[:, None] * ops.distances(lengths, torch.device("cpu"))

    def block(*parts):
        return attend(*parts, causal=causal)

    got = ops.packed_attention(block, *leaves, lengths, scale=0.3, causal=causal, bias=bias)
    check(got, formula(*leaves, (queries, LENGTHS), causal=causal, bias=slope), [*leaves, slope])


def test_the_variable_length_kernel_gets_the_row_as_it_is(monkeypatch):
    """The kernel runs on a GPU alone; here a formula that reads its arguments stands for it."""

    def kernel(query, key, value, ends, ends_k, longest, longest_k, *, scale, window_size, enable_gqa):
        assert ends.dtype == ends_k.dtype == torch.int32
        lengths = ends.diff(), ends_k.diff()
        assert (longest, longest_k) == tuple(int(part.max()) for part in lengths)
        assert query.is_contiguous() and enable_gqa
        window = None if window_size[0] < 0 else window_size[0] + 1
        rows = [part.transpose(0, 1)[None] for part in (query, key, value)]
        return formula(*rows, lengths, scale, window_size[1] == 0, window)[0]

    monkeypatch.setattr(ops.varlen, "varlen_attn", kernel)
    for queries, causal, window in ((LENGTHS, True, None), (LENGTHS, True, 5), (FEWER, False, None)):
        rows, sizes = inputs(queries), ops.sizes_of(ops.as_mask(queries, LENGTHS))
        got = ops._varlen(*rows, sizes, 0.3, causal, window)
        expected = formula(*rows, (queries, LENGTHS), 0.3, causal, window)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_sequences_of_near_equal_length_share_a_block():
    lengths = tuple(LENGTHS.tolist())
    assert ops.groups((lengths, lengths)) == [[2, 4], [0], [3], [5], [1]]
    assert ops.groups(((5, 5, 5, 0, 2), (9, 20, 19, 9, 9))) == [[1, 2], [0], [4]]
    assert not ops.is_packed(None) and not ops.is_packed(torch.ones(1, 1, 2, 2, dtype=torch.bool))
