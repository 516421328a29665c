"""How often the host waits for a GPU in a loss: never. What a loss copies there overlaps with its work."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from syncs import GPU, counted, no_kernels

from ibdistill.ops.copies import to_device
from ibdistill.ops.head_loss import infonce
from ibdistill.ops.head_loss.arguments import (
    Call,
    MISettings,
    Stream,
    TeacherDistributions,
    TeacherStream,
    Weights,
)
from ibdistill.ops.head_loss.on_states import state_terms
from ibdistill.ops.head_loss.triton import compute
from ibdistill.ops.vid import api as vid_api
from ibdistill.ops.vid import triton as vid_triton

LENGTHS, V, D = (5, 3, 7), 1000, 16
ROWS = sum(LENGTHS)
TEACHERS = ("none", "states", "top k")
MIS = [None, MISettings(), MISettings("normalized", "mean", "both")]


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=GPU)


def stream(width: int) -> Stream:
    cu = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    return Stream(on_gpu(ROWS, width), on_gpu(ROWS, dtype=torch.int64), cu)


def teacher_of(kind: str) -> TeacherDistributions | None:
    if kind == "none":
        return None
    if kind == "states":
        target = TeacherStream(on_gpu(ROWS, D))
        return TeacherDistributions(target, target, on_gpu(V, D), softcap=30.0)
    target = TeacherStream(None, on_gpu(ROWS, 4, dtype=torch.int64), on_gpu(ROWS, 4, dtype=torch.float32))
    return TeacherDistributions(target, target)


@pytest.mark.parametrize("chunk_rows", [4, 1000])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("mi", MIS, ids=str)
def test_a_head_loss_waits_for_nothing(mi, teacher, chunk_rows):
    with counted() as syncs, no_kernels() as launched:
        states, weights = stream(D), Weights(1, 1, 1, 1, 1)
        call = Call(states, states, weights, mi, teacher_of(teacher), chunk_rows * V * 2, 50.0)
        compute(call, on_gpu(V, D), on_gpu(V), [True] * 4)
    assert syncs.places == [], syncs.places
    assert {"row_stats_kernel", "gradient_kernel", "softcap_kernel"} <= set(launched)


@pytest.mark.parametrize("mi", MIS, ids=str)
def test_a_loss_on_given_logits_waits_for_nothing(mi):
    with counted() as syncs, no_kernels():
        logits = stream(V)
        compute(
            Call(logits, logits, Weights(1, 1, 1), mi, None, 1 << 20), None, None, [True, True, False, False]
        )
    assert syncs.places == [], syncs.places


def test_vid_waits_for_nothing():
    with counted() as syncs, no_kernels() as launched:
        vector, states = on_gpu(24, dtype=torch.float32), on_gpu(ROWS, 24)
        parameters = on_gpu(ROWS, D), on_gpu(24, D), vector, vector
        vid_api.compute(*parameters, states, vid_triton.absorb, 4 * 24 * 2, [True] * 4)
    assert syncs.places == [] and launched == ["residual_kernel"] * 4, syncs.places


def test_infonce_waits_for_nothing(monkeypatch):
    """Two ranks of a GPU job: their hosts tell each other how many questions each has."""
    seen = []

    def all_gather(parts, mine, group):
        seen.append(mine.device.type)
        if mine.dtype == torch.int64:
            [part.copy_(mine) for part in parts]

    monkeypatch.setattr(infonce, "_world_size", lambda group: 2)
    for name, stand_in in (
        ("get_world_size", lambda group: 2),
        ("get_rank", lambda group: 1),
        ("get_backend_config", lambda group: "cpu:gloo,cuda:nccl"),
        ("all_gather", all_gather),
        ("all_reduce", lambda *args, **kwargs: None),
    ):
        monkeypatch.setattr(infonce.dist, name, stand_in)
    for pool in ("max", "mean"):
        with counted() as syncs:
            streams = [stream(D), stream(D)]
            for each in streams:
                each.hidden.requires_grad_()
            terms = state_terms(*streams, MISettings("infonce", pool, "both"), None)
            terms["mi"].backward()
        assert syncs.places == [], syncs.places
        assert streams[0].hidden.grad.shape == (ROWS, D)
    assert seen == ["cpu", GPU] * 4


def test_what_the_counter_sees():
    """Each way to wait, one after the other, and none of the ways not to."""
    with counted() as syncs:
        x, host = on_gpu(3, dtype=torch.float32), torch.ones(3)
        torch.tensor([1.0, 2.0], device=GPU)
        x.new_tensor([1.0])
        host.to(GPU)
        host.to(GPU, non_blocking=True)  # from pageable memory
        for read in (x.sum().item, (x > 0).nonzero, lambda: x[x > 0], x.sum().tolist):
            with pytest.raises((RuntimeError, NotImplementedError)):
                read()
    operations = [place.split(" ", 1)[1] for place in syncs.places]
    assert operations[:4] == ["tensor", "new_tensor", "a blocking copy", "a blocking copy"]
    assert len(operations) == 8, syncs.places
    with counted() as syncs:
        to_device(torch.ones(3), torch.device(GPU))
        torch.full((3,), 2.0, device=GPU)
        torch.where(x > 0, x, 0.0)
        x[torch.arange(2, device=GPU)] += 1
    assert syncs.places == []
