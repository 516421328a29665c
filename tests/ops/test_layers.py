"""Layers that keep little: values and gradients against the formulas under autograd, masks by statistics."""

import itertools

import pytest
import torch
from torch import nn

from ibdistill.ops import layers
from ibdistill.ops.cpu.attention import attention
from ibdistill.ops.cpu.dropout import LEVELS

SHAPES = [(1, 1), (7,), (2, 3, 5), (0, 4)]


def rms_norm_reference(x, weight, epsilon):
    return weight * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


def gated_reference(gate, up):
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def randn(*shape, generator, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def check(ours, reference, inputs, upstream):
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(reference, inputs, upstream),
        rtol=1e-10,
        atol=1e-10,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, generator):
    x, up = (randn(*shape, generator=generator) for _ in range(2))
    weight, upstream = randn(shape[-1], generator=generator), randn(*shape, generator=generator).detach()
    for ours, reference, inputs in (
        (layers.rms_norm(x, weight, 1e-3), rms_norm_reference(x, weight, 1e-3), [x, weight]),
        (layers.gated_gelu(x, up, 0.0), gated_reference(x, up), [x, up]),
    ):
        check(ours, reference, inputs, upstream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_are_no_worse_than_eager_in_their_own(dtype, generator):
    x, up, weight = (randn(9, 64, generator=generator, dtype=dtype) for _ in range(3))
    weight = weight[0].detach().requires_grad_()
    upstream = randn(9, 64, generator=generator, dtype=dtype).detach()

    def results(function, *inputs):
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]

    for ours, eager, inputs in (
        (lambda x, w: layers.rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), (x, weight)),
        (lambda x, u: layers.gated_gelu(x, u, 0.0), gated_reference, (x, up)),
    ):
        truth = results(eager, *(t.detach().double().requires_grad_() for t in inputs))
        for mine, theirs, true in zip(results(ours, *inputs), results(eager, *inputs), truth, strict=True):
            assert mine.dtype == theirs.dtype == dtype
            error, allowed = (mine.double() - true).norm(), (theirs.double() - true).norm()
            assert error <= 1.1 * allowed + 1e-7 * true.norm()


def test_a_frozen_weight_gets_no_gradient(generator):
    x = randn(3, 5, generator=generator)
    layers.rms_norm(x, torch.ones(5, dtype=torch.float64), 1e-6).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_keeps_the_mean(rate, dtype):
    torch.manual_seed(0)
    x = torch.ones(401, 499, dtype=dtype, requires_grad=True)
    out = layers.dropout(x, rate)
    kept = out != 0
    sigma = (rate * (1 - rate) / x.numel()) ** 0.5
    assert abs((~kept).double().mean() - rate) < 5 * sigma
    rounded = round(rate * LEVELS) / LEVELS
    torch.testing.assert_close(out[kept].unique(), torch.tensor([1 / (1 - rounded)], dtype=dtype))
    # neighbours are independent, within the words of 16-bit draws and between them
    dropped = (~kept).flatten().double() - rate
    for distance in (1, 2, 3, 4, 499):
        correlation = (dropped[distance:] * dropped[:-distance]).mean() / (rate * (1 - rate))
        assert abs(correlation) < 5 * x.numel() ** -0.5
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(gradient, out)


def test_the_gates_dropout_is_dropout_of_the_gate(generator):
    gate, up = (randn(33, 7, generator=generator) for _ in range(2))
    torch.manual_seed(1)
    ours = layers.gated_gelu(gate, up, 0.3)
    torch.manual_seed(1)
    expected = layers.dropout(gated_reference(gate, up), 0.3)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    upstream = randn(33, 7, generator=generator).detach()
    torch.testing.assert_close(
        torch.autograd.grad(ours, [gate, up], upstream), torch.autograd.grad(expected, [gate, up], upstream)
    )


def test_the_module_is_the_identity_in_evaluation():
    module, x = layers.Dropout(0.5), torch.randn(50)
    assert torch.equal(module.eval()(x), x)
    assert not torch.equal(module.train()(x), x)


