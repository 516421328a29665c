"""The estimators against torch, their formulas, and cases whose true mutual information is known."""

import math

import pytest
import torch
from head_loss_cases import make_stream

from ibdistill.ops.head_loss import infonce as infonce_module
from ibdistill.ops.head_loss.api import Stream, head_loss
from ibdistill.ops.head_loss.arguments import MISettings, Weights
from ibdistill.ops.head_loss.estimators import barber_agakov, infonce, normalized, paper
from ibdistill.ops.head_loss.reference import head_loss_reference

LENGTHS = ([3, 1, 6, 2], [5, 4, 1, 8])


def pooled(stream, weight, b, pool):
    p = torch.softmax(stream.hidden[stream.cu[b] : stream.cu[b + 1]] @ weight.T, -1)
    return p.max(0).values if pool == "max" else p.mean(0)


@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize("function", [head_loss, head_loss_reference])
def test_pooled_forms_are_their_formulas_on_ragged_lengths(function, pool, generator):
    D, V = 5, 31
    predict, explain = (make_stream(x, D, V, ignored=0, generator=generator) for x in LENGTHS)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    P = torch.stack([pooled(predict, weight, b, pool) for b in range(4)])
    E = torch.stack([pooled(explain, weight, b, pool) for b in range(4)])

    _, terms = function(predict, explain, weight, weights=Weights(0, 0, 1), mi=MISettings("paper", pool))
    want = torch.nn.functional.cross_entropy(E, P, reduction="sum")
    torch.testing.assert_close(terms["mi"], want, rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["mi_constant"], P.sum() * math.log(V), rtol=1e-12, atol=0)

    _, terms = function(predict, explain, weight, weights=Weights(0, 0, 1), mi=MISettings("normalized", pool))
    P, E = P / P.sum(-1, keepdim=True), E / E.sum(-1, keepdim=True)
    torch.testing.assert_close(terms["mi"], -(P * E.log()).sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["mi_entropy"], -(P * P.log()).sum(), rtol=1e-12, atol=0)
    marginal = P.mean(0)
    bound = 4 * -(marginal * marginal.log()).sum() + (P * E.log()).sum()
    torch.testing.assert_close(terms["mi_bound"], bound, rtol=1e-12, atol=0)


def test_paper_term_hardly_leaves_its_constant():
    """With T5's vocabulary, 4 positions and logits of deviation 3 it is 39.7, and a perfect match 0.1
    less."""
    g = torch.Generator().manual_seed(0)
    P, E = (torch.log_softmax(3 * torch.randn(8, 4, 32128, generator=g), -1).amax(1) for _ in range(2))
    random, match = paper(P, E), paper(P, P)
    constant = random["mi_constant"].mean().item()
    assert constant == pytest.approx(39.706, abs=0.15)
    assert random["mi"].mean().item() - constant == pytest.approx(0.0, abs=0.002)
    assert match["mi"].mean().item() - constant == pytest.approx(39.605 - 39.706, abs=0.04)


# joint counts of (z, y): dependent, independent, and y a function of z
JOINTS = [
    [[6, 1, 1], [1, 6, 1], [2, 2, 4]],
    [[2, 4, 2], [1, 2, 1], [3, 6, 3]],
    [[5, 0, 0], [0, 3, 0], [0, 0, 4]],
]


def true_information(counts):
    joint = torch.tensor(counts, dtype=torch.float64)
    joint = joint / joint.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return torch.xlogy(joint, joint / independent).nansum().item()


@pytest.mark.parametrize("counts", JOINTS)
def test_normalized_bound_is_the_information_with_the_true_conditional(counts):
    counts_ = torch.tensor(counts)
    pairs = [(z, y) for z in range(3) for y in range(3) for _ in range(counts_[z, y])]
    z, y = torch.tensor(pairs).T
    n = len(pairs)
    target = torch.full((n, 3), -torch.inf, dtype=torch.float64)
    target[torch.arange(n), y] = 0.0
    conditional = (counts_ / counts_.sum(1, keepdim=True)).to(torch.float64)

    def bound(q):
        loss = normalized(target, q[z].clamp_min(1e-300).log())["mi"].sum()
        return barber_agakov(target.exp().sum(0), loss, n).item() / n

    information = true_information(counts)
    assert bound(conditional) == pytest.approx(information, abs=1e-12)
    wrong = 0.7 * conditional + 0.3 / 3
    assert bound(wrong) <= information + 1e-12
    assert bound(torch.full((3, 3), 1 / 3, dtype=torch.float64)) <= 1e-12


@pytest.mark.parametrize("counts", JOINTS[:2])
def test_normalized_bound_through_the_head_loss(counts):
    """With W = 1 hidden states are logits; predict is certain of y, and explain knows p(y | z)."""
    counts_ = torch.tensor(counts)
    pairs = [(z, y) for z in range(3) for y in range(3) for _ in range(counts_[z, y])]
    z, y = torch.tensor(pairs).T
    cu = torch.arange(len(pairs) + 1, dtype=torch.int32)
    sure = 60.0 * torch.nn.functional.one_hot(y, 3).to(torch.float64)
    knows = (counts_ / counts_.sum(1, keepdim=True)).to(torch.float64).log()[z]
    _, terms = head_loss(
        Stream(sure, y, cu),
        Stream(knows, y, cu),
        torch.eye(3, dtype=torch.float64),
        weights=Weights(1),
        mi=MISettings("normalized"),
    )
    assert (terms["mi_bound"] / len(pairs)).item() == pytest.approx(true_information(counts), abs=1e-9)
    # a certain target has no entropy, and for a length of 1 the loss is the label's cross entropy
    assert terms["mi_entropy"].item() == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(terms["mi"], terms["ce_explain"], rtol=1e-9, atol=0)


