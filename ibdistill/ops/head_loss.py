"""The head loss: cross entropies, mutual information and distillation, never [N, V] logits at once.

Two doors: `head_loss` takes packed hidden states and the output head, `logits_loss` logits that
somebody has already. Behind them stand two implementations of the same function, `head_loss_torch`
and `head_loss_triton`; `head_loss_reference` is their plain twin, the truth for tests.

Both compute the gradients during the forward pass, because that's when the logits are there; the
backward pass only multiplies them by the upstream gradient.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibdistill.ops import head_loss_torch
from ibdistill.ops.arguments import (
    IGNORED,
    Call,
    MISettings,
    Stream,
    Teacher,
    TeacherStream,
    Weights,
    check_arguments,
    check_choice,
)
from ibdistill.ops.estimators import ESTIMATORS

__all__ = [
    "IGNORED",
    "MISettings",
    "Stream",
    "Teacher",
    "TeacherStream",
    "Weights",
    "head_loss",
    "logits_loss",
]

CHUNK_BYTES = 32 << 20
"""Default bound of the buffers of logits. Measured at V = 32128, D = 512, 640 rows, float32, 2 cores:
the products of 4 and 8 MiB have too few rows (1.3 to 2 times the time), above 32 MiB nothing is won."""

IMPLEMENTATIONS = ("auto", "triton", "torch")

logger = logging.getLogger(__name__)


def head_loss(
    predict: Stream,
    explain: Stream | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weights: Weights,
    mi: MISettings | None = None,
    teacher: Teacher | None = None,
    group: Any = None,
    impl: str = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of cross entropies, mutual-information term and distillation (DESIGN 2).

    Everything is a sum over tokens or questions: put 1 / (their number in the whole step) into
    `weights`. Ignored positions (label -100) count nowhere and aren't pooled. A question without
    positions in one of the streams adds nothing to the mutual-information term.

    Args:
        predict: the predict stream: hidden [N, D], labels [N], cu [B + 1].
        explain: the explain stream, with its own N and the same B; None: there is none.
        weight: output head [V, D], of the same dtype as the hidden states: float32, bfloat16,
            float16 or float64. Sums are accumulated in float32 (float64 for float64).
        bias: [V], optional.
        weights: factor of each sum in the total.
        mi: the mutual-information term; None: no such term.
        teacher: distributions to distil from, and how; None: nothing is distilled.
        group: InfoNCE's process group; None: the default group, or this process alone if there is
            none. With InfoNCE all ranks of the group must call, each with any number of questions.
        impl: triton (on a GPU, or anywhere under TRITON_INTERPRET=1), torch, or auto: triton for
            tensors on a GPU where triton is installed and knows the case (not float64, not a
            teacher's top k), else torch. The choice of auto is logged once.
        chunk_bytes: at most this much memory for logits (at least one row of them).

    Returns:
        total: 0-d float32 (float64 for float64), with gradients for the hidden states, weight and
            bias. Differentiable once; backward may be called again with retain_graph.
        terms: sums without gradient: ce_predict, ce_explain (nats); correct_predict,
            correct_explain (positions whose label has the largest logit, ties included); of the
            mutual-information term mi, mi_questions (their number) and, where the estimator has
            them, mi_bound (lower bound of the mutual information, nats), mi_entropy (of the pooled
            target, nats), mi_constant (see `estimators.paper`); kd_predict, kd_explain (nats,
            times the squared temperature) for the streams that the teacher has.

    Raises:
        ValueError: shapes, dtypes, devices or offsets that don't fit, unknown names, mi without
            explain, impl = triton where it can't run.
    """
    check_arguments(predict, explain, weight, bias, mi, teacher)
    return _dispatch(predict, explain, weight, bias, weights, mi, teacher, group, impl, chunk_bytes)


