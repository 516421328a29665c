"""The bf16 optimizer's step in parts: how few kernels it launches, and its norm; an operator left out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.comm.torch import build_shm_op
from torch.utils._python_dispatch import TorchDispatchMode

from ibdistill.planning import kernels
from ibdistill.runtime import deepspeed_fixes

NO_KERNEL = ("aten.detach", "aten.view", "aten.empty", "aten.alias", "aten.slice")


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel of their own; a list's operation counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not str(function).startswith(NO_KERNEL)
        return function(*args, **(kwargs or {}))


def stand_in(narrow: list[torch.Tensor], wide: list[torch.Tensor], clip: float) -> SimpleNamespace:
    """DeepSpeed's optimizer for bf16 without ZeRO, as far as the step in parts uses it."""

    def combined_scale(norm: float, *, apply_scale: bool) -> float:
        assert not apply_scale
        return max(1.0, (norm + 1e-6) / clip)

    return SimpleNamespace(
        fp16_groups=[narrow],
        fp32_groups=[wide],
        optimizer=torch.optim.SGD(wide, lr=1.0, foreach=True),  # as fused AdamW does, a list at a time
        unscale_and_clip_grads=combined_scale,
        _update_scale=lambda overflow: None,
    )


def test_a_step_of_t5_bases_284_tensors_launches_under_250_kernels(monkeypatch):
    """A loop over the tensors launched 1,555; the update is by hand, too."""
    generator = torch.Generator().manual_seed(0)
    narrow = [torch.randn(4, 3, generator=generator).bfloat16().requires_grad_() for _ in range(284)]
    for parameter in narrow[1:]:  # the first one has no gradient
        parameter.grad = torch.randn(4, 3, generator=generator).bfloat16()
    gradients = [torch.zeros(4, 3) if p.grad is None else p.grad.float() for p in narrow]
    wide = [p.detach().float() for p in narrow]
    before = [master.clone() for master in wide]
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
    monkeypatch.setattr(deepspeed_fixes, "STEP_ELEMENTS", 12 * 284 // 32)  # 32 parts or so, as on a model
    monkeypatch.setattr(deepspeed_fixes, "_norm", lambda found, _: deepspeed_fixes._norm_at_once(found))
    wrapper = stand_in(narrow, wide, clip=2.0)
    with Launches() as launched:
        deepspeed_fixes._step_in_parts(wrapper)
    assert wrapper._global_grad_norm == pytest.approx(norm, rel=1e-6)
    assert launched.count <= kernels.UPDATE, launched.count
    for parameter, master, old, gradient in zip(narrow, wide, before, gradients, strict=True):
        torch.testing.assert_close(master, old - gradient * 2.0 / norm, rtol=1e-5, atol=1e-6)
        assert torch.equal(parameter, master.bfloat16())
        assert parameter.grad is None and master.grad is None


@pytest.mark.parametrize("norm", ["_norm_at_once", "_norm"])
def test_the_norm_is_that_of_all_gradients_in_fp32(norm):
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(size, generator=generator).bfloat16() for size in (1, 7, 5000, 33)]
    given = (gradients,) if norm == "_norm_at_once" else (gradients, 100)
    expected = float(torch.linalg.vector_norm(torch.cat(gradients).double()))
    assert getattr(deepspeed_fixes, norm)(*given) == pytest.approx(expected, rel=1e-6)


def test_a_device_takes_the_norm_at_once(monkeypatch):
    """A loop over the pieces would launch several kernels for each."""
    monkeypatch.setattr(deepspeed_fixes, "_norm_at_once", len)
    assert deepspeed_fixes._norm([torch.empty(5, device="meta"), torch.empty(7, device="meta")], 100) == 2


def test_the_shared_memory_operator_is_left_out_without_probing_others(monkeypatch):
    """DeepSpeed fills its table of operators at the first look, with a C compiler for some of them."""
    probed = []
    monkeypatch.setattr(deepspeed.ops, "_probe_compatible_ops", lambda: probed.append(1) or {})
    monkeypatch.delitem(vars(deepspeed.ops), "__compatible_ops__", raising=False)
    deepspeed_fixes.leave_shared_memory_operator_out()
    assert build_shm_op() is None and not probed
    monkeypatch.setitem(
        vars(deepspeed.ops), "__compatible_ops__", {"deepspeed_shm_comm": True, "async_io": True}
    )
    deepspeed_fixes.leave_shared_memory_operator_out()
    assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": False, "async_io": True}
