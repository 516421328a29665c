"""Estimators of the mutual information between the predict and the explain stream.

The paper (Chen et al., Findings of ACL 2024, arXiv 2403.03348, section 3) maximises I(Z; V),
Z and V being the representations of the two tasks, through the variational bound of Barber and
Agakov (NIPS 2003): for any q,

    I(Z; V) = H(V) - H(V | Z) >= H(V) + E[log q(V | Z)] = H(V) - CE,

so that minimising a cross entropy CE maximises a lower bound (all in nats). The estimators
differ in what they take for V and q. Each is a small function of one signature,

    estimator(target, estimate, *, temperature, group) -> {"mi": [B], ...}

with one value per question, of which the loss takes sums, and one line in ESTIMATORS. `target` never
receives a gradient: which stream it is, is the caller's choice (the paper detaches predict). An estimator
works in one of two spaces:

- "distribution": target and estimate are the *logarithms* of pooled distributions [B, V], because the
  logarithm of a probability that underflows is still a good number, and its ratio to another still a good
  gradient. A stream's distributions p[t, v] are pooled over its positions, P[v] = max_t p[t, v] (the paper)
  or mean_t p[t, v]; ties in a max go to the first position. The head loss calls the function for a few
  questions at a time, so a question's values may depend on that question alone, `group` is always None, and
  no collective may be started.
- "state": target and estimate are pooled hidden states [B, D] of all questions of this rank's micro-batch at
  once, with a row of zeros for a question without positions in both streams, whose values count for nothing.
  Since such a function compares questions, a step is not split into micro-batches with it
  (`objectives.weights.check_split`).

The plain function is all that an estimator needs. Where it has no `gradient`, the torch implementation
differentiates it by `torch.func`, and says so once in the log. Where it is not `in_triton`, the torch
implementation is taken on a GPU too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ibdistill.ops.head_loss.infonce import infonce
from ibdistill.ops.implementation import log_plain_form


def paper(
    target: Tensor, estimate: Tensor, *, temperature: float = 1.0, group: Any = None
) -> dict[str, Tensor]:
    """The paper's term as its published code has it: torch's `cross_entropy(E, P)`, probabilities as logits.

    One thing differs from that code. It pools over all positions of a padded batch, so that P and E also
    depend on what a model predicts at padding, and thereby on how long a batch's other targets are. Here a
    question is pooled over its own target positions only, the end token among them.

    mi[b] = -sum_v P[b, v] log_softmax(E[b])[v]. It bounds nothing: P does not sum to one, and
    softmax(E) of numbers in [0, 1] is nearly uniform whatever E is, so the term hardly leaves

        mi_constant[b] = (sum_v P[b, v]) ln V,

    its value for a constant E. It is reported beside the term for that reason.

    Args:
        target, estimate: log P and log E, [B, V].
        temperature, group: unused.

    Returns:
        mi, mi_constant, mi_entropy (that of P / sum P, nats), each [B].
    """
    probabilities = target.detach().exp()
    loss = -(probabilities * torch.log_softmax(estimate.exp(), -1)).sum(-1)
    constant = probabilities.sum(-1) * math.log(target.shape[-1])
    return {"mi": loss, "mi_constant": constant, "mi_entropy": _entropy(target.detach())}


def normalized(
    target: Tensor, estimate: Tensor, *, temperature: float = 1.0, group: Any = None
) -> dict[str, Tensor]:
    """The repaired form: cross entropy between the pooled distributions, both made to sum to one.

    mi[b] = -sum_v P'[b, v] log E'[b, v], with P' = P / sum P and E' = E / sum E, is the CE of the
    variational bound with V drawn from P'[b] and q = E'[b]; its floor is mi_entropy[b] = H(P'[b]),
    reached at E' = P'. `barber_agakov` turns the mean into the bound.

    Args:
        target, estimate: log P and log E, [B, V].
        temperature, group: unused.

    Returns:
        mi, mi_entropy (nats), each [B].
    """
    probabilities = torch.softmax(target.detach(), -1)
    loss = -(probabilities * torch.log_softmax(estimate, -1)).sum(-1)
    return {"mi": loss, "mi_entropy": _entropy(target.detach())}


def paper_gradient(target: Tensor, estimate: Tensor) -> Tensor:
    """d (sum of `paper`'s mi) / d estimate, [B, V]: E (sum P softmax(E) - P)."""
    e, p = estimate.exp(), target.exp()
    return torch.softmax(e, -1).mul_(p.sum(-1, keepdim=True)).sub_(p).mul_(e)


def normalized_gradient(target: Tensor, estimate: Tensor) -> Tensor:
    """d (sum of `normalized`'s mi) / d estimate, [B, V]: E' - P'."""
    return torch.softmax(estimate, -1).sub_(torch.softmax(target, -1))


class Estimator(NamedTuple):
    """An estimator: its plain form, and its fused form where it has one. See the module's docstring."""

    function: Callable[..., dict[str, Tensor]]
    """The plain form."""
    space: Literal["distribution", "state"]
    """What it is given."""
    terms: tuple[str, ...] = ("mi",)
    """Names of the values that `function` returns, for estimators on distributions."""
    is_cross_entropy: bool = False
    """Whether mi is the CE of the variational bound between pooled distributions that are made to sum to one.
    The head loss then also reports `mi_bound`, from `barber_agakov`."""
    gradient: Callable[[Tensor, Tensor], Tensor] | None = None
    """Fused form, for estimators on distributions: d (sum of mi) / d estimate, [B, V], from target and
    estimate. None: `torch.func` differentiates `function`."""
    in_triton: bool = False
    """Whether the Triton implementation of the head loss has it."""


ESTIMATORS = {
    "paper": Estimator(
        paper, "distribution", ("mi", "mi_entropy", "mi_constant"), gradient=paper_gradient, in_triton=True
    ),
    "normalized": Estimator(
        normalized, "distribution", ("mi", "mi_entropy"), True, normalized_gradient, in_triton=True
    ),
    "infonce": Estimator(infonce, "state"),
}


def values_and_gradient(
    name: str, target: Tensor, estimate: Tensor, temperature: float, *, differentiate: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The values of an estimator on distributions, each [B], and d (sum of mi) / d estimate, [B, V].

    Args:
        name: in ESTIMATORS.
        target, estimate: log P and log E, [B, V].
        temperature: handed to the estimator.
        differentiate: whether the gradient is needed; else it is None.

    Raises:
        ValueError: the estimator returned other values than its line in ESTIMATORS names.
    """
    estimator = ESTIMATORS[name]

    def total(estimate: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        values = estimator.function(target, estimate, temperature=temperature, group=None)
        return values["mi"].sum(), values

    if differentiate and estimator.gradient is None:
        log_plain_form("estimator", name)
        # torch.func, because a custom op, inside which this runs, is hidden from torch.autograd
        gradient, values = torch.func.grad(total, has_aux=True)(estimate)
    else:
        _, values = total(estimate)
        gradient = estimator.gradient(target, estimate) if differentiate else None
    if values.keys() != set(estimator.terms):
        raise ValueError(
            f"the estimator {name!r} returned {', '.join(values)}, and its line in ESTIMATORS names the terms"
            f" {', '.join(estimator.terms)}: name there what it returns"
        )
    return values, gradient


POOLS = ("max", "mean")

DIRECTIONS = {
    "explain": (("predict", "explain"),),
    "predict": (("explain", "predict"),),
    "both": (("predict", "explain"), ("explain", "predict")),
}
"""Gradient side -> (target, estimate) pairs. The term is the mean over the pairs."""


def barber_agakov(target_sum: Tensor, loss_sum: Tensor | float, count: int | Tensor) -> Tensor:
    """Sum over questions of the bound H(V) - CE of the `normalized` estimator, in nats.

    H(V) is the entropy of the mean of the questions' P', a plug-in estimate over these questions: the bound
    cannot exceed the logarithm of their number, and the bounds of a step's micro-batches add up to less than
    that of the whole step. Compare it at equal numbers of questions only.

    Args:
        target_sum: sum over questions of P', [V].
        loss_sum: sum over questions of the cross entropies, 0-d.
        count: number of questions.
    """
    mean = target_sum / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))
    return -torch.xlogy(mean, mean).sum() * count - loss_sum


def pool_states(states: Tensor, pool: str) -> Tensor:
    """Pool the hidden states [n, D] of one stream (n >= 1) over its positions, to [D]."""
    return states.max(0).values if pool == "max" else states.mean(0)


def _entropy(log_pooled: Tensor) -> Tensor:
    """Entropy in nats of pooled distributions once they sum to one. [B, V] -> [B]."""
    logs = torch.log_softmax(log_pooled, -1)
    # a probability of exactly 0 has the logarithm -inf, and 0 * -inf is not a number
    return -(logs.exp() * logs.clamp_min(torch.finfo(logs.dtype).min)).sum(-1)
