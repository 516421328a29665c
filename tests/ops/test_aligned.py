"""Distillation across vocabularies, against probabilities that are added and multiplied one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ibdistill.ops.head_loss import aligned
from ibdistill.ops.head_loss.aligned import OWN, AlignedStream, AlignedTeacher, Side
from ibdistill.ops.head_loss.api import Stream, TeacherDistributions, TeacherStream, Weights
from ibdistill.ops.head_loss.arguments import SMALLEST_PROBABILITY
from ibdistill.ops.head_loss.divergences import DIVERGENCES

STUDENT, TEACHER = 11, 14
SHARED = [[(0, 3), (2, 1), (5, 9), (7, 0)], [(1, 2), (5, 13)]]
"""(student's token, teacher's token) of two tables."""
SPANS = [  # positions of the student's tokens, of the teacher's, bucket, table
    (0, 1, 0, 1, 2, 0),  # one token each, shared
    (1, 3, 1, 2, 1, 0),  # two tokens against a shared one
    (3, 4, 2, 5, OWN, 0),  # one against three, of which no token is the text
    (4, 7, 5, 7, OWN, 1),  # three against two, at the beginning of a text
    (7, 8, 7, 8, 1, 1),  # one each
    (8, 9, 8, 9, OWN, 0),  # one each, not shared
]
STUDENT_LABELS = [5, 7, 4, 2, 1, 1, 6, 5, 10]
TEACHER_LABELS = [9, 1, 3, 12, 12, 2, 4, 13, 5]


def case(softcap: float | None = None) -> tuple[Stream, torch.Tensor, torch.Tensor, AlignedTeacher]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = (normal(*s).requires_grad_() for s in ((9, 5), (STUDENT, 5), (STUDENT,)))
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    sides = tuple(
        (
            Side.of(torch.tensor([s for s, _ in pairs]), STUDENT),
            Side.of(torch.tensor([t for _, t in pairs]), TEACHER),
        )
        for pairs in SHARED
    )
    stream = AlignedStream(
        normal(9, 3),
        torch.tensor(TEACHER_LABELS),
        torch.tensor([0, 5, 5, 9], dtype=torch.int32),
        torch.tensor(SPANS),
    )
    teacher = AlignedTeacher(
        stream, None, sides, normal(TEACHER, 3), normal(TEACHER), softcap, temperature=1.7, beta=0.3
    )
    return Stream(hidden, torch.tensor(STUDENT_LABELS), cu), weight, bias, teacher


def probabilities(logits, softcap, temperature):
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.softmax(logits / temperature, -1)


def events(p, labels, start, stop, column, bucket, pairs):
    """The events' probabilities, one after the other."""
    shared = [pair[column] for pair in pairs]
    span = math.prod([p[i, labels[i]] for i in range(start, stop)])
    left = {v: p[start, v] for v in range(p.shape[1])}
    left[labels[start]] = left[labels[start]] - span
    found = [left[v] for v in shared]
    found.append(sum((left[v] for v in left if v not in shared), torch.zeros((), dtype=p.dtype)))
    found.append(torch.zeros((), dtype=p.dtype))
    place = bucket if bucket != OWN else len(shared) + 1
    found[place] = found[place] + span
    return torch.stack([x if i == place else x.clamp_min(SMALLEST_PROBABILITY) for i, x in enumerate(found)])


