"""The head loss: cross entropies, mutual information and distillation, never [N, V] logits at once.

There are two public functions: `head_loss` takes packed hidden states and the output head, and `logits_loss`
takes logits that exist already. Two implementations compute the same function, `head_loss.torch` and
`head_loss.triton`, and `head_loss.reference` computes it in plain torch, as the truth for tests.

Both implementations compute the gradients during the forward pass, because the logits exist only then. The
backward pass multiplies these gradients by the upstream gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from ibdistill.ops import custom
from ibdistill.ops.head_loss import torch as head_loss_torch
from ibdistill.ops.head_loss.argument_checks import check_arguments, check_values
from ibdistill.ops.head_loss.arguments import (
    LARGEST_K,
    Call,
    MISettings,
    Stream,
    TeacherDistributions,
    TeacherStream,
    Weights,
)
from ibdistill.ops.head_loss.divergences import DIVERGENCES
from ibdistill.ops.head_loss.estimators import ESTIMATORS
from ibdistill.ops.head_loss.on_states import state_terms
from ibdistill.ops.head_loss.softcap import check_softcap
from ibdistill.ops.implementation import choose

CHUNK_BYTES = {"cpu": 20 << 20, "gpu": 256 << 20}
"""Default bound of the buffers of logits.

The CPU's bound was measured at V = 32128, D = 512, float32: from 160 rows (20 MiB) on, the products' time per
row no longer falls, and with 80 rows it is a quarter more. The GPU's bound was counted and not measured:
every chunk reads and writes the head's gradient, which with R rows of bfloat16 logits is 12 V D bytes beside
the 8 V R bytes of the kernels' passes. That is a share of 1.5 D / R, so R must be large against D. 256 MiB
hold 4177 rows at V = 32128 and 883 at V = 151936.
"""


def head_loss(
    predict: Stream,
    explain: Stream | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    weights: Weights,
    mi: MISettings | None = None,
    teacher: TeacherDistributions | None = None,
    group: Any = None,
    softcap: float | None = None,
    impl: str = "auto",
    chunk_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of cross entropies, mutual-information term and distillation.

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
        softcap: the logits are softcap * tanh(logits / softcap), as Gemma 2's are; None: they are not capped.
            The teacher's logits have their own (`TeacherDistributions.softcap`).
        impl: triton (on a GPU, or anywhere under TRITON_INTERPRET=1), torch, or auto: triton for
            tensors on a GPU where triton is installed and knows the case (not float64, not more
            than the top 256 of a teacher in bfloat16), else torch. The choice of auto is logged once.
        chunk_bytes: at most this much memory for logits (at least one row of them); None: CHUNK_BYTES.

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
    check_softcap("softcap", softcap)
    return _run(predict, explain, weight, bias, weights, mi, teacher, group, softcap, impl, chunk_bytes)


def logits_loss(
    predict: Stream,
    explain: Stream | None,
    *,
    weights: Weights,
    mi: MISettings | None = None,
    impl: str = "auto",
    chunk_bytes: int | None = None,
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
    stand_in = predict.hidden.new_zeros(()).expand(predict.hidden.shape[1], predict.hidden.shape[1])
    check_arguments(predict, explain, stand_in, None, mi, None)
    return _run(predict, explain, None, None, weights, mi, None, None, None, impl, chunk_bytes)


def _run(predict, explain, weight, bias, weights, mi, teacher, group, softcap, impl, chunk_bytes):
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES["cpu" if predict.hidden.device.type == "cpu" else "gpu"]
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes = {chunk_bytes} must be positive")
    differentiated = (predict.hidden, None if explain is None else explain.hidden, weight, bias)
    pooled = None if mi is None or ESTIMATORS[mi.estimator].space == "state" else mi
    total, *values = _head_loss(
        *differentiated,
        *(predict.labels, predict.cu),
        *((None, None) if explain is None else (explain.labels, explain.cu)),
        torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in vars(weights).values()]),
        "" if pooled is None else f"{mi.estimator} {mi.pool} {mi.gradient} {mi.pair}",
        0.1 if pooled is None else float(mi.temperature),
        *_flat(teacher),
        softcap,
        impl,
        chunk_bytes,
        custom.needs_of(differentiated),
    )
    names = _term_names(explain is not None, pooled, teacher)
    terms = {name: value.detach() for name, value in zip(names, values, strict=False)}
    if mi is not None and pooled is None:
        states = state_terms(predict, explain, mi, group)
        total = total + weights.mi * states["mi"]
        terms |= {name: value.detach() for name, value in states.items()}
    return total, terms


# a custom op's annotations become its schema, which knows Optional[Tensor] only by this name
@torch.library.custom_op("ibdistill::head_loss", mutates_args=())
def _head_loss(
    predict: Tensor,
    explain: Optional[Tensor],  # noqa: UP045
    weight: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    predict_labels: Tensor,
    predict_cu: Tensor,
    explain_labels: Optional[Tensor],  # noqa: UP045
    explain_cu: Optional[Tensor],  # noqa: UP045
    weights: Tensor,
    mi: str,
    mi_temperature: float,
    teacher: Sequence[Optional[Tensor]],  # noqa: UP045
    divergence: str,
    beta: float,
    temperature: float,
    teacher_softcap: Optional[float],  # noqa: UP045
    softcap: Optional[float],  # noqa: UP045
    impl: str,
    chunk_bytes: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Total, terms in the order of `_term_names`, gradients. Arguments as in `head_loss`, flattened."""
    streams = [Stream(predict.detach(), predict_labels, predict_cu), None]
    if explain is not None:
        streams[1] = Stream(explain.detach(), explain_labels, explain_cu)
    for name, stream in zip(("predict", "explain"), streams, strict=True):
        check_values(name, stream, predict.shape[1] if weight is None else weight.shape[0])
    call = Call(
        *streams,
        Weights(*weights.tolist()),
        _settings(mi, mi_temperature),
        _teacher(teacher, divergence, beta, temperature, teacher_softcap),
        chunk_bytes,
        softcap,
    )
    if choose("head loss", impl, predict, _missing_in_triton(call)) == "triton":
        from ibdistill.ops.head_loss.triton import compute
    else:
        compute = head_loss_torch.compute
    head = [None if x is None else x.detach() for x in (weight, bias)]
    with torch.autocast(predict.device.type, enabled=False):
        total, terms, gradients = compute(call, *head, list(needs))
    names = _term_names(explain is not None, call.mi, call.teacher)
    assert terms.keys() == set(names), (terms.keys(), names)
    return [
        total,
        *(terms[name] for name in names),
        *(g for g, need in zip(gradients, needs, strict=True) if need),
    ]