def test_what_is_kept_for_the_backward_pass(generator):
    n, d = 8, 256
    x, up = (randn(n, d, generator=generator, dtype=torch.float32) for _ in range(2))
    weight = nn.Parameter(torch.ones(d))

    def kept(function) -> int:
        sizes = {}
        keep = lambda t: sizes.update({t.data_ptr(): t.nbytes}) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            function()
        return sum(sizes.values())

    assert kept(lambda: layers.dropout(x, 0.1)) == n * d
    assert kept(lambda: layers.rms_norm(x, weight, 1e-6)) == 4 * (n * d + d + n)
    assert kept(lambda: layers.gated_gelu(x, up, 0.1)) == 4 * 2 * n * d + n * d
    query, key = (randn(2, 3, length, 8, generator=generator, dtype=torch.float32) for length in (5, 7))
    bias = randn(1, 3, 5, 7, generator=generator, dtype=torch.float32)
    probabilities = 2 * 3 * 5 * 7
    inputs = 4 * (query.numel() + key.numel())  # the key is the value too
    assert kept(lambda: attention(query, key, key, bias=bias, rate=0.1)) == inputs + 5 * probabilities


def attention_reference(query, key, value, bias, mask, scale, keep=1.0):
    scores = scale * torch.einsum("bhtd,bhsd->bhts", query, key)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores + added(mask, scores.dtype)
    exponential = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhts,bhse->bhte", exponential / exponential.sum(-1, keepdim=True) * keep, value)


def added(mask, dtype):
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def attention_inputs(generator, dtype=torch.float64, sizes=(3, 2, 5, 7, 4, 6)):
    """Query, key, value; biases; masks, in the first of which one query sees no key."""
    b, h, t, s, d, e = sizes
    shapes = (b, h, t, d), (b, h, s, d), (b, h, s, e)
    inputs = [randn(*shape, generator=generator, dtype=dtype) for shape in shapes]
    biases = [None, randn(1, h, t, s, generator=generator, dtype=dtype)]
    seen = torch.rand(b, 1, t, s, generator=generator) > 0.3
    seen[0, 0, 0] = False
    floats = randn(b, 1, 1, s, generator=generator, dtype=dtype).detach()
    return inputs, biases, [None, seen, seen[:, :, :1], floats]


def test_attention_and_its_gradients(generator):
    inputs, biases, masks = attention_inputs(generator)
    upstream = randn(3, 2, 5, 6, generator=generator).detach()
    for bias, mask, scale in itertools.product(biases, masks, (1.0, 0.7)):
        leafs = inputs + ([] if bias is None else [bias])
        ours = attention(*inputs, bias=bias, mask=mask, scale=scale)
        reference = attention_reference(*inputs, bias, mask, scale)
        check(ours, reference, leafs, upstream)


def test_attentions_dropout_is_dropout_of_its_probabilities(generator):
    inputs, (_, bias), (_, mask, *_) = attention_inputs(generator)
    leafs, upstream = [*inputs, bias], randn(3, 2, 5, 6, generator=generator).detach()
    torch.manual_seed(2)
    ours = attention(*inputs, bias=bias, mask=mask, rate=0.4)
    torch.manual_seed(2)
    keep = layers.dropout(torch.ones(3, 2, 5, 7, dtype=torch.float64), 0.4)
    assert 0 < (keep == 0).sum() < keep.numel()
    expected = attention_reference(*inputs, bias, mask, 1.0, keep)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leafs, upstream), torch.autograd.grad(expected, leafs, upstream)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_attention_is_no_worse_than_eager_in_its_own(dtype, generator):
    inputs, (_, bias), (_, mask, *_) = attention_inputs(generator, dtype, (3, 2, 33, 40, 16, 16))
    leafs = [*inputs, bias]
    upstream = randn(3, 2, 33, 16, generator=generator, dtype=dtype).detach()

    def results(function, leafs):
        out = function(*leafs)
        return [out, *torch.autograd.grad(out, leafs, upstream.to(out.dtype))]

    def eager(query, key, value, bias):
        scores = query @ key.mT + (bias + added(mask, dtype))
        return torch.softmax(scores.float(), -1).to(value.dtype) @ value

    def exact(query, key, value, bias):
        return attention_reference(query, key, value, bias, mask, 1.0)

    truth = results(exact, [t.detach().double().requires_grad_() for t in leafs])
    ours = results(lambda q, k, v, b: attention(q, k, v, bias=b, mask=mask), leafs)
    for mine, theirs, true in zip(ours, results(eager, leafs), truth, strict=True):
        assert mine.dtype == dtype
        error, allowed = (mine.double() - true).norm(), (theirs.double() - true).norm()
        assert error <= 1.1 * allowed + 1e-7 * true.norm()
