"""The Triton implementation, in Triton's interpreter on a CPU, against the reference in float64."""

import os
from dataclasses import replace

import pytest
import torch
from head_loss_cases import EVERY_MI, PAIRED, assert_same, evaluate, make_head, make_stream, name_of

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("set TRITON_INTERPRET=1 to run the kernels without a GPU", allow_module_level=True)

from ibdistill.ops.head_loss.api import (
    MISettings,
    Stream,
    TeacherDistributions,
    TeacherStream,
    Weights,
    head_loss,
    logits_loss,
)
from ibdistill.ops.head_loss.reference import head_loss_reference
from ibdistill.ops.head_loss.sampled_token import SAMPLED

D, V = 7, 37
PREDICT, EXPLAIN = [3, 4, 1, 1, 2, 0], [6, 19, 1, 2, 0, 3]
FEWER = [2, 3, 1, 0], [3, 9, 0, 2]
"""Half as many rows, for tests of many settings: an explain sequence over two chunks and empty ones still."""
ALL = Weights(0.7, 0.4, 1.3, 0.6, -1.1)
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
DISTRIBUTIONS = [mi for mi in EVERY_MI if mi.estimator != "infonce"]


def make(generator, lengths=(PREDICT, EXPLAIN), D=D, V=V, dtype=torch.float32):
    streams = [make_stream(x, D, V, dtype=dtype, generator=generator) for x in lengths]
    return *streams, *make_head(D, V, dtype, generator=generator)


def double(case):
    streams = [s if s is None else s._replace(hidden=s.hidden.double()) for s in case[:2]]
    return *streams, *(x if x is None else x.double() for x in case[2:])


def check(case, close=CLOSE, chunk_bytes=1 << 20, **arguments):
    got = evaluate(head_loss, *case, impl="triton", chunk_bytes=chunk_bytes, **arguments)
    want = evaluate(head_loss_reference, *double(case), **arguments)
    as_double = (got[0].double(), {k: v.double() for k, v in got[1].items()})
    assert_same(
        (*as_double, [g if g is None else g.double() for g in got[2]]),
        (want[0], want[1], want[2]),
        **close,
    )
    return got


@pytest.mark.parametrize("chunk_rows", [5, 24, 1000])
@pytest.mark.parametrize("mi", [None, *EVERY_MI], ids=name_of)
def test_equals_the_reference(generator, mi, chunk_rows):
    check(make(generator), weights=ALL, mi=mi, upstream=-1.7, chunk_bytes=chunk_rows * 48 * 4)


def white_box(case, generator, sides, *settings):
    targets = [TeacherStream(torch.randn(len(s.labels), 5, generator=generator)) for s in case[:2]]
    head = make_head(5, V, torch.float32, generator)
    return TeacherDistributions(
        *(s if on else None for s, on in zip(targets, sides, strict=True)), *head, *settings
    )


def top_k(case, generator, sides, *settings, k=4, V=V):
    targets = []
    for stream in case[:2]:
        q = torch.softmax(2 * torch.randn(len(stream.labels), V, generator=generator), -1)
        targets.append(TeacherStream(None, *reversed(q.topk(k))))
    streams = (s if on else None for s, on in zip(targets, sides, strict=True))
    return TeacherDistributions(*streams, None, None, *settings)


@pytest.mark.parametrize("chunk_rows", [20, 1000])
def test_capped_logits_of_student_and_teacher(generator, chunk_rows):
    case = make(generator)
    teacher = white_box(case, generator, (1, 1), "forward", 0.3, 1.7, 0.8)
    for mi in (MISettings(), MISettings("paper", "mean")):
        arguments = {"weights": ALL, "mi": mi, "teacher": teacher, "softcap": 1.5}
        check(case, **arguments, chunk_bytes=chunk_rows * 48 * 4)


