"""`logits_loss`, for logits that exist already, in the torch implementation."""

import pytest
import torch
from head_loss_cases import MIS, ROW, WEIGHTS, assert_same, evaluate, name_of

from ibdistill.ops.head_loss.api import MISettings, logits_loss
from ibdistill.ops.head_loss.reference import head_loss_reference


def given_logits(predict, explain, weight, bias, **arguments):
    """`logits_loss` as a function of hidden states and head."""
    streams = [s and s._replace(hidden=s.hidden @ weight.T + bias) for s in (predict, explain)]
    return logits_loss(*streams, **arguments)


@pytest.mark.parametrize("mi", [m for m in MIS if m is None or m.estimator != "infonce"], ids=name_of)
@pytest.mark.parametrize("chunk_rows", [5, 1000])
def test_given_logits_equal_the_reference(case, mi, chunk_rows):
    arguments = {"weights": WEIGHTS, "mi": mi, "upstream": -1.7}
    got = evaluate(given_logits, *case, **arguments, chunk_bytes=chunk_rows * ROW)
    assert_same(got, evaluate(head_loss_reference, *case, **arguments))


def test_given_logits_stay_as_they_are_and_infonce_has_none(case):
    streams = [s._replace(hidden=s.hidden @ case[2].T) for s in case[:2]]
    before = [s.hidden.clone() for s in streams]
    leafs = [s._replace(hidden=s.hidden.requires_grad_()) for s in streams]
    logits_loss(*leafs, weights=WEIGHTS, mi=MISettings())[0].backward()
    assert all(torch.equal(s.hidden, x) for s, x in zip(streams, before, strict=True))
    with pytest.raises(ValueError, match="'infonce' pools hidden states, of which logits_loss has none"):
        logits_loss(*streams, weights=WEIGHTS, mi=MISettings("infonce"))
    with pytest.raises(ValueError, match=r"predict.hidden must be logits \[N, V\], not \[11\]"):
        logits_loss(streams[0]._replace(hidden=torch.zeros(11)), None, weights=WEIGHTS)