def plain(stream, weight, bias, teacher, softcap):
    p = probabilities(stream.hidden @ weight.T + bias, softcap, teacher.temperature)
    target = teacher.predict
    q = probabilities(target.hidden @ teacher.weight.T + teacher.bias, teacher.softcap, teacher.temperature)
    total = 0.0
    for a, b, c, d, bucket, table in SPANS:
        mine = events(p, STUDENT_LABELS, a, b, 0, bucket, SHARED[table])
        yours = events(q, TEACHER_LABELS, c, d, 1, bucket, SHARED[table])
        loss = DIVERGENCES[teacher.divergence].function(yours.log(), mine.log(), teacher.beta)
        total = total + teacher.temperature**2 * loss
    return total


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd", "total_variation"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_bytes", [1, 900, 1 << 20])
def test_loss_and_gradients_are_those_of_the_formula(divergence, softcap, chunk_bytes):
    stream, weight, bias, teacher = case(softcap)
    teacher = replace(teacher, divergence=divergence)
    expected = plain(stream, weight, bias, teacher, softcap)
    found = aligned.aligned_loss(
        stream, weight, bias, teacher.predict, teacher, softcap=softcap, chunk_bytes=chunk_bytes
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    inputs = stream.hidden, weight, bias
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_tokenizers_give_the_distillation_of_the_head_loss(divergence):
    stream, weight, bias, teacher = case()
    everything = Side.of(torch.arange(STUDENT), STUDENT)
    generator = torch.Generator().manual_seed(4)
    head = torch.randn(STUDENT, 3, generator=generator, dtype=torch.float64) * 3
    spans = torch.tensor([(i, i + 1, i, i + 1, label, 0) for i, label in enumerate(STUDENT_LABELS)])
    own = AlignedStream(teacher.predict.hidden, stream.labels, stream.cu, spans)
    settings = {"divergence": divergence, "beta": 0.3, "temperature": 1.7}
    weights = Weights(ce_predict=0.3, kd_predict=0.7)
    aligned_teacher = AlignedTeacher(own, None, ((everything, everything),), head, **settings)
    usual = TeacherDistributions(TeacherStream(own.hidden), weight=head, **settings)
    inputs, found = (stream.hidden, weight, bias), []
    for given in (aligned_teacher, usual):
        total, terms = aligned.head_loss(stream, None, weight, bias, weights=weights, teacher=given)
        found.append((total, terms["kd_predict"], *torch.autograd.grad(total, inputs)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-14)


def test_both_streams_have_their_own_factors():
    stream, weight, bias, teacher = case()
    both = replace(teacher, explain=teacher.predict)
    total, terms = aligned.head_loss(
        stream, stream, weight, bias, weights=Weights(0.0, kd_predict=2.0, kd_explain=3.0), teacher=both
    )
    assert torch.equal(terms["kd_predict"], terms["kd_explain"])
    torch.testing.assert_close(total.detach(), 5 * terms["kd_predict"])


def test_parts_of_a_stream_add_up_to_the_whole():
    stream, weight, bias, teacher = case()
    whole = aligned.aligned_loss(stream, weight, bias, teacher.predict, teacher)
    parts = teacher.predict.split(4, 2)
    halves = [
        Stream(stream.hidden[:4], stream.labels[:4], stream.cu.clamp(max=4)),
        Stream(stream.hidden[4:], stream.labels[4:], stream.cu[2:] - 4),
    ]
    found = sum(aligned.aligned_loss(h, weight, bias, p, teacher) for h, p in zip(halves, parts, strict=True))
    torch.testing.assert_close(found, whole)
    assert [len(part.cu) for part in parts] == [4, 2]


@pytest.mark.parametrize("bound", [1, 200, 400, 10_000])
def test_chunks_keep_to_the_bound_and_to_one_vocabulary(bound):
    spans = torch.tensor(sorted(SPANS, key=lambda span: span[5]))
    costs = [STUDENT * 8, TEACHER * 8]
    parts = list(aligned._chunks(spans, costs, bound))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(SPANS)))
    for part in parts:
        size = sum((b - a) * costs[0] + (d - c) * costs[1] for a, b, c, d, *_ in spans[part].tolist())
        assert size <= bound or part.stop - part.start == 1
        assert len(spans[part, 5].unique()) == 1
    assert bound < 10_000 or len(parts) == 2


def test_a_stream_without_spans_costs_nothing():
    stream, weight, bias, teacher = case()
    none = teacher.predict._replace(spans=teacher.predict.spans[:0])
    loss = aligned.aligned_loss(stream, weight, bias, none, teacher)
    assert float(loss.detach()) == 0.0
    for gradient in torch.autograd.grad(loss, (stream.hidden, weight, bias)):
        assert not gradient.any()


@pytest.mark.filterwarnings("error:An output with one or more elements was resized")
@pytest.mark.parametrize("chunk_bytes", [1, 300, None])
def test_bf16_is_close_to_fp64(chunk_bytes):
    stream, weight, bias, teacher = case()
    expected = aligned.aligned_loss(stream, weight, bias, teacher.predict, teacher)

    def narrow(x):
        return x.detach().bfloat16().requires_grad_()

    low = stream._replace(hidden=narrow(stream.hidden))
    target = teacher.predict._replace(hidden=teacher.predict.hidden.bfloat16())
    halved = replace(teacher, weight=teacher.weight.bfloat16(), bias=teacher.bias.bfloat16())
    found = aligned.aligned_loss(low, narrow(weight), narrow(bias), target, halved, chunk_bytes=chunk_bytes)
    assert found.dtype == torch.float32 and float(found.detach()) == pytest.approx(
        float(expected.detach()), rel=0.03
    )
    # a student in fp32 beside it, as on a CPU
    high = [x.detach().float() for x in (stream.hidden, weight, bias)]
    other = stream._replace(hidden=high[0])
    mixed = aligned.aligned_loss(other, *high[1:], target, halved, chunk_bytes=chunk_bytes)
    assert float(mixed) == pytest.approx(float(expected.detach()), rel=0.03)
    found.backward()
    assert low.hidden.grad.dtype == torch.bfloat16