SIDES = {"both": (1, 1), "predict": (1, 0), "explain": (0, 1)}


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("mi", [None, MISettings("normalized", gradient="both")], ids=name_of)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("teacher", [white_box, top_k])
def test_distillation(generator, teacher, divergence, mi, sides):
    case = make(generator, FEWER)
    teacher = teacher(case, generator, SIDES[sides], divergence, 0.3, 1.7)
    for chunk_rows in (8, 1000):
        check(case, weights=ALL, mi=mi, teacher=teacher, chunk_bytes=chunk_rows * 48 * 4)


@pytest.mark.parametrize("divergence", SAMPLED)
@pytest.mark.parametrize("mi", [None, MISettings("normalized", gradient="both")], ids=name_of)
@pytest.mark.parametrize("sides", ["both", "explain"])
def test_estimates_from_the_labels(generator, divergence, mi, sides):
    case = make(generator, FEWER)
    teacher = white_box(case, generator, SIDES[sides], divergence, 0.3, 1.0, 0.8)
    for chunk_rows in (8, 1000):
        check(case, weights=ALL, mi=mi, teacher=teacher, softcap=1.5, chunk_bytes=chunk_rows * 48 * 4)
    if sides == "both":
        drawn = [
            TeacherStream(
                None, s.labels.clamp_min(0)[:, None], torch.rand(len(s.labels), 1, generator=generator)
            )
            for s in case[:2]
        ]
        teacher = TeacherDistributions(*drawn, divergence=divergence)
        check(case, weights=ALL, mi=mi, teacher=teacher, chunk_bytes=8 * 48 * 4)


@pytest.mark.parametrize("teacher", [white_box, top_k])
def test_weights_of_positions(generator, teacher):
    case = make(generator, FEWER)
    teacher = teacher(case, generator, (1, 1), "forward", 0.3, 1.7)
    weights = torch.rand(len(case[1].labels), generator=generator)
    teacher = replace(teacher, explain=teacher.explain._replace(weights=weights))
    for chunk_rows in (8, 1000):
        check(case, weights=ALL, teacher=teacher, chunk_bytes=chunk_rows * 48 * 4)


@pytest.mark.parametrize("k", [1, V])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_the_smallest_and_the_largest_top_k(generator, divergence, k):
    case = make(generator)
    # with k = V the tail is empty, and float32 keeps no more of it than the floor of the float64 reference
    teacher = top_k(case, generator, (1, 1), divergence, 0.3, 1.0, k=k)
    weights = Weights(0.7, 0.4, 1.3, 0.6 if k < V else 0.0, 0.0)
    check(case, weights=weights, teacher=teacher, close={"rtol": 1e-4, "atol": 1e-3 if k == V else 2e-5})


def test_a_block_of_nothing_but_the_top_k(generator, monkeypatch):
    """The tail's log-sum-exp starts with a block that has no part in the tail."""
    monkeypatch.setattr("ibdistill.ops.launch.LANES", 1)
    monkeypatch.setattr("ibdistill.ops.launch.LOADS", 1)
    case = make(generator)
    ids = torch.arange(16).expand(len(case[0].labels), 16).clone()
    teacher = TeacherDistributions(TeacherStream(None, ids, torch.full(ids.shape, 1 / 17)))
    check(case, weights=ALL, teacher=teacher)


@pytest.mark.parametrize("mi", PAIRED, ids=name_of)
@pytest.mark.parametrize("teacher, sides", [(white_box, "both"), (white_box, "explain"), (top_k, "both")])
def test_paired_with_the_teacher(generator, mi, teacher, sides):
    case = make(generator, FEWER)
    teacher = teacher(case, generator, SIDES[sides], "reverse", 0.3)
    for chunk_rows, weights in ((8, ALL), (1000, Weights(0.7, 0.4, 1.3))):
        check(case, weights=weights, mi=mi, teacher=teacher, chunk_bytes=chunk_rows * 48 * 4)


