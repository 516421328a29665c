"""Memory of the torch implementation: logits only in chunks, no second copy of the head's gradient."""

import pytest
import torch
from head_loss_cases import MIS, WEIGHTS, evaluate, make_head, make_stream, name_of
from torch.utils._python_dispatch import TorchDispatchMode

from ibdistill.ops import custom
from ibdistill.ops.head_loss import api
from ibdistill.ops.head_loss.api import CHUNK_BYTES, MISettings, head_loss
from ibdistill.ops.head_loss.arguments import Call
from ibdistill.ops.head_loss.reference import head_loss_reference
from ibdistill.ops.head_loss.torch import compute


class LogitsWatch(TorchDispatchMode):
    """The largest tensor with V columns that an operator returned, apart from those allowed."""

    def __init__(self, vocabulary, allowed):
        super().__init__()
        self.vocabulary, self.allowed, self.largest = vocabulary, allowed, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            logits = isinstance(tensor, torch.Tensor) and self.vocabulary in tensor.shape
            if logits and tuple(tensor.shape) not in self.allowed:
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return out


@pytest.mark.parametrize("mi", [m for m in MIS if m is None or m.estimator != "infonce"], ids=name_of)
def test_logits_stay_within_the_chunk(mi, generator):
    D, V, chunk_rows = 4, 997, 32
    predict = make_stream([9, 20, 2], D, V, dtype=torch.float32, generator=generator)
    explain = make_stream([20, 60, 8], D, V, dtype=torch.float32, generator=generator)
    weight, bias = make_head(D, V, torch.float32, generator=generator)
    allowed = {(V, D), (D, V), (V,), (1, V)}
    chunk_bytes = chunk_rows * V * 4
    call = Call(predict, explain, WEIGHTS, mi, None, chunk_bytes)
    # inside the custom op nothing can be watched
    with LogitsWatch(V, allowed) as watch:
        compute(call, weight, bias, [True] * 4)
    assert 0 < watch.largest <= chunk_bytes
    with LogitsWatch(V, allowed) as watch:
        evaluate(head_loss_reference, predict, explain, weight, bias, weights=WEIGHTS, mi=mi)
    assert watch.largest > chunk_bytes


@pytest.mark.parametrize("mi", [None, MISettings()], ids=name_of)
def test_logits_of_8192_tokens_take_what_those_of_512_take(mi, generator):
    V, largest = 997, []
    for tokens in (512, 8192):
        predict, explain = (
            make_stream([n, 3], 4, V, dtype=torch.float32, generator=generator) for n in (5, tokens)
        )
        weight, _ = make_head(4, V, torch.float32, generator=generator)
        call = Call(predict, explain, WEIGHTS, mi, None, 64 * V * 4)
        with LogitsWatch(V, {(V, 4), (4, V), (V,), (1, V), (2, V)}) as watch:
            compute(call, weight, None, [True, True, True, False])
        largest.append(watch.largest)
    assert 0 < largest[0] == largest[1] <= 64 * V * 4


def test_default_chunk_at_t5s_vocabulary(generator):
    """8 questions of 16 + 64 tokens are three chunks of whole questions instead of 640 rows."""
    predict, explain = (
        make_stream([n] * 8, 8, 32128, dtype=torch.float32, generator=generator) for n in (16, 64)
    )
    weight, _ = make_head(8, 32128, torch.float32, generator=generator)
    call = Call(predict, explain, WEIGHTS, MISettings(), None, CHUNK_BYTES["cpu"])
    with LogitsWatch(32128, {(32128, 8), (8, 32128)}) as watch:
        compute(call, weight, None, [True, True, True, False])
    assert 0 < watch.largest <= CHUNK_BYTES["cpu"]


def test_default_chunk_is_the_devices(case, monkeypatch):
    seen = []
    monkeypatch.setattr(api, "_head_loss", lambda *args: seen.append(args) or [torch.zeros(())] * 9)
    head_loss(*case, weights=WEIGHTS)
    assert seen[0][-2] == CHUNK_BYTES["cpu"] < CHUNK_BYTES["gpu"]


def test_the_gradient_is_scaled_in_place_only_if_the_graph_goes(case):
    """A head's gradient is as large as the head: no second copy of it unless backward may be called again."""
    weight = case[2].clone().requires_grad_()
    scaled = []
    with pytest.MonkeyPatch.context() as patch:
        scale = custom._scale
        patch.setattr(custom, "_scale", lambda g, u: scaled.append((g, scale(g, u))) or scaled[-1][1])
        total, _ = head_loss(*case[:2], weight, case[3], weights=WEIGHTS)
        (kept,) = torch.autograd.grad(2 * total, weight, retain_graph=True)
        (last,) = torch.autograd.grad(2 * total, weight)
    assert torch.equal(kept, last)
    assert [g.data_ptr() == out.data_ptr() for g, out in scaled] == [False, True]


def test_a_gradient_that_is_kept_does_not_keep_the_graph(case):
    predict, explain, weight, bias = case
    hidden = predict.hidden.detach().requires_grad_()
    total, _ = head_loss(predict._replace(hidden=hidden), explain, weight, bias, weights=WEIGHTS)
    (gradient,) = torch.autograd.grad(total, hidden)
    assert not gradient.requires_grad and gradient.grad_fn is None
