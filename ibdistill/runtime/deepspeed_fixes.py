"""Every place where DeepSpeed is patched or helped."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn

logger = logging.getLogger("ibdistill")


STEP_ELEMENTS = 4_000_000


def _guard(optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
    """Clip, and skip a non-finite step, as the ZeRO optimizers do by themselves.

    Without ZeRO and in fp32 DeepSpeed steps on whatever the gradients are. It does look at
    the optimizer's `overflow` and `_global_grad_norm`, so those are what we set.
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
    """How many gradients a step in bf16 without ZeRO has in fp32 at once, if no parameter is larger."""
    return max(STEP_ELEMENTS, trained // 32)  # few enough parts that their launches cost nothing


def _step_in_parts(wrapper: FP16_UnfusedOptimizer) -> None:
    """A step of DeepSpeed's optimizer for bf16 without ZeRO, with few gradients in fp32 at a time.

    Its own copies all of them to fp32 first: 4 bytes a parameter beside the 16 of the model states, which
    was the peak of a whole step. The arithmetic is the same but for the order in which the norm is summed.
    """
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
    for part in _parts(pairs, elements):
        for parameter, master in part:
            # without a gradient it still decays
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        wrapper.unscale_and_clip_grads(norm)
        wrapper.optimizer.step()  # passes over what has no gradient
        for parameter, master in part:
            master.grad = None
            parameter.data.copy_(master.data)


def _norm(gradients: Sequence[Tensor], elements: int) -> float:
    """Of all of them together, in fp32, by way of one scratch: a copy of each would fragment a CPU's heap."""
    pieces = [piece for gradient in gradients for piece in gradient.flatten().split(elements)]
    wide = torch.empty(max(map(len, pieces)), device=pieces[0].device)
    norms = wide.new_empty(len(pieces))
    for piece, norm in zip(pieces, norms, strict=True):
        torch.linalg.vector_norm(wide[: len(piece)].copy_(piece), out=norm)
    return float(torch.linalg.vector_norm(norms))


def _parts(
    pairs: Sequence[tuple[nn.Parameter, Tensor]], elements: int
) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
    """In their order, as many together as have so many elements; at least one."""
    part, size = [], 0
    for pair in pairs:
        if part and size + pair[1].numel() > elements:
            yield part
            part, size = [], 0
        part.append(pair)
        size += pair[1].numel()
    yield part
