"""Every place where DeepSpeed is patched or helped, each as a function that is called by name."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

NO_THROUGHPUT_TIMER = {"throughput": {"enabled": False}}
"""`timers` of a DeepSpeed configuration. By default DeepSpeed waits for the device in order to measure."""
STEP_ELEMENTS = 4_000_000
"""Gradients that a step in parts holds in fp32 at a time, at least."""


def leave_shared_memory_operator_out() -> None:
    """Keep DeepSpeed from compiling an operator for tensor parallelism on a CPU, which is not used here.

    A process killed during the compilation leaves a lock in the cache that every later run waits for. Nothing
    else is looked up in this table, which DeepSpeed would fill by probing all operators with a C compiler.
    """
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's optimizer Muon without its decorators.

    `deepspeed.initialize` imports Muon, whose decorators load TorchInductor. That takes a second of every
    start, for an optimizer that our runs do not use. Once it has been imported without them it stays so.
    """
    with mock.patch.object(deepspeed.runtime.compiler, "compile", lambda **_: lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def guard_fp32_steps(optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
    """Make an optimizer clip, and skip a non-finite step, as the ZeRO optimizers do by themselves.

    Without ZeRO and in fp32, DeepSpeed takes the step whatever the gradients are. But it does read the
    optimizer's `overflow` and `_global_grad_norm`, so those are what a hook before the step sets.
    """

    def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        optimizer._global_grad_norm = norm
        optimizer.overflow = not bool(norm.isfinite())
        if optimizer.overflow:
            for parameter in parameters:
                parameter.grad = None
        elif clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)

    optimizer.register_step_pre_hook(before_step)


def step_elements(trained: int) -> int:
    """How many gradients a step in bf16 without ZeRO holds in fp32 at once, if no parameter is larger."""
    return max(STEP_ELEMENTS, trained // 32)  # at most 32 parts or so, so that their launches cost nothing


def take_bf16_steps_in_parts(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let the engine's optimizer for bf16 without ZeRO hold few gradients in fp32 at a time.

    DeepSpeed's own step copies all gradients to fp32 first. These are 4 bytes per parameter beside the 16 of
    the model states, and they were the peak of a whole training step. The arithmetic stays the same but for
    the order in which the norm is summed. Any other optimizer is left as it is.
    """
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):  # despite its name it is bf16's too
        engine.optimizer.step = partial(_step_in_parts, engine.optimizer)


def _step_in_parts(wrapper: FP16_UnfusedOptimizer) -> None:
    """The step itself, in place of `FP16_UnfusedOptimizer.step`."""
    groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
    pairs = [pair for narrow, wide in groups for pair in zip(narrow, wide, strict=True)]
    elements = step_elements(sum(master.numel() for _, master in pairs))
    norm = _norm([p.grad for p, _ in pairs if p.grad is not None], elements)
    wrapper.overflow = not math.isfinite(norm)
    if wrapper.overflow:
        wrapper._skip_invalid_grad_norm()
        return
    wrapper._global_grad_norm = norm
    wrapper._update_scale(False)
    scale = 1.0 / wrapper.unscale_and_clip_grads(norm, apply_scale=False)
    for part in _parts(pairs, elements):
        gradients = _widened(part)
        if scale != 1.0:
            torch._foreach_mul_(gradients, scale)
        for (parameter, master), gradient in zip(part, gradients, strict=True):
            parameter.grad, master.grad = None, gradient
        del gradients, gradient  # the next part's must not join them in memory
        wrapper.optimizer.step()  # it passes over the masters without a gradient
        torch._foreach_copy_([p.data for p, _ in part], [master.data for _, master in part])
        for _, master in part:
            master.grad = None


def _widened(part: Sequence[tuple[nn.Parameter, Tensor]]) -> list[Tensor]:
    """The parameters' gradients in fp32; zeros for one that has none, since it decays all the same.

    A GPU launches few kernels for the whole list, as for the other `_foreach` operations here, where a loop
    would launch one for each tensor.
    """
    wide = [torch.zeros_like(m) if p.grad is None else torch.empty_like(m) for p, m in part]
    there = [(w, p.grad) for w, (p, _) in zip(wide, part, strict=True) if p.grad is not None]
    if there:
        torch._foreach_copy_([w for w, _ in there], [gradient for _, gradient in there])
    return wide


def _norm(gradients: Sequence[Tensor], elements: int) -> float:
    """The norm of all gradients together, in fp32. Waits for the device.

    On a CPU they are widened through one scratch tensor, since a copy of each would fragment its heap. A GPU
    widens them while it reads them.
    """
    if gradients[0].device.type != "cpu":
        return _norm_at_once(gradients)
    pieces = [piece for gradient in gradients for piece in gradient.flatten().split(elements)]
    wide = torch.empty(max(map(len, pieces)), device=pieces[0].device)
    norms = wide.new_empty(len(pieces))
    for piece, norm in zip(pieces, norms, strict=True):
        torch.linalg.vector_norm(wide[: len(piece)].copy_(piece), out=norm)
    return float(torch.linalg.vector_norm(norms))


def _norm_at_once(gradients: Sequence[Tensor]) -> float:
    """`_norm` in few kernels."""
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def _parts(
    pairs: Sequence[tuple[nn.Parameter, Tensor]], elements: int
) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
    """The pairs in their order, cut into parts of at most `elements` elements, but at least one pair each."""
    part, size = [], 0
    for pair in pairs:
        if part and size + pair[1].numel() > elements:
            yield part
            part, size = [], 0
        part.append(pair)
        size += pair[1].numel()
    yield part
