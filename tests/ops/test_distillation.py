"""Distillation from a teacher: divergences, and the torch implementation against the reference."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from head_loss_cases import PAIRED, WEIGHTS, assert_same, evaluate, make_head, make_stream, name_of

from ibdistill.ops.cpu import products
from ibdistill.ops.head_loss.api import (
    MISettings,
    Stream,
    TeacherDistributions,
    TeacherStream,
    Weights,
    head_loss,
    logits_loss,
)
from ibdistill.ops.head_loss.divergences import DIVERGENCES
from ibdistill.ops.head_loss.reference import head_loss_reference

D, V, K = 7, 29, 4
PREDICT, EXPLAIN = [3, 4, 1, 1, 2, 0], [6, 19, 1, 2, 0, 3]
ALL = Weights(0.7, 0.4, 1.3, kd_predict=0.6, kd_explain=-1.1)
KINDS = [(d, t) for d, t in itertools.product(DIVERGENCES, (1.0, 2.5))]


@pytest.fixture
def case(generator):
    predict = make_stream(PREDICT, D, V, generator=generator)
    explain = make_stream(EXPLAIN, D, V, generator=generator)
    return predict, explain, *make_head(D, V, generator=generator)


def white_box(case, generator, **settings):
    """Hidden states of another size than the student's, and a head."""
    streams = [
        TeacherStream(torch.randn(len(s.labels), 5, generator=generator, dtype=torch.float64))
        for s in case[:2]
    ]
    weight, bias = make_head(5, V, generator=generator)
    return TeacherDistributions(*streams, weight, bias, **settings)


