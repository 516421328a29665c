"""Custom operations whose gradients are made in the forward pass.

A custom op is opaque to torch.compile: the compiler sees its fake implementation's shapes and never looks
inside. By convention an op here takes the tensors that it differentiates for first and `needs` (one flag for
each of them) last, and returns [value, detached sums ..., gradients of the value for those needed ...]. The
backward pass multiplies these by the upstream gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("ibdistill", "FRAGMENT")


def differentiable_once(op: torch.library.CustomOpDef) -> None:
    """Register the backward pass of an op that follows the convention."""
    op.register_autograd(_backward, setup_context=_setup)


def needs_of(tensors: Sequence[Tensor | None]) -> list[bool]:
    """Whether each tensor needs a gradient in the current grad mode."""
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]


def fake_gradients(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Shapes and dtypes of the gradients at the end of an op's result."""
    return [x.new_empty(x.shape) for x, need in zip(tensors, needs, strict=True) if need]


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.arguments = inputs[-1], len(inputs)
    ctx.save_for_backward(*output[len(output) - sum(ctx.needs) :])


def _backward(ctx, upstream: list[Tensor | None]):
    value, *others = upstream
    if any(x is not None for x in others):
        raise RuntimeError("this loss is differentiable once: its gradients have no gradient")
    saved = iter(ctx.saved_tensors)
    gradients = [_scale(next(saved), value) if need and value is not None else None for need in ctx.needs]
    return *gradients, *[None] * (ctx.arguments - len(gradients))


def _scale(gradient: Tensor, upstream: Tensor) -> Tensor:
    # Only a graph that is kept reads the saved gradient again. Otherwise it is scaled in place, because the
    # gradient of a head is as large as the head.
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * upstream
    # The gradient is an output of the op: without detach it would keep the op's inputs alive.
    gradient = gradient.detach()
    # The usual upstream gradient is 1, which saves a pass over the memory. On a GPU the host would have to
    # wait for its value, and a traced or fake tensor has none.
    if type(upstream) is Tensor and upstream.device.type == "cpu" and upstream == 1:
        return gradient
    return gradient.mul_(upstream)


def opaque(name: str, function: Callable, fake: Callable) -> Callable:
    """`function` as the op ibdistill::name, opaque to torch.compile, without a gradient.

    `torch.library.custom_op` gives the same at 20 microseconds more per call, which matter for an op that
    runs in every layer. `function` must not return or change its arguments; `fake` makes the shapes.
    """
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ibdistill::{name}", fake)
    return getattr(torch.ops.ibdistill, name).default
