"""Variational information distillation against autograd in float64 and Gaussians of known information."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ibdistill.ops.cpu import products
from ibdistill.ops.vid import api
from ibdistill.ops.vid.api import vid_loss
from ibdistill.ops.vid.reference import vid_loss_reference

NAMES = ("student", "weight", "bias", "log_variance")


def make(N, D, D_t, generator, dtype=torch.float64):
    """student, teacher, weight, bias, log_variance."""
    shapes = [(N, D), (N, D_t), (D_t, D), (D_t,), (D_t,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def evaluate(function, inputs, upstream=1.0, needs=(True, False, True, True, True), **arguments):
    """Value, and the gradient of every input (None where not needed)."""
    leafs = [x.detach().clone().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    value = function(*leafs, **arguments)
    if value.requires_grad:
        (value * upstream).backward()
    return value.detach(), [x.grad for x in leafs]


@pytest.mark.parametrize("N, D, D_t", [(1, 1, 1), (7, 3, 5), (20, 8, 3), (33, 4, 17)])
@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 1000])
def test_equals_autograd(N, D, D_t, chunk_rows, generator):
    inputs = make(N, D, D_t, generator)
    got = evaluate(vid_loss, inputs, -1.7, chunk_bytes=chunk_rows * D_t * 8)
    want = evaluate(vid_loss_reference, inputs, -1.7)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_is_torchs_gaussian_negative_log_likelihood(generator):
    student, teacher, weight, bias, g = make(9, 4, 6, generator)
    nll = torch.nn.functional.gaussian_nll_loss(
        student @ weight.T + bias, teacher, g.exp().expand(9, 6), reduction="none"
    )
    torch.testing.assert_close(vid_loss(student, teacher, weight, bias, g), nll.mean(1).sum())


def test_gradcheck(generator):
    student, teacher, *parameters = make(3, 2, 4, generator)
    leafs = [x.requires_grad_() for x in (student, *parameters)]
    assert torch.autograd.gradcheck(lambda s, *p: vid_loss(s, teacher, *p, chunk_bytes=2 * 4 * 8), leafs)


@pytest.mark.parametrize("needs", itertools.product([False, True], repeat=4))
def test_subsets_of_inputs_requiring_grad(needs, generator):
    inputs = make(6, 3, 5, generator)
    needs = (needs[0], False, *needs[1:])
    got = evaluate(vid_loss, inputs, 0.3, needs, chunk_bytes=2 * 5 * 8)
    torch.testing.assert_close(got[0], vid_loss_reference(*inputs))
    for g, w in zip(got[1], evaluate(vid_loss_reference, inputs, 0.3, needs)[1], strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens(dtype, generator):
    value, gradients = evaluate(vid_loss, make(0, 3, 5, generator, dtype))
    assert value.dtype == torch.float32 and value.item() == 0.0
    assert gradients[0].shape == (0, 3) and gradients[1] is None
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients[2:])


def test_no_grad_makes_no_gradients(generator, monkeypatch):
    inputs = [x.requires_grad_() for x in make(4, 3, 5, generator)]
    monkeypatch.setattr(api.ChunkedLinear, "add_gradients", None)
    with torch.no_grad():
        value = vid_loss(*inputs)
    assert not value.requires_grad
    torch.testing.assert_close(value, vid_loss_reference(*inputs).detach())


def test_backward_twice_and_reproducible(generator):
    inputs = [x.requires_grad_() for x in make(9, 3, 5, generator)]
    value, again = (vid_loss(*inputs, chunk_bytes=2 * 5 * 8) for _ in range(2))
    leafs = [inputs[i] for i in (0, 2, 3, 4)]
    runs = [torch.autograd.grad(v * 3, leafs, retain_graph=True) for v in (value, value, again)]
    for first, *others in zip(*runs, strict=True):
        assert all(torch.equal(first, other) for other in others)


def rms(a, b):
    return ((a.double() - b).square().mean() / b.square().mean()).sqrt().item()


@pytest.mark.parametrize("native", [False, True], ids=["fp32-products", "low-precision-products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_worse_than_eager_in_its_own_dtype(dtype, native, generator, monkeypatch):
    monkeypatch.setattr(products, "multiplies_natively", lambda *_: native)
    inputs = make(65, 24, 40, generator, dtype)
    truth = evaluate(vid_loss_reference, [x.double() for x in inputs], 1.3)
    eager = evaluate(vid_loss_reference, inputs, 1.3)
    ours = evaluate(vid_loss, inputs, 1.3, chunk_bytes=20 * 40 * 4)
    slack = {torch.bfloat16: 1e-3, torch.float16: 1e-4, torch.float32: 1e-6}[dtype]
    assert ours[0].dtype == torch.float32
    assert rms(ours[0], truth[0]) <= rms(eager[0], truth[0]) + slack
    for i, name in zip((0, 2, 3, 4), NAMES, strict=True):
        assert ours[1][i].dtype == dtype
        assert rms(ours[1][i], truth[1][i]) <= rms(eager[1][i], truth[1][i]) + slack, name


def test_states_in_bfloat16_beside_parameters_in_float32(generator):
    inputs = make(30, 8, 6, generator, torch.float32)
    inputs[:2] = [x.bfloat16() for x in inputs[:2]]
    ours = evaluate(vid_loss, inputs)
    truth = evaluate(vid_loss_reference, [x.double() for x in inputs])
    assert rms(ours[0], truth[0]) < 1e-6
    for i in (2, 3, 4):
        assert ours[1][i].dtype == torch.float32 and rms(ours[1][i], truth[1][i]) < 1e-5
    assert ours[1][0].dtype == torch.bfloat16 and rms(ours[1][0], truth[1][0]) < 5e-3


def gaussian_pair(N, D, D_t, generator):
    """Samples (s, t) whose *empirical* joint distribution is Gaussian in its first two moments, and those."""
    joint = torch.randn(N, D + D_t, generator=generator, dtype=torch.float64)
    mixing = torch.randn(D + D_t, D + D_t, generator=generator, dtype=torch.float64)
    joint = joint @ mixing + torch.randn(D + D_t, generator=generator, dtype=torch.float64)
    mean = joint.mean(0)
    covariance = (joint - mean).T @ (joint - mean) / N
    return joint[:, :D], joint[:, D:], mean, covariance


def test_the_minimum_is_the_conditional_entropy(generator):
    """At the optimal W, b, g the loss is sum_d h(t_d | s) - ln(2 pi e) / 2 + 1 / 2, and it is a minimum."""
    N, D, D_t = 400, 3, 4
    student, teacher, mean, covariance = gaussian_pair(N, D, D_t, generator)
    s_s, t_s, t_t = covariance[:D, :D], covariance[D:, :D], covariance[D:, D:]
    weight = torch.linalg.solve(s_s, t_s.T).T
    bias = mean[D:] - weight @ mean[:D]
    variance = (t_t - weight @ t_s.T).diagonal()
    best = (weight, bias, variance.log())
    value, gradients = evaluate(vid_loss, (student, teacher, *best))
    entropy = 0.5 * (2 * math.pi * math.e * variance).log()
    assert value.item() / N == pytest.approx((entropy - 0.5 * math.log(2 * math.pi)).mean().item(), abs=1e-12)
    for name, gradient in zip(NAMES[1:], gradients[2:], strict=True):
        assert gradient.abs().max().item() < 1e-9, name
    for i, step in itertools.product(range(3), (-0.05, 0.05)):
        moved = [x + step if i == j else x for j, x in enumerate(best)]
        assert vid_loss(student, teacher, *moved) > value


def test_the_bound_is_the_information_of_one_correlated_dimension(generator):
    """D = D_t = 1: I = -ln(1 - rho^2) / 2, and H(t) - (loss + ln(2 pi) / 2) reaches it, no more."""
    student, teacher, mean, covariance = gaussian_pair(500, 1, 1, generator)
    rho = (covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()).item()
    information = -0.5 * math.log(1 - rho**2)
    slope = covariance[1:, :1] / covariance[0, 0]
    offset = mean[1:] - slope[0] * mean[0]
    g = (covariance[1, 1] * (1 - rho**2)).log()[None]
    entropy = 0.5 * math.log(2 * math.pi * math.e * covariance[1, 1].item())

    def bound(slope, offset, g):
        return (
            entropy - vid_loss(student, teacher, slope, offset, g).item() / 500 - 0.5 * math.log(2 * math.pi)
        )

    assert bound(slope, offset, g) == pytest.approx(information, abs=1e-12)
    assert bound(0.8 * slope, offset, g) < information and bound(slope, offset, g + 0.1) < information


class Watch(TorchDispatchMode):
    """The largest tensor that an operator returned, apart from the shapes allowed."""

    def __init__(self, allowed):
        super().__init__()
        self.allowed, self.largest = allowed, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and tuple(x.shape) not in self.allowed:
                self.largest = max(self.largest, x.numel() * x.element_size())
        return out


def test_temporaries_stay_within_the_chunk(generator):
    N, D, D_t, rows = 200, 8, 96, 16
    inputs = make(N, D, D_t, generator, torch.float32)
    allowed = {(N, D), (D_t, D), (D, D_t)}
    # inside the custom op nothing can be watched
    with Watch(allowed) as watch:
        api.compute(inputs[0], *inputs[2:], inputs[1], api.absorb_torch, rows * D_t * 4, [True] * 4)
    teacher = N * D_t * 4
    assert 0 < watch.largest <= rows * D_t * 4 < teacher


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"student": torch.zeros(3)}, r"student must be \[N, D\], not \[3\]"),
        ({"teacher": torch.zeros(2, 5)}, "student has 3 tokens, teacher 2"),
        ({"weight": torch.zeros(4, 5)}, r"weight must be \[D_t, D\] = \[5, 4\] with D_t >= 1.*not \[4, 5\]"),
        ({"bias": torch.zeros(4)}, r"bias must be \[D_t\] = \[5\], not \[4\]"),
        ({"log_variance": torch.zeros(5, 1)}, r"log_variance must be \[D_t\] = \[5\], not \[5, 1\]"),
        ({"teacher": torch.zeros(3, 5, dtype=torch.int64)}, "teacher has dtype torch.int64"),
        ({"bias": torch.zeros(5, device="meta")}, "bias is on meta, student on cpu"),
        ({"impl": "cuda"}, "impl = 'cuda' is not one of: auto, "),
        ({"chunk_bytes": 0}, "chunk_bytes = 0 must be positive"),
    ],
)
def test_bad_inputs(changes, message):
    good = {
        "student": torch.zeros(3, 4),
        "teacher": torch.zeros(3, 5),
        "weight": torch.zeros(5, 4),
        "bias": torch.zeros(5),
        "log_variance": torch.zeros(5),
    }
    with pytest.raises(ValueError, match=message):
        vid_loss(**(good | changes))
