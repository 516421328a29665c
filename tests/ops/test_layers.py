"""Layers that keep little: values and gradients against the formulas under autograd, masks by statistics."""

import pytest
import torch
from torch import nn

from ibdistill.ops import layers

SHAPES = [(1, 1), (7,), (2, 3, 5), (0, 4)]


def rms_norm_reference(x, weight, epsilon):
    return weight * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


def gated_reference(gate, up):
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def randn(*shape, generator, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, generator):
    x, up = (randn(*shape, generator=generator) for _ in range(2))
    weight, upstream = randn(shape[-1], generator=generator), randn(*shape, generator=generator).detach()
    for ours, reference, inputs in (
        (layers.rms_norm(x, weight, 1e-3), rms_norm_reference(x, weight, 1e-3), [x, weight]),
        (layers.gated_gelu(x, up, 0.0), gated_reference(x, up), [x, up]),
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(ours, inputs, upstream),
            torch.autograd.grad(reference, inputs, upstream),
            rtol=1e-10,
            atol=1e-10,
        )


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
    rounded = round(rate * layers.LEVELS) / layers.LEVELS
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
