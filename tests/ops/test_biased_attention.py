"""Attention with a bias for each distance in torch: values, gradients, memory and dropout."""

import pytest
import torch
from biased_attention_cases import CASES, PACKED, evaluate, kept, make, make_packed, packed_truth, truth
from torch.nn import functional as F

from ibdistill.ops.biased_attention import api, biased_attention
from ibdistill.ops.biased_attention.reference import biased_attention_reference
from ibdistill.ops.packed_attention import as_mask


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("chunk_bytes", [1, 3000, 1 << 30])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, chunk_bytes, rate, generator, monkeypatch):
    monkeypatch.setattr(api, "CHUNK_BYTES", chunk_bytes)
    inputs, mask, causal = make(case, generator)
    want = truth(case, inputs, mask, causal, rate, seed=3)
    torch.manual_seed(3)
    got = evaluate(biased_attention, inputs, mask=mask, causal=causal, rate=rate)
    assert got[0].is_contiguous()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("chunk_bytes", [3000, 1 << 30])
@pytest.mark.parametrize("case", PACKED)
def test_packed_rows_are_their_sequences_one_by_one(case, chunk_bytes, rate, generator, monkeypatch):
    monkeypatch.setattr(api, "CHUNK_BYTES", chunk_bytes)
    inputs, lengths, causal = make_packed(case, generator)
    want = packed_truth(case, inputs, rate, seed=3)
    torch.manual_seed(3)
    got = evaluate(biased_attention, inputs, lengths=lengths, causal=causal, rate=rate)
    assert got[0].is_contiguous()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_the_reference_is_torchs_attention(generator):
    """With the bias and the mask spelt out as one matrix per head."""
    for case in ("an encoder's padding", "a decoder", "fewer queries than keys"):
        (query, key, value, bias), mask, causal = make(case, generator)
        mask = mask[:1] if mask is not None else None
        query, key, value = (x[:1] for x in (query, key, value))
        T, S = query.shape[2], key.shape[2]
        matrix = torch.stack([bias[:, T - 1 - i : T - 1 - i + S] for i in range(T)], 1)
        seen = torch.ones(T, S, dtype=torch.bool).tril() if causal else torch.ones(T, S, dtype=torch.bool)
        seen = seen if mask is None else seen & mask[0]
        matrix = matrix.masked_fill(~seen, -torch.inf)
        want = F.scaled_dot_product_attention(query, key, value, matrix[None], scale=1.0).transpose(1, 2)
        got = biased_attention_reference(query, key, value, bias, mask, causal)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_narrow_dtypes_are_no_worse_than_eager_in_their_own(dtype, generator):
    case = "an encoder's padding"
    inputs, mask, causal = make(case, generator, dtype)
    true = truth(case, inputs, mask, causal)
    eager = [x.detach().to(dtype).requires_grad_() for x in inputs]
    theirs = evaluate(biased_attention_reference, eager, mask, causal)
    for mine, other, exact in zip(
        evaluate(biased_attention, inputs, mask=mask, causal=causal), theirs, true, strict=True
    ):
        error, allowed = (mine.double() - exact).norm(), (other.double() - exact).norm()
        # out, whose product with its gradient the backward pass takes, is rounded once more than in eager
        assert error <= 1.5 * allowed + 1e-6 * exact.norm()


def test_dropout_drops_its_share_and_its_masks_are_independent():
    api_rate = 0.1
    CASES["statistics"] = (2, 3, 96, 128, 1, False, False)
    try:
        first, second = (kept("statistics", api_rate, seed) != 0 for seed in (0, 1))
    finally:
        del CASES["statistics"]
    n, variance = first.numel(), api_rate * (1 - api_rate)
    assert abs((~first).double().mean() - api_rate) < 5 * (variance / n) ** 0.5
    dropped = (~first).flatten().double() - api_rate
    other = (~second).flatten().double() - api_rate
    for a, b in [(dropped, other), *((dropped[d:], dropped[:-d]) for d in (1, 2, 4, 64, 128, 96 * 128))]:
        assert abs((a * b).mean() / variance) < 5 * n**-0.5


def test_a_second_call_drops_others_and_the_same_seed_the_same(generator):
    (query, key, value, bias), _, _ = make("a decoder", generator)
    torch.manual_seed(0)
    runs = [biased_attention(query, key, value, bias, causal=True, rate=0.5) for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(runs[0], biased_attention(query, key, value, bias, causal=True, rate=0.5))
    assert not torch.equal(*runs)


def test_only_what_is_needed_gets_a_gradient(generator):
    inputs, mask, causal = make("an encoder's padding", generator)
    want = truth("an encoder's padding", inputs, mask, causal)
    for index in range(4):
        leaves = [x.detach().requires_grad_(i == index) for i, x in enumerate(inputs)]
        out = biased_attention(*leaves, mask=mask, causal=causal)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
        (found,) = torch.autograd.grad(out, [leaves[index]], upstream)
        torch.testing.assert_close(found, want[1 + index], rtol=1e-10, atol=1e-10)


def test_what_is_kept_for_the_backward_pass_is_linear(generator):
    B, H, T, D = 2, 3, 40, 4
    query, key, value = (torch.randn(B, H, T, D, generator=generator, requires_grad=True) for _ in range(3))
    bias, mask = torch.randn(H, 2 * T - 1, requires_grad=True), torch.ones(B, T, dtype=torch.bool)
    sizes = {}
    keep = lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        biased_attention(query, key, value, bias, mask=mask, rate=0.1)
    assert sum(sizes.values()) == 4 * (4 * B * H * T * D + B * H * T + H * (2 * T - 1)) + B * T + 8


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": torch.zeros(2, 3, 4)}, r"query and key must be \[B, H, T, D\]"),
        ({"value": torch.zeros(1, 2, 4, 5)}, r"key and value must be \[B, H, S, D\] = \[1, 2, S, 3\]"),
        ({"bias": torch.zeros(2, 8)}, r"bias must be \[H, T \+ S - 1\] = \[2, 7\], not \[2, 8\]"),
        ({"mask": torch.zeros(1, 3)}, r"mask must be bool \[B, S\] = \[1, 4\], not torch.float32 \[1, 3\]"),
        (
            {"lengths": as_mask(torch.tensor([3, 2]))},
            "one row each, without a mask, of the lengths' sums 5 and 5, not 1 of 4 and 4",
        ),
        (
            {"lengths": as_mask(torch.tensor([3, 1])), "mask": torch.ones(1, 4, dtype=torch.bool)},
            "sums 4 and 4, not 1 of 4 and 4 with a mask",
        ),
        ({"lengths": as_mask(torch.tensor([3, 1]))}, r"bias must be \[H, T \+ S - 1\] = \[2, 5\]"),
        ({"rate": 1.0}, r"rate = 1.0 is not in \[0, 1\)"),
        (
            {"key": torch.zeros(1, 2, 4, 3).half()},
            "must have query's dtype torch.float32 and bias torch.float32",
        ),
        ({"impl": "cuda"}, "impl"),
    ],
)
def test_bad_arguments_are_named(change, message):
    given = {name: torch.zeros(1, 2, 4, 3) for name in ("query", "key", "value")}
    given |= {"bias": torch.zeros(2, 7)}
    with pytest.raises(ValueError, match=message):
        biased_attention(**(given | change))
