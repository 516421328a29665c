"""Cases of attention with a bias that the tests of its implementations share."""

import torch

from ibdistill.ops.biased_attention.reference import biased_attention_reference
from ibdistill.ops.dropout_hash import LEVELS, keep
from ibdistill.ops.packed_attention import as_mask

CASES = {
    "one token": (1, 1, 1, 1, 3, False, False),
    "an encoder's padding": (3, 2, 19, 19, 16, True, False),
    "a decoder": (2, 3, 37, 37, 8, False, True),
    "causal and padded": (2, 1, 18, 18, 5, True, True),
    "fewer queries than keys": (2, 2, 5, 40, 16, True, False),
    "more queries than keys": (1, 2, 35, 3, 16, False, False),
    "whole blocks": (1, 1, 32, 16, 16, False, False),
}
"""Name -> B, H, T, S, D, with a mask, causal."""

PACKED = {
    "an encoder's row": ((19, 3, 17, 1), (19, 3, 17, 1), False),
    "a decoder's row": ((5, 33, 1, 18), (5, 33, 1, 18), True),
    "cross-attention": ((4, 0, 37, 1), (18, 7, 2, 19), False),
}
"""Name -> queries and keys of the sequences of a packed row, causal."""


def make(case, generator, dtype=torch.float64):
    """Leaves [query, key, value, bias], the mask and causal, of a case; the views are strided as T5's are."""
    B, H, T, S, D, masked, causal = CASES[case]

    def heads(length):
        return (
            torch.randn(B, length, H, D, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        )

    bias = torch.randn(H, T + S - 1, generator=generator, dtype=torch.float64)
    bias = bias if dtype == torch.float64 else bias.float()
    mask = None
    if masked:  # rows of every length, one without any key
        lengths = torch.linspace(S, 0, B).round().int()
        mask = torch.arange(S)[None, :] < lengths[:, None]
    return [x.requires_grad_() for x in (heads(T), heads(S), heads(S), bias)], mask, causal


def evaluate(function, inputs, *args, **kwargs):
    """[out, gradients of the inputs] for a random upstream gradient."""
    out = function(*inputs, *args, **kwargs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def kept(case, rate, seed):
    """What dropout multiplies the probabilities with after `torch.manual_seed(seed)`, [B, H, T, S]."""
    B, H, T, S, *_ = CASES[case]
    torch.manual_seed(seed)
    word, level = torch.empty(1, dtype=torch.int64).random_(-(2**63), None), round(rate * LEVELS)
    mask = keep(word, torch.arange(B * H * T)[:, None], torch.arange(S), level)
    return mask.view(B, H, T, S).double() * LEVELS / (LEVELS - level)


def truth(case, inputs, mask, causal, rate=0.0, seed=0):
    """[out, gradients] of the reference in float64."""
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    keep_mask = kept(case, rate, seed) if rate else None
    return evaluate(biased_attention_reference, doubles, mask, causal, keep_mask)


def make_packed(case, generator, dtype=torch.float64):
    """Leaves [query, key, value, bias], of 2 heads of 5, `biased_attention`'s lengths, and causal."""
    queries, keys, causal = PACKED[case]

    def heads(length):
        return (
            torch.randn(1, length, 2, 5, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        )

    bias = torch.randn(2, max(queries) + max(keys) - 1, generator=generator, dtype=torch.float64)
    bias = bias if dtype == torch.float64 else bias.float()
    leaves = [x.requires_grad_() for x in (heads(sum(queries)), heads(sum(keys)), heads(sum(keys)), bias)]
    return leaves, as_mask(torch.tensor(queries), torch.tensor(keys)), causal


def packed_truth(case, inputs, rate=0.0, seed=0):
    """[out, gradients] of the reference in float64, called for one sequence after the other."""
    queries, keys, causal = PACKED[case]
    longest = max(queries)
    word, level = torch.empty(1, dtype=torch.int64), round(rate * LEVELS)
    torch.manual_seed(seed)
    word.random_(-(2**63), None)
    doubles = [x.detach().double().requires_grad_() for x in inputs]

    def each(query, key, value, bias):
        outs = []
        rows = zip(query.split(queries, 2), key.split(keys, 2), value.split(keys, 2), strict=True)
        for b, (q, k, v) in enumerate(rows):
            T, S = q.shape[2], k.shape[2]
            mask = None
            if rate:
                places = (b * 2 + torch.arange(2)[:, None]) * longest + torch.arange(T)
                mask = keep(word, places[..., None], torch.arange(S), level)[None].double()
                mask = mask * LEVELS / (LEVELS - level)
            own = bias[:, longest - T : longest + S - 1]
            outs += [biased_attention_reference(q, k, v, own, None, causal, mask)] if T else []
        return torch.cat(outs, 1)

    return evaluate(each, doubles)
