"""The torch implementation against autograd through the reference in float64: total, terms, gradients."""

import math
import resource
import sys
from pathlib import Path

import pytest
import torch
from head_loss_cases import (
    EVERY_MI,
    MIS,
    ROW,
    WEIGHTS,
    D,
    V,
    assert_same,
    evaluate,
    make_head,
    make_stream,
    name_of,
)

from ibdistill.ops import linear
from ibdistill.ops.cpu import cache_blocks, products
from ibdistill.ops.cpu.huge_pages import empty_in_huge_pages
from ibdistill.ops.head_loss.api import MISettings, Stream, Weights, head_loss
from ibdistill.ops.head_loss.arguments import IGNORED
from ibdistill.ops.head_loss.reference import head_loss_reference
from ibdistill.ops.head_loss.torch import ChunkedLinear


@pytest.mark.parametrize(
    ("chunk_rows", "cached_bytes"), [(0, 1), (5, 1), (24, 1), (1000, 1), (1000, 1 << 20)]
)
@pytest.mark.parametrize("mi", MIS, ids=name_of)
def test_equals_the_reference(case, mi, chunk_rows, cached_bytes, monkeypatch):
    monkeypatch.setattr(cache_blocks, "CACHED_BYTES", cached_bytes)
    arguments = {"weights": WEIGHTS, "mi": mi, "upstream": -1.7}
    got = evaluate(head_loss, *case, **arguments, chunk_bytes=max(1, chunk_rows * ROW))
    assert_same(got, evaluate(head_loss_reference, *case, **arguments))


@pytest.mark.parametrize("mi", [None, MISettings(), MISettings("normalized", "mean", "both")], ids=name_of)
def test_without_bias_and_with_zero_weights(case, mi):
    predict, explain, weight, _ = case
    for weights in (Weights(1.0, 0.5, 0.2), Weights(0.0, 0.0, 1.0), Weights(1.0, 0.0, 0.0)):
        got = evaluate(head_loss, predict, explain, weight, None, weights=weights, mi=mi)
        assert_same(
            got, evaluate(head_loss_reference, predict, explain, weight, None, weights=weights, mi=mi)
        )


def test_predict_alone_is_torchs_cross_entropy(case):
    predict, _, weight, bias = case
    for chunk_bytes in (1, 1 << 20):
        got = evaluate(head_loss, predict, None, weight, bias, weights=Weights(0.5), chunk_bytes=chunk_bytes)
        logits = predict.hidden @ weight.T + bias
        want = torch.nn.functional.cross_entropy(
            logits, predict.labels, reduction="sum", ignore_index=IGNORED
        )
        torch.testing.assert_close(got[0], 0.5 * want)
        assert set(got[1]) == {"ce_predict", "correct_predict"}
        assert got[1]["correct_predict"] == (logits.argmax(-1) == predict.labels).sum()
        assert_same(got, evaluate(head_loss_reference, predict, None, weight, bias, weights=Weights(0.5)))


@pytest.mark.parametrize("mi", [None, *(m for m in EVERY_MI if m.pool == "max")], ids=name_of)
@pytest.mark.parametrize(
    "lengths", [([1], [1]), ([1], [30]), ([5], [0]), ([0, 0], [0, 0]), ([], [])], ids=str
)
def test_small_batches(mi, lengths, generator):
    predict, explain = (make_stream(x, D, V, ignored=0, generator=generator) for x in lengths)
    head = make_head(D, V, generator=generator)
    got = evaluate(head_loss, predict, explain, *head, weights=WEIGHTS, mi=mi, chunk_bytes=9 * ROW)
    assert_same(got, evaluate(head_loss_reference, predict, explain, *head, weights=WEIGHTS, mi=mi))
    if mi is not None:
        assert got[1]["mi_questions"] == sum(p > 0 and e > 0 for p, e in zip(*lengths, strict=True))


