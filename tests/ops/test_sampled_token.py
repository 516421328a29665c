"""Estimates of the divergence from one token per position: their means over a whole vocabulary, and the torch
implementation against the reference."""

from dataclasses import replace

import pytest
import torch
from head_loss_cases import PAIRED, assert_same, evaluate, make_head, name_of

from ibdistill.ops.head_loss.api import MISettings, Stream, TeacherDistributions, TeacherStream, Weights
from ibdistill.ops.head_loss.api import head_loss as fused
from ibdistill.ops.head_loss.reference import head_loss_reference
from ibdistill.ops.head_loss.sampled_token import CLIP, SAMPLED, value_and_factor

ALL = Weights(0.7, 0.4, 1.3, kd_predict=0.6, kd_explain=-1.1)


def teacher_of(case, generator, width=5, **settings):
    V = len(case[2])
    weight, bias = make_head(width, V, generator=generator)
    rows = [torch.randn(len(s.labels), width, generator=generator, dtype=torch.float64) for s in case[:2]]
    return TeacherDistributions(*map(TeacherStream, rows), weight / 2, bias, **settings)


@pytest.mark.parametrize("function", [fused, head_loss_reference])
def test_means_over_the_vocabulary(generator, function):
    """Of all labels of a position, each with the student's probability."""
    V, draw = 6, lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    hidden, weight, states, head = draw(1, 4), draw(V, 4), draw(1, 3), draw(V, 3)
    p, q = (torch.log_softmax(x, -1)[0] for x in (hidden @ weight.T, states @ head.T))
    assert (p - q).abs().max() < CLIP

    def of(label, divergence):
        stream = Stream(hidden, torch.tensor([label]), torch.tensor([0, 1]))
        teacher = TeacherDistributions(TeacherStream(states), None, head, divergence=divergence)
        weights = Weights(0.0, kd_predict=1.0)
        total, _, gradients = evaluate(
            function,
            stream,
            None,
            weight,
            torch.zeros(V, dtype=torch.float64),
            weights=weights,
            teacher=teacher,
        )
        return torch.cat([total[None], *(g.flatten() for g in gradients if g is not None)])

    reverse, forward = of(0, "reverse"), of(0, "forward")
    torch.testing.assert_close(reverse[0], (p.exp() * (p - q)).sum())
    torch.testing.assert_close(forward[0], (q.exp() * (q - p)).sum())
    wants = {"k1": (reverse[0], reverse), "k2": (None, reverse), "k3": (reverse[0], forward)}
    for name, (value, gradient) in wants.items():
        mean = sum(p[v].exp() * of(v, name) for v in range(V))
        torch.testing.assert_close(mean[1:], gradient[1:])
        if value is not None:
            torch.testing.assert_close(mean[0], value)


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_k2_and_k3_have_their_own_derivatives(generator, name):
    log_q, log_p = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    log_p.requires_grad_()
    value, factor = value_and_factor(name, log_q, log_p)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), log_p)[0], factor.detach())


def test_clipped_ratios_still_have_a_gradient():
    log_q, log_p = torch.tensor([-300.0, 0.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    log_p[1] = -300
    for name in SAMPLED:
        value, factor = value_and_factor(name, log_q, log_p)
        want = value_and_factor(
            name, torch.tensor([-CLIP, CLIP], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        )
        torch.testing.assert_close((value, factor), want)
        assert value.isfinite().all() and factor[0] > 0 > factor[1]  # less probable, more probable
    assert value_and_factor("k3", log_q, log_p)[0][1] == pytest.approx(22026.47 - 1 - 10, abs=0.01)


@pytest.mark.parametrize("chunk_rows", [1, 10, 48, 1000])
@pytest.mark.parametrize("name", SAMPLED)
def test_equals_the_reference(case, generator, name, chunk_rows):
    both = teacher_of(case, generator, divergence=name, softcap=3.0)
    one = TeacherDistributions(None, both.explain, both.weight, both.bias, name)
    for teacher, mi in ((both, None), (one, None), (both, MISettings("normalized", "mean", "both"))):
        arguments = {"weights": ALL, "mi": mi, "teacher": teacher, "upstream": -1.7, "softcap": 4.0}
        got = evaluate(fused, *case, **arguments, chunk_bytes=chunk_rows * len(case[2]) * 8)
        assert_same(got, evaluate(head_loss_reference, *case, **arguments))


@pytest.mark.parametrize("name", ["forward", "k1"])
def test_weights_of_positions(case, generator, name):
    """Equal to the reference, and the reference to a sum over calls with one position each."""
    teacher = teacher_of(case, generator, divergence=name)
    weights = torch.rand(len(case[1].labels), generator=generator, dtype=torch.float64)
    heavy = replace(teacher, explain=teacher.explain._replace(weights=weights))
    for rows in (10, 1000):
        got = evaluate(fused, *case, weights=ALL, teacher=heavy, chunk_bytes=rows * len(case[2]) * 8)
        assert_same(got, evaluate(head_loss_reference, *case, weights=ALL, teacher=heavy))
    total = 0.0
    for i in (case[1].labels >= 0).nonzero()[:, 0].tolist():
        one = Stream(case[1].hidden[i : i + 1], case[1].labels[i : i + 1], torch.tensor([0, 1]))
        target = TeacherStream(teacher.explain.hidden[i : i + 1])
        alone = TeacherDistributions(target, None, teacher.weight, teacher.bias, name)
        _, terms = head_loss_reference(one, None, *case[2:], weights=ALL, teacher=alone)
        total = total + weights[i] * terms["kd_predict"]
    torch.testing.assert_close(got[1]["kd_explain"], total)
    few = replace(heavy, explain=heavy.explain._replace(weights=weights[1:]))
    with pytest.raises(ValueError, match="teacher.explain.weights must be"):
        fused(*case, weights=ALL, teacher=few)


@pytest.mark.parametrize("mi", PAIRED[:2], ids=name_of)
def test_beside_a_term_that_pools_the_teacher(case, generator, mi):
    teacher = teacher_of(case, generator, divergence="k3")
    got = evaluate(fused, *case, weights=ALL, mi=mi, teacher=teacher, chunk_bytes=10 * len(case[2]) * 8)
    assert_same(got, evaluate(head_loss_reference, *case, weights=ALL, mi=mi, teacher=teacher))


@pytest.mark.parametrize("function", [fused, head_loss_reference])
@pytest.mark.parametrize("name", SAMPLED)
def test_the_labels_probabilities_say_what_states_say(case, generator, name, function):
    """As a server gives them."""
    teacher = teacher_of(case, generator, divergence=name)

    def drawn(stream, target):
        labels = stream.labels.clamp_min(0)[:, None]
        logits = target.hidden @ teacher.weight.T + teacher.bias
        return TeacherStream(None, labels, torch.softmax(logits, -1).gather(1, labels))

    given = replace(
        teacher,
        predict=drawn(case[0], teacher.predict),
        explain=drawn(case[1], teacher.explain),
        weight=None,
        bias=None,
    )
    got = evaluate(function, *case, weights=ALL, teacher=given)
    assert_same(got, evaluate(head_loss_reference, *case, weights=ALL, teacher=teacher))


def test_refusals():
    with pytest.raises(
        ValueError, match="'k1' compares the probabilities of the labels .* got temperature 2"
    ):
        TeacherDistributions(divergence="k1", temperature=2.0)
    few = TeacherStream(None, torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="got a top k, which may lack the label"):
        TeacherDistributions(few, divergence="k3")