def as_logits(function):
    """`logits_loss` as a function of hidden states and head."""

    def wrapped(predict, explain, weight, bias, **arguments):
        streams = [
            s if s is None else s._replace(hidden=s.hidden @ weight.T + bias) for s in (predict, explain)
        ]
        return function(*streams, **arguments)

    return wrapped


@pytest.mark.parametrize("V", [37, 48])
@pytest.mark.parametrize("mi", [None, *DISTRIBUTIONS], ids=name_of)
def test_given_logits(generator, mi, V):
    case = make(generator, FEWER, V=V)
    got = evaluate(as_logits(logits_loss), *case, impl="triton", weights=ALL, mi=mi, upstream=0.4)
    want = evaluate(head_loss_reference, *case, weights=ALL, mi=mi, upstream=0.4)
    assert_same(got, want, **CLOSE)


@pytest.mark.parametrize(
    "mi", [None, MISettings("paper"), MISettings("infonce", gradient="both")], ids=name_of
)
@pytest.mark.parametrize("needs", range(16))
def test_subsets_of_inputs_requiring_grad(generator, mi, needs):
    needs = tuple(bool(needs >> i & 1) for i in range(4))
    check(make(generator, FEWER), weights=ALL, mi=mi, needs=needs, upstream=0.3, chunk_bytes=8 * 48 * 4)


@pytest.mark.parametrize(
    "lengths", [([1], [1]), ([1], [30]), ([5], [0]), ([0, 0], [0, 0]), ([], [])], ids=str
)
@pytest.mark.parametrize(
    "mi", [None, MISettings("paper"), MISettings("normalized", "mean", "both")], ids=name_of
)
def test_small_batches(generator, mi, lengths):
    check(make(generator, lengths), weights=ALL, mi=mi, chunk_bytes=9 * 48 * 4)


def test_predict_alone_and_without_bias(generator):
    predict, _, weight, _ = make(generator)
    check((predict, None, weight, None), weights=ALL)


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_ties_go_to_the_first_position(generator, chunk_rows):
    """Values are eighths, whose products and sums are exact, because a GEMM may round equal rows
    differently."""
    predict, explain, weight, bias = make(generator, ([4, 2], [4, 2]))
    for tensor in (predict.hidden, explain.hidden, weight, bias):
        tensor.mul_(8).round_().div_(8)
    for stream in (predict, explain):
        stream.hidden[1] = stream.hidden[3] = stream.hidden[0]
        stream.labels.clamp_min_(0)
    check(
        (predict, explain, weight, bias),
        weights=Weights(0, 0, 1.0),
        mi=MISettings(),
        chunk_bytes=chunk_rows * 192,
    )


