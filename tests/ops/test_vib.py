"""The bottleneck's noise and its KL term, against torch's distributions and a channel of known
information."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ibdistill.ops.vib import add_noise, vib_terms

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])


def make(dtype, width=7):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 5, width, generator=generator, dtype=torch.float64)
    log_variance = torch.randn(width, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (states, log_variance)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_the_penalty_is_the_divergence_of_torchs_normal_distributions(dtype, tolerance):
    states, g = make(dtype)
    kl, squares = vib_terms(states, g, MASK)
    exact = [x.detach().double().requires_grad_() for x in (states, g)]
    each = kl_divergence(Normal(exact[0], torch.exp(exact[1] / 2)), Normal(0.0, 1.0)).sum(-1)
    expected = each[MASK.bool()].sum()
    assert kl.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(kl.double(), expected, rtol=tolerance, atol=0)
    (-0.3 * kl).backward()
    (-0.3 * expected).backward()
    for ours, theirs in zip((states, g), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)
    assert not states.grad[MASK == 0].any()
    # d KL / d mu = mu, hence the norm by which the term's gradient is measured
    torch.testing.assert_close(
        0.09 * squares.double(), states.grad.double().square().sum(), rtol=0.02, atol=0
    )


def test_no_token_costs_nothing():
    states, g = make(torch.float32)
    terms = vib_terms(states, g, torch.zeros_like(MASK))
    assert [float(x.detach()) for x in terms] == [0.0, 0.0]


def test_the_noise_has_the_learned_deviation_in_each_dimension_and_a_gradient():
    torch.manual_seed(0)
    g = torch.tensor([0.0, -2.0, 1.0], requires_grad=True)
    states = torch.randn(200, 500, 3)
    noise = add_noise(states, g) - states
    torch.testing.assert_close(noise.flatten(0, 1).std(0), torch.exp(g / 2), rtol=0.02, atol=0)
    assert noise.mean().abs() < 0.01
    drawn = noise.detach() / torch.exp(g / 2).detach()
    noise[0, 0].sum().backward()
    torch.testing.assert_close(g.grad, (0.5 * torch.exp(g / 2) * drawn[0, 0]).detach(), rtol=1e-3, atol=1e-4)
    assert add_noise(states.bfloat16(), g).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("power", "variance", "slack"), [(0.75, 0.25, 0.0), (2.0, 0.25, 0.2), (0.5, 0.1, 0.05)]
)
def test_the_mean_penalty_bounds_a_gaussian_channels_information(power, variance, slack):
    """X ~ N(0, power), Z = X + noise: I = ln(1 + power / variance) / 2, met where Z is standard normal."""
    torch.manual_seed(0)
    draws = torch.randn(1, 400_000, 1) * power**0.5
    kl, _ = vib_terms(draws, torch.tensor([math.log(variance)]), torch.ones(1, 400_000))
    gap = float(kl) / 400_000 - 0.5 * math.log(1 + power / variance)
    assert gap > slack - 0.01 and (slack or abs(gap) < 0.01)