@_head_loss.register_fake
def _fake(
    predict, explain, weight, bias, predict_labels, predict_cu, explain_labels, explain_cu,
    weights, mi, mi_temperature, teacher, divergence, beta, temperature, teacher_softcap, softcap, impl,
    chunk_bytes, needs,
):  # fmt: skip
    dtype = torch.float64 if predict.dtype == torch.float64 else torch.float32
    settings = _settings(mi, mi_temperature)
    distributions = _teacher(teacher, divergence, beta, temperature, teacher_softcap)
    names = _term_names(explain is not None, settings, distributions)
    sums = [predict.new_empty((), dtype=dtype) for _ in range(1 + len(names))]
    return sums + custom.fake_gradients((predict, explain, weight, bias), needs)


custom.differentiable_once(_head_loss)


def _settings(mi: str, temperature: float) -> MISettings | None:
    """What `_run` has flattened."""
    if not mi:
        return None
    estimator, pool, gradient, pair = mi.rsplit(" ", 3)
    return MISettings(estimator, pool, gradient, temperature, pair)


def _flat(
    teacher: TeacherDistributions | None,
) -> tuple[list[Tensor | None], str, float, float, float | None]:
    if teacher is None:
        return [None] * (2 * len(TeacherStream._fields) + 2), "forward", 0.5, 1.0, None
    tensors = [*(teacher.predict or TeacherStream()), *(teacher.explain or TeacherStream())]
    tensors = [None if x is None else x.detach() for x in (*tensors, teacher.weight, teacher.bias)]
    return tensors, teacher.divergence, teacher.beta, teacher.temperature, teacher.softcap


def _teacher(
    tensors: Sequence[Tensor | None],
    divergence: str,
    beta: float,
    temperature: float,
    softcap: float | None,
) -> TeacherDistributions | None:
    """What `_flat` has flattened."""
    if all(x is None for x in tensors):
        return None
    n = len(TeacherStream._fields)
    streams = [TeacherStream(*tensors[i : i + n]) for i in (0, n)]
    streams = [None if all(x is None for x in stream) else stream for stream in streams]
    return TeacherDistributions(*streams, *tensors[2 * n :], divergence, beta, temperature, softcap)


def _term_names(has_explain: bool, mi: MISettings | None, teacher: TeacherDistributions | None) -> list[str]:
    streams = ["predict", "explain"] if has_explain else ["predict"]
    names = [f"{kind}_{stream}" for stream in streams for kind in ("ce", "correct")]
    if mi is not None:
        estimator = ESTIMATORS[mi.estimator]
        names += [*estimator.terms, *["mi_bound"] * estimator.is_cross_entropy, "mi_questions"]
    if teacher is not None:
        names += [f"kd_{stream}" for stream in streams if getattr(teacher, stream) is not None]
    return names


def _missing_in_triton(call: Call) -> str | None:
    """What a call needs and the Triton implementation does not have; None: it has everything."""
    if call.mi is not None and not ESTIMATORS[call.mi.estimator].in_triton:
        return f"it has no estimator {call.mi.estimator!r}"
    if call.teacher is None:
        return None
    if call.teacher.is_sampled:
        return None
    if not DIVERGENCES[call.teacher.divergence].in_triton:
        return f"it has no divergence {call.teacher.divergence!r}"
    target = call.teacher.predict or call.teacher.explain
    dtype, k = call.predict.hidden.dtype, 0 if target.ids is None else target.ids.shape[1]
    if k > LARGEST_K.get(dtype, k):
        return f"with {dtype} it takes at most the top {LARGEST_K[dtype]} of a teacher, not {k}"
    return None