def test_backward_twice_and_bit_reproducible(generator):
    predict, explain, weight, bias = make(generator)
    hidden = predict.hidden.clone().requires_grad_()
    totals = [
        head_loss(
            predict._replace(hidden=hidden),
            explain,
            weight,
            bias,
            weights=ALL,
            mi=MISettings(),
            impl="triton",
        )[0]
        for _ in range(2)
    ]
    gradients = [
        torch.autograd.grad(total * 3, hidden, retain_graph=True)[0] for total in (*totals, totals[0])
    ]
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def rms(a, b):
    return (
        ((a.double() - b.double()).square().mean() / b.double().square().mean().clamp_min(1e-30))
        .sqrt()
        .item()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mi", [None, *(m for m in DISTRIBUTIONS if m.gradient == "explain")], ids=name_of)
def test_no_worse_than_eager_in_its_own_dtype(generator, mi, dtype):
    case = make(generator, ([5, 1], [11, 4]), D=32, V=203, dtype=dtype)
    case = (*case[:2], (0.2 * case[2]).to(dtype), case[3])
    arguments = {"weights": Weights(1 / 6, 1 / 15, 1 / 2), "mi": mi, "upstream": 1.3}
    truth = evaluate(head_loss_reference, *double(case), **arguments)
    eager = evaluate(head_loss_reference, *case, **arguments, dtype=dtype)
    ours = evaluate(head_loss, *case, **arguments, impl="triton")
    # Triton's interpreter cuts float32 to bfloat16 off where hardware rounds: twice the error
    rounding = 1e-3 if torch.cuda.is_available() else 3e-3
    slack = {torch.bfloat16: rounding, torch.float16: 1e-4, torch.float32: 5e-6}[dtype]
    assert rms(ours[0], truth[0]) <= rms(eager[0], truth[0]) + slack
    for name in truth[1]:
        if not name.startswith("correct"):
            assert rms(ours[1][name], truth[1][name]) <= rms(eager[1][name], truth[1][name]) + slack, name
    for a, b, t in zip(ours[2], eager[2], truth[2], strict=True):
        assert a.dtype == dtype and rms(a, t) <= rms(b, t) + slack


def test_large_logits_are_finite(generator):
    predict, explain, weight, bias = make(generator, FEWER)
    case = tuple(s._replace(hidden=100 * s.hidden) for s in (predict, explain))
    for mi in DISTRIBUTIONS:
        check((*case, weight, bias), close={"rtol": 1e-3, "atol": 1e-3}, weights=ALL, mi=mi)


def test_refusals(generator, monkeypatch):
    case = make(generator)
    with pytest.raises(ValueError, match="impl = 'triton' can't run: it has no float64; use impl = 'torch'"):
        head_loss(*double(case), weights=ALL, impl="triton")
    low = [s._replace(hidden=s.hidden.bfloat16()) for s in case[:2]] + [x.bfloat16() for x in case[2:]]
    ids = torch.arange(257).expand(len(case[0].labels), 257)
    teacher = TeacherDistributions(TeacherStream(None, ids, torch.ones(ids.shape) / 257))
    with pytest.raises(ValueError, match="with torch.bfloat16 it takes at most the top 256 .*, not 257"):
        head_loss(*low, weights=ALL, teacher=teacher, impl="triton")
    if not torch.cuda.is_available():
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ValueError, match="not on a GPU, and TRITON_INTERPRET=1 is not set"):
            head_loss(*case, weights=ALL, impl="triton")


hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
some = hypothesis.strategies


@hypothesis.settings(
    max_examples=200 if torch.cuda.is_available() else 80,  # the interpreter is slow
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    lengths=some.lists(some.tuples(some.integers(0, 6), some.integers(0, 9)), min_size=0, max_size=4),
    V=some.integers(2, 70),
    D=some.integers(1, 9),
    mi=some.sampled_from([None, *EVERY_MI]),
    chunk_rows=some.integers(1, 40),
    ignored=some.sampled_from([0.0, 0.3, 1.0]),
    has_explain=some.booleans(),
    seed=some.integers(0, 1 << 20),
)
def test_random_shapes(lengths, V, D, mi, chunk_rows, ignored, has_explain, seed):
    generator = torch.Generator().manual_seed(seed)
    streams = [
        make_stream([x[i] for x in lengths], D, V, ignored=ignored, dtype=torch.float32, generator=generator)
        for i in range(2)
    ]
    if not has_explain:
        streams[1], mi = None, None
    head = make_head(D, V, torch.float32, generator)
    chunk_bytes = chunk_rows * (-(-V // 16) * 16) * 4
    close = {"rtol": 2e-4, "atol": 2e-4}
    check((*streams, *head), close, chunk_bytes, weights=ALL, mi=mi, upstream=1.2)


def test_streams_are_views_of_longer_tensors(generator):
    """Hidden states and labels that start anywhere, as a slice of a batch does."""
    predict, explain, weight, bias = make(generator, ([4, 3], [5, 6]))
    cut = [Stream(s.hidden[1:], s.labels[1:], (s.cu - 1).clamp_min(0)) for s in (predict, explain)]
    check((*cut, weight, bias), weights=ALL, mi=MISettings())
