"""The launches of the head loss that the planner counts, against those of the code on meta tensors."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")
from syncs import GPU, counted, no_kernels

from ibdistill.ops.head_loss import triton_weight
from ibdistill.ops.head_loss.arguments import (
    Call,
    MISettings,
    Stream,
    TeacherDistributions,
    TeacherStream,
    Weights,
)
from ibdistill.ops.head_loss.triton import compute
from ibdistill.planning.kernels import head_loss_launches, launches


class Launches(TorchDispatchMode):
    """Counts the kernels of torch's operations on the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, list | tuple) and out else out
        if isinstance(first, torch.Tensor) and first.device.type == GPU:
            self.count += launches(function)
        return out


@pytest.mark.parametrize("distils", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(("questions", "V", "D"), [(64, 32128, 768), (64, 151_936, 896), (8, 151_936, 896)])
def test_launches_of_a_head_loss(monkeypatch, questions, V, D, pooled, distils):
    """T5-base and Qwen2.5-0.5B, targets of 16 and 128 tokens."""
    monkeypatch.setattr(triton_weight, "adds_in_float32", lambda *_: True)

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=GPU)

    rows = [questions * tokens for tokens in (16, 128)]
    ends = [torch.arange(0, n + 1, n // questions, dtype=torch.int32) for n in rows]
    streams = [Stream(new(n, D), new(n, dtype=torch.int64), cu) for n, cu in zip(rows, ends, strict=True)]
    targets = [TeacherStream(new(n, 64)) for n in rows]
    teacher = TeacherDistributions(*targets, new(V, 64)) if distils else None
    mi = MISettings() if pooled else None
    call = Call(*streams, Weights(1, 1, 1, 1, 1), mi, teacher, 256 << 20, None)
    with counted(), no_kernels() as ours, Launches() as torchs:
        compute(call, new(V, D), None, [True, True, True, False])
    told = head_loss_launches(sum(rows), V, 2, pooled=pooled, distils=distils)
    assert 0.7 * told <= torchs.count + len(ours) <= told, (torchs.count, len(ours), told)