@pytest.mark.parametrize("mi", [MISettings("paper"), MISettings("normalized", gradient="both")], ids=name_of)
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_ties_go_to_the_first_position(mi, chunk_rows, generator):
    """Repeated positions tie in every vocabulary entry; in eighths, whose products and sums are exact."""
    predict, explain = (make_stream([4, 2], D, V, ignored=0, generator=generator) for _ in range(2))
    for stream in (predict, explain):
        stream.hidden[1] = stream.hidden[3] = stream.hidden[0]
    head = make_head(D, V, generator=generator)
    for tensor in (predict.hidden, explain.hidden, *head):
        tensor.mul_(8).round_().div_(8)
    got = evaluate(
        head_loss, predict, explain, *head, weights=Weights(0, 0, 1.0), mi=mi, chunk_bytes=chunk_rows * ROW
    )
    assert_same(
        got, evaluate(head_loss_reference, predict, explain, *head, weights=Weights(0, 0, 1.0), mi=mi)
    )
    gradient = got[2][1]
    assert gradient[0].abs().sum() > 0
    assert not torch.allclose(gradient[0], gradient[1])


@pytest.mark.parametrize("chunk_rows", [5, 100])
def test_ties_between_positions_far_apart(chunk_rows, generator, monkeypatch):
    """The sequence is longer than a block; its second half repeats the first, so every entry ties."""
    monkeypatch.setattr(cache_blocks, "CACHED_BYTES", 1)
    predict, explain = (make_stream([2 * n], D, V, ignored=0, generator=generator) for n in (9, 13))
    head = make_head(D, V, generator=generator)
    for stream in (predict, explain):
        stream.hidden[len(stream.hidden) // 2 :] = stream.hidden[: len(stream.hidden) // 2].clone()
    for tensor in (predict.hidden, explain.hidden, *head):
        tensor.mul_(8).round_().div_(8)
    arguments = {"weights": Weights(0, 0, 1.0), "mi": MISettings("normalized", gradient="both")}
    got = evaluate(head_loss, predict, explain, *head, **arguments, chunk_bytes=chunk_rows * ROW)
    assert_same(got, evaluate(head_loss_reference, predict, explain, *head, **arguments))


def test_a_question_walked_twice_finds_every_maximum_again(generator):
    """This is in float32, where another product of the same rows could round otherwise."""
    vocabulary, width = 5003, 48
    predict, explain = (make_stream([n], width, vocabulary, ignored=0, generator=generator) for n in (7, 61))
    weight, _ = make_head(width, vocabulary, generator=generator)
    narrow = [s._replace(hidden=s.hidden.float()) for s in (predict, explain)]
    arguments = {"weights": Weights(0, 0, 1.0), "mi": MISettings("normalized")}
    _, _, whole = evaluate(head_loss, *narrow, weight.float(), None, **arguments)
    _, _, split = evaluate(
        head_loss, *narrow, weight.float(), None, **arguments, chunk_bytes=4 * vocabulary * 24
    )
    # a vocabulary entry whose maximum is lost has another gradient; one whose two largest round alike may
    off = (whole[2] - split[2]).norm(dim=1) > 1e-3 * whole[2].norm(dim=1)
    assert off.sum() <= 3, off.sum()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's huge pages")
def test_large_memory_is_touched_in_huge_pages():
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not modes.is_file() or "[never]" in modes.read_text():
        pytest.skip("the kernel gives none")
    tensor = empty_in_huge_pages((1 << 12, 1 << 12), torch.empty(1), torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensor.fill_(3.0)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < tensor.numel() * 4 / 4096 / 8, faults
    assert tensor.shape == (1 << 12, 1 << 12) and tensor.sum(dtype=torch.float64) == 3 << 24
    small = empty_in_huge_pages((3, 2), torch.empty(1), torch.float64)
    assert small.shape == (3, 2) and small.dtype == torch.float64


@pytest.mark.parametrize(
    "mi", [None, MISettings("paper"), MISettings("infonce", gradient="both")], ids=name_of
)
@pytest.mark.parametrize("needs", range(16))
def test_subsets_of_inputs_requiring_grad(case, mi, needs):
    needs = tuple(bool(needs >> i & 1) for i in range(4))
    arguments = {"weights": WEIGHTS, "mi": mi, "needs": needs, "upstream": 0.3}
    got = evaluate(head_loss, *case, **arguments, chunk_bytes=11 * ROW)
    assert_same(got, evaluate(head_loss_reference, *case, **arguments))


def test_no_grad_makes_no_gradients(case, monkeypatch):
    predict, explain, weight, bias = case
    weight = weight.clone().requires_grad_()
    with torch.no_grad():
        monkeypatch.setattr(ChunkedLinear, "add_gradients", None)
        total, _ = head_loss(predict, explain, weight, bias, weights=WEIGHTS, mi=MISettings())
    assert not total.requires_grad
    want, _ = head_loss_reference(predict, explain, weight, bias, weights=WEIGHTS, mi=MISettings())
    torch.testing.assert_close(total, want.detach())


def test_backward_twice_and_terms_without_gradient(case):
    predict, explain, weight, bias = case
    hidden = predict.hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    total, terms = head_loss(
        predict._replace(hidden=hidden), explain, weight, bias, weights=WEIGHTS, mi=MISettings()
    )
    assert all(not term.requires_grad and term.ndim == 0 for term in terms.values())
    first = torch.autograd.grad(
        total, (hidden, weight), torch.tensor(3.0, dtype=total.dtype), retain_graph=True
    )
    second = torch.autograd.grad(total, (hidden, weight), torch.tensor(3.0, dtype=total.dtype))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError):
        (gradient,) = torch.autograd.grad(
            head_loss(predict._replace(hidden=hidden), None, weight, weights=WEIGHTS)[0],
            hidden,
            create_graph=True,
        )
        gradient.sum().backward()


def test_bit_reproducible(case):
    runs = [
        evaluate(head_loss, *case, weights=WEIGHTS, mi=MISettings(gradient="both"), chunk_bytes=11 * ROW)
        for _ in range(2)
    ]
    assert_same(*runs, rtol=0, atol=0)


def rms(a, b):
    return (
        ((a.double() - b.double()).square().mean() / b.double().square().mean().clamp_min(1e-30))
        .sqrt()
        .item()
    )


@pytest.mark.parametrize("native", [False, True], ids=["fp32-products", "low-precision-products"])
@pytest.mark.parametrize(
    ("dtype", "more"),
    [
        (torch.bfloat16, []),
        (torch.bfloat16, [70]),
        (torch.float16, []),
        (torch.float16, [70]),
        (torch.float32, []),
    ],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else "summed" if value else "kept",
)
@pytest.mark.parametrize("mi", [None, *(m for m in EVERY_MI if m.gradient != "predict")], ids=name_of)
def test_no_worse_than_eager_in_its_own_dtype(mi, more, dtype, native, generator, monkeypatch):
    """Truth: float64 from the same rounded inputs. `native`: as where low-precision products are fast.

    A head of a low precision has two ways to its gradient: up to 2 D rows are kept, more are summed.
    """
    monkeypatch.setattr(products, "multiplies_natively", lambda *_: native)
    D, V = 64, 1003
    predict = make_stream([5, 1, 9, *more], D, V, dtype=dtype, generator=generator)
    explain = make_stream([17, 40, 3, *more], D, V, dtype=dtype, generator=generator)
    weight, bias = make_head(D, V, generator=generator)
    weight, bias = (0.2 * weight).to(dtype), bias.to(dtype)
    case = (predict, explain, weight, bias)
    double = (
        *(s._replace(hidden=s.hidden.double()) for s in (predict, explain)),
        weight.double(),
        bias.double(),
    )
    arguments = {"weights": Weights(1 / 15, 1 / 60, 1 / 3), "mi": mi, "upstream": 1.3}
    truth = evaluate(head_loss_reference, *double, **arguments)
    eager = evaluate(head_loss_reference, *case, **arguments, dtype=dtype)
    sums, add_product = [], linear.ChunkedLinear._add_product
    monkeypatch.setattr(
        linear.ChunkedLinear, "_add_product", lambda *given: sums.append(1) or add_product(*given)
    )
    ours = evaluate(head_loss, *case, **arguments, chunk_bytes=20 * V * 4)
    assert bool(sums) == (bool(more) or dtype == torch.float32 or not native)
    slack = {torch.bfloat16: 1e-3, torch.float16: 1e-4, torch.float32: 1e-6}[dtype]
    assert rms(ours[0], truth[0]) <= rms(eager[0], truth[0]) + slack
    for name in truth[1]:
        if not name.startswith("correct"):
            assert rms(ours[1][name], truth[1][name]) <= rms(eager[1][name], truth[1][name]) + slack, name
    for name, a, b, t in zip(
        ("predict", "explain", "weight", "bias"), ours[2], eager[2], truth[2], strict=True
    ):
        assert a.dtype == dtype
        assert rms(a, t) <= rms(b, t) + slack, name


def test_large_logits_are_finite(generator):
    """Logits in the hundreds: probabilities underflow, the mutual-information terms stay numbers."""
    predict, explain = (
        make_stream([3, 2], D, V, dtype=torch.float32, scale=100.0, generator=generator) for _ in range(2)
    )
    weight, bias = make_head(D, V, torch.float32, generator=generator)
    double = [s._replace(hidden=s.hidden.double()) for s in (predict, explain)]
    for mi in EVERY_MI:
        got = evaluate(head_loss, predict, explain, weight, bias, weights=WEIGHTS, mi=mi)
        want = evaluate(head_loss_reference, *double, weight.double(), bias.double(), weights=WEIGHTS, mi=mi)
        for a, b in zip([got[0], *got[2]], [want[0], *want[2]], strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


def replace(case, **changes):
    predict, explain, weight, bias = case
    named = {"predict": predict, "explain": explain, "weight": weight, "bias": bias} | {}
    for key, value in changes.items():
        owner, _, field = key.partition("__")
        named[owner] = named[owner]._replace(**{field: value}) if field else value
    return named


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weight": torch.zeros(V)}, r"weight must be \[V, D\], not \[29\]"),
        ({"weight": torch.zeros(V, D, dtype=torch.int64)}, "weight has dtype torch.int64"),
        ({"weight": torch.zeros(V, D)}, "predict.hidden has dtype torch.float64, weight torch.float32"),
        ({"bias": torch.zeros(V + 1)}, r"bias must be \[V\] = \[29\]"),
        ({"bias": torch.zeros(V)}, "bias has dtype"),
        ({"predict__hidden": torch.zeros(11, D + 1, dtype=torch.float64)}, "D = 7"),
        ({"explain__labels": torch.zeros(3, dtype=torch.int64)}, r"explain.labels must be \[N\] = \[31\]"),
        ({"explain__labels": torch.zeros(31)}, "int64"),
        ({"explain__labels": torch.full((31,), V)}, r"in\s+\[0, V\) = \[0, 29\)"),
        ({"explain__labels": torch.full((31,), -1)}, "-100"),
        ({"predict__cu": torch.tensor([1, 3, 7, 8, 9, 11, 11])}, "starts with 1"),
        ({"predict__cu": torch.tensor([0, 3, 7, 8, 9, 11, 10])}, "ends with 10"),
        ({"predict__cu": torch.tensor([0, 8, 7, 8, 9, 11, 11])}, "falls in between"),
        ({"predict__cu": torch.tensor([0.0, 11.0])}, "int32"),
        ({"predict__cu": torch.tensor([0, 11])}, "predict has 1 questions, explain 6"),
    ],
)
@pytest.mark.parametrize("function", [head_loss, head_loss_reference])
def test_bad_inputs(case, function, changes, message):
    named = replace(case, **changes)
    if "weight" in changes and "bias" not in changes:
        named["bias"] = None
    with pytest.raises(ValueError, match=message):
        function(**named, weights=WEIGHTS, mi=MISettings())


