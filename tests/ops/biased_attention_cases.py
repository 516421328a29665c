"""Cases of attention with a bias that the tests of its implementations share."""

import torch

from ibdistill.ops.biased_attention.reference import biased_attention_reference
from ibdistill.ops.dropout_hash import LEVELS, keep

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
