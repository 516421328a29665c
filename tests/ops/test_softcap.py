"""Soft-capped logits in the head loss, against autograd through the formula and against the reference."""

from dataclasses import replace

import pytest
import torch
from head_loss_cases import ROW, WEIGHTS, assert_same, evaluate, make_head, make_stream, name_of
from test_distillation import ALL, top_k, white_box

from ibdistill.ops.head_loss.api import MISettings, TeacherDistributions, head_loss
from ibdistill.ops.head_loss.arguments import IGNORED
from ibdistill.ops.head_loss.reference import head_loss_reference
from ibdistill.ops.head_loss.softcap import cap_

CAP = 1.5
"""Well below the cases' logits, so that many of them are near the cap and their slopes near 0."""


def test_capped_in_place_is_the_formula_and_its_derivative(generator):
    z = (3 * torch.randn(9, 5000, generator=generator, dtype=torch.float64)).requires_grad_()
    want = CAP * torch.tanh(z / CAP)
    slope = torch.full_like(z, float("nan")).detach()
    got = cap_(z.detach().clone(), CAP, slope)
    torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)
    (derivative,) = torch.autograd.grad(want.sum(), z)
    torch.testing.assert_close(slope, derivative, rtol=1e-9, atol=1e-12)
    assert cap_(z, None) is z


def test_cross_entropy_and_kd_are_torchs_on_capped_logits(case, generator):
    """Without the reference: cross_entropy and kl_div on logits that are capped by hand, T = 2."""
    predict, _, weight, bias = case
    teacher = replace(white_box(case, generator, temperature=2.0), explain=None, softcap=0.8)
    arguments = {"weights": replace(ALL, ce_explain=0.0, mi=0.0), "teacher": teacher, "softcap": CAP}
    got = evaluate(head_loss, predict, None, weight, bias, **arguments)
    leafs = [x.clone().requires_grad_() for x in (predict.hidden, weight, bias)]
    cap = lambda z, c: c * torch.tanh(z / c)  # noqa: E731
    z = cap(leafs[0] @ leafs[1].T + leafs[2], CAP)
    ce = torch.nn.functional.cross_entropy(z, predict.labels, reduction="sum", ignore_index=IGNORED)
    keep = predict.labels != IGNORED
    y = cap(teacher.predict.hidden @ teacher.weight.T + teacher.bias, 0.8)
    log_q, log_p = (torch.log_softmax(x[keep] / 2, -1) for x in (y, z))
    kd = 4 * torch.nn.functional.kl_div(log_p, log_q, reduction="sum", log_target=True)
    total = ALL.ce_predict * ce + ALL.kd_predict * kd
    torch.testing.assert_close(got[0], total.detach())
    torch.testing.assert_close(got[1]["kd_predict"], kd.detach())
    for ours, theirs in zip([got[2][0], *got[2][2:]], torch.autograd.grad(total, leafs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("teacher", [None, white_box, top_k])
@pytest.mark.parametrize("chunk_rows", [1, 10, 1000])
@pytest.mark.parametrize(
    "mi", [None, MISettings(), MISettings("normalized", "mean", "both"), MISettings("infonce")], ids=name_of
)
def test_equals_the_reference(case, generator, mi, chunk_rows, teacher):
    if teacher is not None:
        teacher = replace(teacher(case, generator, divergence="jsd", temperature=1.7), softcap=0.7)
    arguments = {"weights": ALL, "mi": mi, "teacher": teacher, "softcap": CAP, "upstream": -1.7}
    got = evaluate(head_loss, *case, **arguments, chunk_bytes=chunk_rows * ROW)
    want = evaluate(head_loss_reference, *case, **arguments)
    assert_same(got, want)
    uncapped = evaluate(head_loss_reference, *case, **arguments | {"softcap": None})
    assert not torch.allclose(want[0], uncapped[0], rtol=1e-3)


def test_a_capped_teacher_whose_distribution_is_pooled(case, generator):
    teacher = replace(white_box(case, generator), softcap=0.7)
    arguments = {"weights": ALL, "mi": MISettings("normalized", pair="teacher"), "teacher": teacher}
    got = evaluate(head_loss, *case, **arguments, softcap=CAP, chunk_bytes=24 * ROW)
    assert_same(got, evaluate(head_loss_reference, *case, **arguments, softcap=CAP))


def test_without_gradients_the_terms_are_the_same(case):
    want = evaluate(head_loss, *case, weights=WEIGHTS, mi=MISettings(), softcap=CAP)
    with torch.no_grad():
        _, terms = head_loss(*case, weights=WEIGHTS, mi=MISettings(), softcap=CAP)
    for name, value in want[1].items():
        torch.testing.assert_close(terms[name], value)


@pytest.mark.parametrize("cap", [0, -30.0, float("nan"), float("inf")])
def test_a_cap_must_be_positive(case, cap):
    with pytest.raises(ValueError, match=f"^softcap = {cap} must be positive and finite; None leaves"):
        head_loss(*case, weights=WEIGHTS, softcap=cap)
    with pytest.raises(ValueError, match=f"^teacher.softcap = {cap} must be positive"):
        TeacherDistributions(softcap=cap)


def test_small_and_empty_batches(generator):
    for lengths in (([1], [1]), ([5], [0]), ([], [])):
        streams = [make_stream(x, 7, 29, ignored=0, generator=generator) for x in lengths]
        head = make_head(7, 29, generator=generator)
        got = evaluate(head_loss, *streams, *head, weights=WEIGHTS, softcap=CAP)
        assert_same(got, evaluate(head_loss_reference, *streams, *head, weights=WEIGHTS, softcap=CAP))