def test_bad_settings(case):
    predict, explain, weight, bias = case
    with pytest.raises(ValueError, match="estimator = 'mine' is not one of: paper, normalized, infonce"):
        MISettings("mine")
    with pytest.raises(ValueError, match="pool = 'sum' is not one of: max, mean"):
        MISettings(pool="sum")
    with pytest.raises(ValueError, match="gradient = 'none' is not one of: explain, predict, both"):
        MISettings(gradient="none")
    with pytest.raises(ValueError, match="temperature = 0 must be positive"):
        MISettings(temperature=0)
    with pytest.raises(ValueError, match="impl = 'cuda' is not one of: auto, "):
        head_loss(predict, explain, weight, bias, weights=WEIGHTS, impl="cuda")
    with pytest.raises(ValueError, match="chunk_bytes = 0 must be positive"):
        head_loss(predict, explain, weight, bias, weights=WEIGHTS, chunk_bytes=0)
    with pytest.raises(ValueError, match="needs an explain stream"):
        head_loss(predict, None, weight, bias, weights=WEIGHTS, mi=MISettings())


def test_offsets_and_labels_without_int32_cpu_assumptions(case):
    """Offsets may be int64 as well."""
    predict, explain, weight, bias = case
    wide = [Stream(s.hidden, s.labels, s.cu.long()) for s in (predict, explain)]
    a = evaluate(head_loss, *wide, weight, bias, weights=WEIGHTS, mi=MISettings())
    assert_same(a, evaluate(head_loss, *case, weights=WEIGHTS, mi=MISettings()), rtol=0, atol=0)
    assert math.isfinite(a[0].item())