def top_k(case, generator, k=K, **settings):
    streams = []
    for s in case[:2]:
        q = torch.softmax(2 * torch.randn(len(s.labels), V, generator=generator, dtype=torch.float64), -1)
        top = q.topk(k)
        streams.append(TeacherStream(None, top.indices, top.values))
    return TeacherDistributions(*streams, **settings)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_of_divergences(name, generator):
    log_q = torch.log_softmax(torch.randn(4, 6, generator=generator, dtype=torch.float64), -1)
    logits = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    loss, gradient = DIVERGENCES[name].fused(log_q, torch.log_softmax(logits, -1), 0.3)
    (want,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient.detach(), want)
    plain = DIVERGENCES[name].function(log_q, torch.log_softmax(logits, -1), 0.3)
    torch.testing.assert_close(torch.autograd.grad(plain.sum(), logits)[0], want)
    if name == "top1":  # has no minimum but a certain student
        return
    zero, flat = DIVERGENCES[name].fused(log_q, log_q, 0.3)
    torch.testing.assert_close(zero, torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(flat, torch.zeros(4, 6, dtype=torch.float64))


def test_divergences_are_torchs(generator):
    q, p = (torch.softmax(torch.randn(4, 6, generator=generator, dtype=torch.float64), -1) for _ in range(2))
    kl = lambda a, b: torch.nn.functional.kl_div(b.log(), a, reduction="none").sum(-1)  # noqa: E731
    beta, m = 0.3, 0.3 * q + 0.7 * p
    wants = {"forward": kl(q, p), "reverse": kl(p, q), "jsd": beta * kl(q, m) + (1 - beta) * kl(p, m)}
    wants |= {"skew_forward": kl(q, m), "skew_reverse": kl(p, 0.7 * q + 0.3 * p)}
    wants["total_variation"] = torch.maximum(p - q, torch.zeros(())).sum(-1)
    wants["top1"] = torch.nn.functional.cross_entropy(p.log(), q.argmax(-1), reduction="none")
    weights = []
    for one, other in zip(q.tolist(), p.tolist(), strict=True):  # the head, token by token
        head, mass = [], 0.0
        for v in sorted(range(6), key=lambda v: -one[v]):
            if mass < beta:
                head.append(v)
                mass += one[v]
        gaps = [abs(a - b) for a, b in zip(one, other, strict=True)]
        weights.append(sum(gaps[v] for v in head) / sum(gaps))
    weight = torch.tensor(weights, dtype=torch.float64)
    wants["adaptive"] = weight * kl(q, p) + (1 - weight) * kl(p, q)
    assert wants.keys() == DIVERGENCES.keys()
    for name, want in wants.items():
        torch.testing.assert_close(DIVERGENCES[name].function(q.log(), p.log(), beta), want)
        torch.testing.assert_close(DIVERGENCES[name].fused(q.log(), p.log(), beta)[0], want)


@pytest.mark.parametrize("make", [white_box, top_k])
@pytest.mark.parametrize("chunk_rows", [1, 10, 48, 1000])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equals_the_reference(case, generator, make, chunk_rows, kind):
    teacher = make(case, generator, divergence=kind[0], temperature=kind[1], beta=0.3)
    for mi in (None, MISettings(), MISettings("normalized", "mean", "both")):
        arguments = {"weights": ALL, "mi": mi, "teacher": teacher, "upstream": -1.7}
        got = evaluate(head_loss, *case, **arguments, chunk_bytes=chunk_rows * V * 8)
        assert_same(got, evaluate(head_loss_reference, *case, **arguments))
        assert {"kd_predict", "kd_explain"} < got[1].keys()


@pytest.mark.parametrize("make", [white_box, top_k])
@pytest.mark.parametrize("side", ["predict", "explain"])
def test_a_teacher_of_one_stream(case, generator, make, side):
    both = make(case, generator)
    targets = {"predict": None, "explain": None, side: getattr(both, side)}
    teacher = TeacherDistributions(**targets, weight=both.weight, bias=both.bias)
    got = evaluate(head_loss, *case, weights=ALL, teacher=teacher, chunk_bytes=24 * V * 8)
    assert_same(got, evaluate(head_loss_reference, *case, weights=ALL, teacher=teacher))
    assert f"kd_{side}" in got[1] and len([name for name in got[1] if name.startswith("kd")]) == 1
    if side == "predict":
        alone = evaluate(head_loss, case[0], None, *case[2:], weights=ALL, teacher=teacher)
        torch.testing.assert_close(alone[1]["kd_predict"], got[1]["kd_predict"])


def test_all_tokens_as_top_k_are_the_white_box(case, generator):
    """With k = V the tail is empty and the buckets are the vocabulary."""
    teacher = white_box(case, generator)
    streams = []
    for target in (teacher.predict, teacher.explain):
        q = torch.softmax(target.hidden @ teacher.weight.T + teacher.bias, -1)
        streams.append(TeacherStream(None, *reversed(q.topk(V))))
    got = evaluate(head_loss, *case, weights=ALL, teacher=TeacherDistributions(*streams))
    assert_same(got, evaluate(head_loss, *case, weights=ALL, teacher=teacher), rtol=1e-3, atol=1e-5)


def test_no_grad_has_the_same_terms(case, generator):
    teacher = white_box(case, generator)
    want = evaluate(head_loss, *case, weights=ALL, mi=MISettings(), teacher=teacher)
    with torch.no_grad():
        total, terms = head_loss(*case, weights=ALL, mi=MISettings(), teacher=teacher, chunk_bytes=20 * V * 8)
    torch.testing.assert_close(total, want[0])
    assert terms.keys() == want[1].keys()


@pytest.mark.parametrize(("native", "tolerance"), [(False, 1e-4), (True, 0.05)])
def test_low_precision_teacher_beside_a_student_in_float32(case, generator, monkeypatch, native, tolerance):
    """The reference widens the teacher first; where bf16 products are native the teacher's logits are
    rounded."""
    monkeypatch.setattr(products, "multiplies_natively", lambda *_: native)
    teacher = white_box(case, generator)
    low = TeacherDistributions(
        *(TeacherStream(s.hidden.bfloat16()) for s in (teacher.predict, teacher.explain)),
        teacher.weight.bfloat16(),
        teacher.bias.bfloat16(),
    )
    student = [Stream(s.hidden.float(), s.labels, s.cu) for s in case[:2]] + [x.float() for x in case[2:]]
    got = evaluate(head_loss, *student, weights=ALL, teacher=low)
    want = evaluate(head_loss_reference, *student, weights=ALL, teacher=low)
    assert_same(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("make", [white_box, top_k])
@pytest.mark.parametrize("chunk_rows", [1, 10, 48, 1000])
@pytest.mark.parametrize("mi", PAIRED, ids=name_of)
def test_paired_with_the_teacher_equals_the_reference(case, generator, make, chunk_rows, mi):
    both = make(case, generator)
    only_explain = TeacherDistributions(None, both.explain, both.weight, both.bias)
    for teacher in (both, only_explain):
        for weights in (ALL, Weights(0.7, 0.4, 1.3)):
            arguments = {"weights": weights, "mi": mi, "teacher": teacher, "upstream": -1.7}
            got = evaluate(head_loss, *case, **arguments, chunk_bytes=chunk_rows * V * 8)
            assert_same(got, evaluate(head_loss_reference, *case, **arguments))


@pytest.mark.parametrize("function", [head_loss, head_loss_reference])
@pytest.mark.parametrize("make", [white_box, top_k])
@pytest.mark.parametrize("pool", ["max", "mean"])
def test_the_pair_is_its_formula_and_moves_only_predict(case, generator, function, make, pool):
    """-sum_b sum_v E'_b[v] log P'_b[v] by a loop over questions, with E of the teacher, P of the student."""
    predict, explain, weight, bias = case
    teacher = make(case, generator)
    hidden = predict.hidden.clone().requires_grad_()
    want, paper = 0.0, 0.0
    for b in range(len(PREDICT)):
        rows = {}
        for name, stream in (("predict", predict), ("explain", explain)):
            span = torch.arange(stream.cu[b], stream.cu[b + 1])
            rows[name] = span[stream.labels[span] >= 0]
        if not all(len(x) for x in rows.values()):
            continue
        p = torch.softmax(hidden[rows["predict"]] @ weight.T + bias, -1)
        target = teacher.explain
        if make is white_box:
            e = torch.softmax(target.hidden[rows["explain"]] @ teacher.weight.T + teacher.bias, -1)
        else:
            known = target.probabilities[rows["explain"]]
            e = ((1 - known.sum(1)) / (V - K))[:, None].repeat(1, V)
            e.scatter_(1, target.ids[rows["explain"]], known)
            torch.testing.assert_close(e.sum(1), torch.ones(len(e), dtype=e.dtype))
        p, e = (x.max(0).values if pool == "max" else x.mean(0) for x in (p, e))
        paper = paper + torch.nn.functional.cross_entropy(p[None], e[None], reduction="sum")
        want = want - (e / e.sum() * (p / p.sum()).log()).sum()
    for estimator, loss in (("normalized", want), ("paper", paper)):
        mi = MISettings(estimator, pool, pair="teacher")
        got = evaluate(function, *case, weights=Weights(0, 0, 1.0), mi=mi, teacher=teacher)
        torch.testing.assert_close(got[0], loss.detach())
        torch.testing.assert_close(got[2][0], torch.autograd.grad(loss, hidden, retain_graph=True)[0])
        assert torch.equal(got[2][1], torch.zeros_like(got[2][1]))
    assert math.isfinite(got[1]["mi_entropy"])


def test_bad_pairs(case, generator):
    with pytest.raises(ValueError, match="pair = 'twin' is not one of: student, teacher"):
        MISettings(pair="twin")
    with pytest.raises(ValueError, match="pair = 'teacher' can't go with estimator = 'infonce'"):
        MISettings("infonce", pair="teacher")
    good, few = white_box(case, generator), top_k(case, generator, temperature=2.0)
    for message, teacher in {
        "there is no teacher": None,
        "teacher.explain is None": TeacherDistributions(good.predict, None, good.weight, good.bias),
        "its top k is at 2.0": few,
    }.items():
        with pytest.raises(ValueError, match=message):
            head_loss(*case, weights=WEIGHTS, mi=MISettings(pair="teacher"), teacher=teacher)
    logits = [s._replace(hidden=torch.zeros(len(s.labels), V)) for s in case[:2]]
    with pytest.raises(ValueError, match="there is no teacher"):
        logits_loss(*logits, weights=WEIGHTS, mi=MISettings(pair="teacher"))


def test_bad_teachers(case, generator):
    good = white_box(case, generator)
    with pytest.raises(ValueError, match="divergence = 'tv' is not one of: forward, reverse, jsd"):
        TeacherDistributions(divergence="tv")
    with pytest.raises(ValueError, match="beta = 1 must lie between 0 and 1"):
        TeacherDistributions(beta=1)
    with pytest.raises(ValueError, match="temperature = 0 must be positive"):
        TeacherDistributions(temperature=0)
    ids = torch.zeros(len(case[0].labels), K, dtype=torch.int64)
    bad = {
        "one or both streams": TeacherDistributions(),
        "both hidden states or both the same top k": TeacherDistributions(
            good.predict, top_k(case, generator).explain
        ),
        r"teacher.weight must be \[V, D_teacher\] with the student's V = 29, not \[28, 5\]": replace(
            good, explain=None, weight=good.weight[:-1]
        ),
        "not None": TeacherDistributions(good.predict),
        r"teacher.predict.hidden must be \[N, D_teacher\] = \[11, 5\]": TeacherDistributions(
            TeacherStream(good.predict.hidden[1:]), weight=good.weight
        ),
        r"teacher.bias must be \[V\]": TeacherDistributions(good.predict, None, good.weight, good.bias[1:]),
        "ids must be": TeacherDistributions(TeacherStream(None, ids, torch.zeros(3, K))),
        "either hidden, or ids and probabilities": TeacherDistributions(TeacherStream(None, ids)),
    }
    for message, teacher in bad.items():
        with pytest.raises(ValueError, match=message):
            head_loss(*case, weights=WEIGHTS, teacher=teacher)
    with pytest.raises(ValueError, match="teacher.explain is given, but there is no explain stream"):
        head_loss(case[0], None, *case[2:], weights=WEIGHTS, teacher=good)