def test_normalized_survives_probabilities_that_underflow():
    target = torch.tensor([[0.0, -200.0]])
    estimate = torch.tensor([[-300.0, 0.0]], requires_grad=True)
    terms = normalized(target, estimate)
    assert terms["mi"].item() == pytest.approx(300.0)
    (gradient,) = torch.autograd.grad(terms["mi"].sum(), estimate)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0]]))


def gaussian_features(n, d, rho, generator, sharpness=1.0):
    """Correlated Gaussians as unit vectors whose cosine / temperature is the optimal InfoNCE critic.

    log p(y | x) - log p(y) = rho / (1 - rho^2) x.y - rho^2 / (2 (1 - rho^2)) |y|^2 + f(x), an inner
    product of (x, 1) and (a y, -c |y|^2); one more coordinate each brings all to the same norm.
    Returns them, the temperature, and the mean of the true pointwise mutual information.
    """
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = rho * x + math.sqrt(1 - rho**2) * torch.randn(n, d, generator=generator, dtype=torch.float64)
    a, c = sharpness * rho / (1 - rho**2), sharpness * rho**2 / (2 * (1 - rho**2))
    left = torch.cat([x, torch.ones(n, 1, dtype=torch.float64)], 1)
    right = torch.cat([a * y, -c * (y**2).sum(1, keepdim=True)], 1)

    def fill(v, column):
        square = (v**2).sum(1)
        extra = torch.zeros(n, 2, dtype=torch.float64)
        extra[:, column] = (square.max() - square).sqrt()
        return torch.cat([v, extra], 1), square.max().sqrt()

    (left, norm_left), (right, norm_right) = fill(left, 0), fill(right, 1)
    log_ratio = -0.5 * d * math.log(1 - rho**2) + (
        rho / (1 - rho**2) * x * y - rho**2 / (2 * (1 - rho**2)) * (x**2 + y**2)
    ).sum(1)
    return left, right, 1 / (norm_left * norm_right).item(), log_ratio.mean().item()


def test_infonce_reaches_the_information_of_gaussians_with_the_optimal_critic(generator):
    d, rho = 2, 0.8
    information = -0.5 * d * math.log(1 - rho**2)
    left, right, temperature, sampled = gaussian_features(4096, d, rho, generator)
    # the standard error of the sample's own mean information is 0.018
    assert sampled == pytest.approx(information, abs=0.06)
    bound = infonce(left, right, temperature=temperature)["mi_bound"].mean().item()
    assert bound == pytest.approx(sampled, abs=0.01)
    for sharpness in (0.3, 3.0):
        left, right, temperature, _ = gaussian_features(4096, d, rho, generator, sharpness)
        assert infonce(left, right, temperature=temperature)["mi_bound"].mean().item() < information - 0.05


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_infonce_never_exceeds_the_logarithm_of_the_batch(n, generator):
    d, rho = 4, 0.99
    information = -0.5 * d * math.log(1 - rho**2)
    left, right, temperature, _ = gaussian_features(n, d, rho, generator)
    bound = infonce(left, right, temperature=temperature)["mi_bound"].mean().item()
    assert bound <= math.log(n) + 1e-12
    assert bound <= information


def test_infonce_tiles_equal_the_whole_matrix(generator, monkeypatch):
    n, d, temperature = 13, 6, 0.2
    target, estimate = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    estimate.requires_grad_()
    upstream = torch.randn(n, generator=generator, dtype=torch.float64)
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (target, estimate)]
    want = torch.nn.functional.cross_entropy(
        unit[0] @ unit[1].T / temperature, torch.arange(n), reduction="none"
    )
    (want_gradient,) = torch.autograd.grad(want @ upstream, estimate)
    for tile_bytes in (1, 8 * n * 4, 1 << 20):
        monkeypatch.setattr(infonce_module, "TILE_BYTES", tile_bytes)
        got = infonce(target, estimate, temperature=temperature)["mi"]
        (gradient,) = torch.autograd.grad(got @ upstream, estimate)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-11, atol=1e-12)


def test_tiled_infonce_gradcheck(generator):
    anchors, candidates = (
        torch.randn(n, 3, generator=generator, dtype=torch.float64, requires_grad=True) for n in (3, 5)
    )
    absent = torch.tensor([0.0, 0.0, 0.0, 0.0, float("-inf")], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, c: infonce_module._TiledInfoNCE.apply(a, c, absent, 1, 0.5), (anchors, candidates)
    )


@pytest.mark.parametrize("there", [[0, 2, 3], [1], []])
def test_infonce_leaves_out_rows_of_zeros(there, generator):
    target, whole = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    kept = torch.zeros(4, dtype=torch.bool)
    kept[there] = True
    results = []
    for rows in (whole[kept], torch.where(kept[:, None], whole, 0.0)):
        estimate = rows.requires_grad_()
        anchors = target[kept] if len(rows) < 4 else target
        values = infonce(anchors, estimate)
        mine = kept if len(rows) == 4 else slice(None)
        gradient = torch.autograd.grad(values["mi"][mine].sum(), estimate)[0]
        results.append((values["mi"][mine], values["mi_bound"][mine], gradient[mine]))
        assert gradient.isfinite().all()
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