def logits_loss(
    predict: Stream,
    explain: Stream | None,
    *,
    weights: Weights,
    mi: MISettings | None = None,
    impl: str = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`head_loss` for logits that exist already, to be dropped into other trainers.

    The gradient of the logits is a new tensor of their size; the logits stay as they are. Where hidden
    states can be had, `head_loss` needs far less memory.

    Args:
        predict, explain: streams whose `hidden` are logits [N, V].
        weights, mi, impl, chunk_bytes: as in `head_loss`. Estimators on hidden states (infonce) are refused.

    Returns:
        As `head_loss`; the total has gradients for the logits.

    Raises:
        ValueError: as `head_loss`.
    """
    if mi is not None and ESTIMATORS[mi.estimator].space == "state":
        raise ValueError(f"estimator = {mi.estimator!r} pools hidden states, of which logits_loss has none")
    if predict.hidden.ndim != 2:
        raise ValueError(f"predict.hidden must be logits [N, V], not {list(predict.hidden.shape)}")
    # a head that maps V logits to V logits has the right shape, dtype and device, and takes no memory
    stand_in = predict.hidden.new_empty(()).expand(predict.hidden.shape[1], predict.hidden.shape[1])
    check_arguments(predict, explain, stand_in, None, mi, None)
    return _dispatch(predict, explain, None, None, weights, mi, None, None, impl, chunk_bytes)


def _dispatch(predict, explain, weight, bias, weights, mi, teacher, group, impl, chunk_bytes):
    check_choice("impl", impl, IMPLEMENTATIONS)
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes = {chunk_bytes} must be positive")
    call = Call(predict, explain, weights, mi, teacher, group, chunk_bytes, torch.is_grad_enabled())
    compute = _choose(call, impl)
    terms: dict[str, Tensor] = {}
    explain_hidden = None if explain is None else explain.hidden
    return _HeadLoss.apply(predict.hidden, explain_hidden, weight, bias, call, compute, terms), terms


class _HeadLoss(torch.autograd.Function):
    """Gradients are made in the forward pass; the backward pass multiplies copies by the upstream scalar."""

    @staticmethod
    def forward(ctx, predict_hidden, explain_hidden, weight, bias, call: Call, compute, terms):
        # needs_input_grad doesn't know about no_grad, and grad mode is always off in here
        needs = [call.differentiate and need for need in ctx.needs_input_grad[:4]]
        head = [None if x is None else x.detach() for x in (weight, bias)]
        with torch.autocast(predict_hidden.device.type, enabled=False):
            total, values, gradients = compute(call, *head, needs)
        terms.update(values)
        ctx.save_for_backward(*(g if need else None for g, need in zip(gradients, needs, strict=True)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        return *(None if g is None else g * upstream for g in ctx.saved_tensors), None, None, None


def _choose(call: Call, impl: str):
    """The implementation's `compute`."""
    if impl == "torch":
        return head_loss_torch.compute
    reason = _why_not_triton(call)
    if impl == "triton" and reason is not None:
        raise ValueError(f"impl = 'triton' can't run: {reason}; use impl = 'torch' (or 'auto')")
    if impl == "auto" and reason is None and call.predict.hidden.device.type != "cuda":
        reason = "the tensors are on a CPU, and its interpreter is for tests only"
    if impl == "auto":
        _log_choice(reason)
    if reason is not None:
        return head_loss_torch.compute
    from ibdistill.ops import head_loss_triton

    return head_loss_triton.compute


def _why_not_triton(call: Call) -> str | None:
    """None if the Triton implementation can take this call, else why not. ROCm is cuda to torch."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if call.predict.hidden.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are not on a GPU, and TRITON_INTERPRET=1 is not set"
    if call.predict.hidden.dtype == torch.float64:
        return "it has no float64"
    teacher = call.teacher
    if teacher is not None and any(
        s is not None and s.ids is not None for s in (teacher.predict, teacher.explain)
    ):
        return "a teacher's top k is only in the torch implementation"
    return None


@cache
def _log_choice(reason: str | None) -> None:
    if reason is None:
        logger.info("head loss: the Triton implementation")
    else:
        logger.info("head loss: the torch implementation (%s)", reason)
