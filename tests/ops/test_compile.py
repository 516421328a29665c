"""Under torch.compile the losses are opaque custom ops: no graph breaks, no compilation for a token count."""

import pytest
import torch
from head_loss_cases import EVERY_MI, PAIRED, assert_same, evaluate, make_head, make_stream, name_of
from test_vid import evaluate as evaluate_vid
from test_vid import make as make_vid
from torch._dynamo.testing import CompileCounterWithBackend

from ibdistill.ops.head_loss import api
from ibdistill.ops.head_loss.api import (
    MISettings,
    TeacherDistributions,
    TeacherStream,
    Weights,
    head_loss,
    logits_loss,
)
from ibdistill.ops.vid.api import _vid_loss, vid_loss

D, V = 7, 29
PREDICT, EXPLAIN = [3, 4, 1, 1, 2, 0], [6, 19, 1, 2, 0, 3]
WEIGHTS = Weights(0.7, 0.4, 1.3, 0.6, 0.5)
# the fourth of opcheck's tests differentiates every output; ours refuse that, and are compiled below instead
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
MIS = [None, *(mi for mi in (*EVERY_MI, *PAIRED) if mi.estimator != "infonce")]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def make(generator, lengths=(PREDICT, EXPLAIN), dtype=torch.float64):
    streams = [make_stream(x, D, V, dtype=dtype, generator=generator) for x in lengths]
    targets = [
        TeacherStream(torch.randn(len(s.labels), 5, generator=generator, dtype=dtype)) for s in streams
    ]
    teacher = TeacherDistributions(*targets, *make_head(5, V, dtype, generator))
    return (*streams, *make_head(D, V, dtype, generator)), teacher


def op_arguments(case, mi, teacher, needs):
    """Arguments of the custom op as `head_loss` passes them."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "_head_loss", lambda *args: seen.append(args) or [torch.zeros(())] * 20)
        predict, explain, weight, bias = case
        leafs = [
            x.detach().clone().requires_grad_(need)
            for x, need in zip((predict.hidden, explain.hidden, weight, bias), needs, strict=True)
        ]
        streams = predict._replace(hidden=leafs[0]), explain._replace(hidden=leafs[1])
        head_loss(*streams, *leafs[2:], weights=WEIGHTS, mi=mi, teacher=teacher)
    return seen[0]


@pytest.mark.parametrize("mi", [None, MISettings("paper"), MISettings("normalized", "mean", pair="teacher")])
@pytest.mark.parametrize("needs", [(True,) * 4, (False, True, True, False)])
def test_the_head_loss_is_a_sound_op(generator, mi, needs):
    case, teacher = make(generator)
    torch.library.opcheck(api._head_loss, op_arguments(case, mi, teacher, needs), test_utils=CHECKS)


@pytest.mark.parametrize("tokens", [0, 6])
def test_vid_is_a_sound_op(generator, tokens):
    student, teacher, *rest = make_vid(tokens, 3, 5, generator)
    leafs = [x.requires_grad_() for x in (student, *rest)]
    torch.library.opcheck(_vid_loss, (*leafs, teacher, "torch", 80, [True] * 4), test_utils=CHECKS)


@pytest.mark.parametrize("mi", MIS, ids=name_of)
@pytest.mark.parametrize("taught", [False, True])
def test_compiled_equals_eager(generator, mi, taught):
    case, teacher = make(generator)
    if mi is not None and mi.pair == "teacher":
        taught = True
    arguments = {"weights": WEIGHTS, "mi": mi, "teacher": teacher if taught else None, "upstream": -0.7}
    compiled = torch.compile(head_loss, backend="aot_eager", fullgraph=True)
    assert_same(
        evaluate(compiled, *case, **arguments), evaluate(head_loss, *case, **arguments), rtol=0, atol=0
    )


def test_compiled_in_the_middle_of_a_model(generator):
    """The gradient goes on into what made the hidden states, compiled in the same graph."""
    (predict, explain, weight, bias), _ = make(generator)
    inner = torch.randn(D, D, generator=generator, dtype=torch.float64, requires_grad=True)

    def loss(predict, explain, weight, bias, **arguments):
        streams = [s._replace(hidden=torch.tanh(s.hidden @ inner)) for s in (predict, explain)]
        total, terms = head_loss(*streams, weight, bias, **arguments)
        return 2 * total, terms

    results, gradients = [], []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        inner.grad = None
        results.append(evaluate(function, predict, explain, weight, bias, weights=WEIGHTS, mi=MISettings()))
        gradients.append(inner.grad)
    assert_same(*results, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients)


def test_infonce_breaks_the_graph_and_still_works(generator):
    case, _ = make(generator)
    arguments = {"weights": WEIGHTS, "mi": MISettings("infonce", gradient="both")}
    compiled = torch.compile(head_loss, backend="aot_eager")
    assert_same(evaluate(compiled, *case, **arguments), evaluate(head_loss, *case, **arguments))


def test_logits_and_vid_compiled(generator):
    (predict, explain, weight, _), _ = make(generator)
    streams = [s._replace(hidden=s.hidden @ weight.T) for s in (predict, explain)]
    compiled = torch.compile(logits_loss, backend="aot_eager", fullgraph=True)
    want, got = (f(*streams, weights=WEIGHTS, mi=MISettings())[0] for f in (logits_loss, compiled))
    assert torch.equal(got, want)
    inputs = make_vid(9, 4, 6, generator)
    compiled = torch.compile(vid_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(evaluate_vid(compiled, inputs, 0.4), evaluate_vid(vid_loss, inputs, 0.4))


def test_token_counts_compile_nothing_new(generator):
    """The second shape makes sizes symbolic; from then on one graph serves every batch and every weight."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(head_loss, backend=counter, fullgraph=True)
    compiled_vid = torch.compile(vid_loss, backend=counter, fullgraph=True)
    batches = [([3, 4], [6, 19]), ([5, 2, 2], [3, 9, 4]), ([4] * 5, [7] * 5), ([9, 8, 1, 2], [6, 5, 4, 3])]
    counts = []
    for lengths in batches:
        case, teacher = make(generator, lengths)
        weights = Weights(*(torch.tensor(x / sum(lengths[0])) for x in (1.0, 0.5, 0.2, 0.1, 0.1)))
        arguments = {"weights": weights, "mi": MISettings(), "teacher": teacher}
        assert_same(
            evaluate(compiled, *case, **arguments), evaluate(head_loss, *case, **arguments), rtol=0, atol=0
        )
        inputs = make_vid(sum(lengths[0]), 4, 6, generator)
        torch.testing.assert_close(evaluate_vid(compiled_vid, inputs), evaluate_vid(vid_loss, inputs))
        counts.append(counter.frame_count)
    assert counts[0] == 2 and counts[1:] == [4] * 3


def test_a_float_weight_compiles_anew(generator):
    """A float is a constant of the graph, which is the reason to pass tensors in `Weights`."""
    case, _ = make(generator)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(head_loss, backend=counter)
    for weight in (0.5, 0.25, 0.125):
        compiled(*case, weights=Weights(weight))
    assert counter.frame_count > 1
