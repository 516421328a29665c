"""Random inputs of the head loss, and how two implementations of it are compared."""

import itertools

import torch

from ibdistill.ops.head_loss.api import MISettings, Stream, Weights
from ibdistill.ops.head_loss.arguments import IGNORED

EVERY_MI = [
    MISettings(estimator, pool, gradient)
    for estimator, pool, gradient in itertools.product(
        ("paper", "normalized", "infonce"), ("max", "mean"), ("explain", "predict", "both")
    )
]

D, V = 7, 29
ROW = V * 8
# question 4 has no rationale, question 5 no label; the explain sequence of question 1 is the longest
PREDICT, EXPLAIN = [3, 4, 1, 1, 2, 0], [6, 19, 1, 2, 0, 3]
MIS = [None, *EVERY_MI]
PAIRED = [
    MISettings(estimator, pool, pair="teacher")
    for estimator, pool in itertools.product(("paper", "normalized"), ("max", "mean"))
]
WEIGHTS = Weights(ce_predict=0.7, ce_explain=0.4, mi=1.3)


def name_of(mi):
    if mi is None:
        return "no-mi"
    return f"{mi.estimator}-{mi.pool}-{mi.gradient if mi.pair == 'student' else 'teacher'}"


def make_stream(lengths, D, V, *, ignored=0.2, dtype=torch.float64, scale=1.0, generator=None):
    """A stream of the given lengths, about `ignored` of its positions ignored."""
    n = sum(lengths)
    labels = torch.randint(V, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = IGNORED
    hidden = (torch.randn(n, D, generator=generator, dtype=torch.float64) * scale).to(dtype)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return Stream(hidden, labels, cu)


def make_head(D, V, dtype=torch.float64, generator=None):
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(V, generator=generator, dtype=torch.float64).to(dtype)
    return weight, bias


def evaluate(function, predict, explain, weight, bias, upstream=1.0, needs=(True,) * 4, **arguments):
    """Total, terms, and the gradients (None where not needed) of both hidden states, weight and bias."""
    inputs = [predict.hidden, None if explain is None else explain.hidden, weight, bias]
    leafs = [
        None if x is None else x.detach().clone().requires_grad_(need)
        for x, need in zip(inputs, needs, strict=True)
    ]
    predict = predict._replace(hidden=leafs[0])
    explain = None if explain is None else explain._replace(hidden=leafs[1])
    total, terms = function(predict, explain, leafs[2], leafs[3], **arguments)
    if total.requires_grad:
        (total * upstream).backward()
    return total.detach(), terms, [None if x is None else x.grad for x in leafs]


def assert_same(got, want, rtol=1e-9, atol=1e-11):
    """Assert that totals, terms and gradients of two evaluations are close."""
    torch.testing.assert_close(got[0], want[0], rtol=rtol, atol=atol)
    assert got[1].keys() == want[1].keys()
    for name in want[1]:
        torch.testing.assert_close(
            got[1][name], want[1][name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, a, b in zip(("predict", "explain", "weight", "bias"), got[2], want[2], strict=True):
        assert (a is None) == (b is None), name
        if b is not None:
            torch.testing.assert_close(
                a, b, rtol=rtol, atol=atol, msg=lambda m, n=name: f"gradient of {n}: {m}"
            )
