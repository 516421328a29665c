"""The head loss and its reference against finite differences, in float64."""

import pytest
import torch
from head_loss_cases import EVERY_MI, PAIRED, make_head, make_stream, name_of

from ibdistill.ops.head_loss.api import TeacherDistributions, TeacherStream, Weights, head_loss
from ibdistill.ops.head_loss.reference import head_loss_reference


def small(generator, D=3, V=5):
    predict = make_stream([2, 1], D, V, ignored=0, generator=generator)
    explain = make_stream([3, 2], D, V, ignored=0.2, generator=generator)
    targets = [TeacherStream(torch.randn(n, 2, generator=generator, dtype=torch.float64)) for n in (3, 5)]
    teacher = TeacherDistributions(*targets, *make_head(2, V, generator=generator), "jsd", 0.3, 1.5)
    return (predict, explain, *make_head(D, V, generator=generator)), teacher


@pytest.mark.parametrize("function", [head_loss, head_loss_reference])
@pytest.mark.parametrize("mi", [m for m in (*EVERY_MI, *PAIRED) if m.gradient != "both"], ids=name_of)
def test_gradcheck_of_the_side_that_gets_the_gradient(function, mi, generator):
    """gradcheck compares with differences, so the target must stay what it is: only the estimate is moved."""
    case, teacher = small(generator)
    ((_, side),) = mi.directions
    index = ("predict", "explain").index(side)
    weights = Weights(0.3, 0.5, 2.0, 0.7, 0.6)

    def total(hidden):
        moved = list(case)
        moved[index] = moved[index]._replace(hidden=hidden)
        return function(*moved, weights=weights, mi=mi, teacher=teacher)[0]

    assert torch.autograd.gradcheck(total, (case[index].hidden.requires_grad_(),))


@pytest.mark.parametrize("function", [head_loss, head_loss_reference])
@pytest.mark.parametrize("chunk_rows", [2, 100])
def test_gradcheck_of_every_input(function, chunk_rows, generator):
    (predict, explain, weight, bias), teacher = small(generator)
    arguments = {} if function is head_loss_reference else {"chunk_bytes": chunk_rows * 2 * 5 * 8}

    def total(*leafs):
        streams = predict._replace(hidden=leafs[0]), explain._replace(hidden=leafs[1])
        weights = Weights(0.3, 0.5, 0, 0.7, 0.6)
        return function(*streams, *leafs[2:], weights=weights, teacher=teacher, **arguments)[0]

    leafs = [x.requires_grad_() for x in (predict.hidden, explain.hidden, weight, bias)]
    assert torch.autograd.gradcheck(total, leafs)
