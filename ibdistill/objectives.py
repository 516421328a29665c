"""The objective: which terms, with which weights, on which streams (DESIGN: total loss).

    total = alpha CE_predict + (1 - alpha) CE_explain + beta MI

with each CE a mean over the step's target tokens and MI a mean over the step's questions,
over all ranks and micro-batches. A method is a name for which of the weights are zero.

`finetune` keeps alpha out of it: its one term has weight 1, so that its learning rate means
the same as in ordinary finetuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ibdistill import models
from ibdistill.config import ObjectiveConfig
from ibdistill.data import Batch
from ibdistill.metrics import GRADIENT
from ibdistill.ops.head_loss import MISettings, Stream, Weights, head_loss


def streams_of(objective: ObjectiveConfig) -> Sequence[str]:
    """The streams that a method trains."""
    return ("predict",) if objective.method == "finetune" else ("predict", "explain")


def mi_settings(objective: ObjectiveConfig) -> MISettings | None:
    """The mutual-information term of a method, or None."""
    if objective.method != "ib" or objective.beta == 0:
        return None
    return MISettings(
        estimator=objective.estimator,
        pool=objective.pool,
        gradient=objective.mi_gradient,
        temperature=objective.infonce_temperature,
    )


def step_weights(objective: ObjectiveConfig, counts: dict[str, int]) -> Weights:
    """What each term's *sum* is multiplied with, given a step's global counts (`data.Plan.counts`)."""
    if objective.method == "finetune":
        return Weights(ce_predict=1.0 / counts["predict"])
    return Weights(
        ce_predict=objective.alpha / counts["predict"],
        ce_explain=(1.0 - objective.alpha) / max(1, counts["explain"]),
        mi=objective.beta / max(1, counts["explained"]) if mi_settings(objective) else 0.0,
    )


class _LossHead(nn.Module):
    """The head's weight and the loss on it, as one module.

    ZeRO-3 gathers a module's own parameters around that module's forward, so the loss has to
    happen inside a module that owns the head. The parameter is the model's own, not a copy.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self.measures = False
        """Whether the next forward also measures each term's gradient (`term_gradients`)."""

    def forward(
        self, predict: Stream, explain: Stream | None, weights: Weights, mi: MISettings | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms = head_loss(predict, explain, self.weight, self.bias, weights=weights, mi=mi)
        if self.measures:
            terms |= term_gradients(predict, explain, self.weight, self.bias, weights, mi=mi)
        return total, terms


def term_gradients(
    predict: Stream,
    explain: Stream | None,
    weight: Tensor,
    bias: Tensor | None,
    weights: Weights,
    *,
    mi: MISettings | None,
    **rest: Any,
) -> dict[str, Tensor]:
    """`gradient_TERM` -> squared norm of d (weight x TERM) / d (target states), 0-d fp32, for terms in use.

    Taken where all terms meet, the states that enter the head, so that one head loss a term is the
    cost and no engine takes part. Micro-batches and ranks hold different states of one sum, so
    the squares of a step add up to that of the global batch. `rest` goes to `head_loss`.
    """
    squares = {}
    nothing = Weights(**dict.fromkeys(asdict(weights), 0.0))
    for name, factor in asdict(weights).items():
        if factor == 0:
            continue
        streams = [s and s._replace(hidden=s.hidden.detach().requires_grad_()) for s in (predict, explain)]
        with torch.enable_grad():
            loss, _ = head_loss(
                *streams,
                weight.detach(),
                None if bias is None else bias.detach(),
                weights=replace(nothing, **{name: factor}),
                mi=mi if name == "mi" else None,
                **rest,
            )
        hidden = [s.hidden for s in streams if s is not None]
        gradients = torch.autograd.grad(loss, hidden, allow_unused=True)
        squares[f"{GRADIENT}{name}"] = sum(g.float().square().sum() for g in gradients if g is not None)
    return squares


class Distillation(nn.Module):
    """What the engine wraps: the student, its head and the loss, in one forward."""

    def __init__(self, model: nn.Module, objective: ObjectiveConfig) -> None:
        super().__init__()
        self.model = model
        self.head = _LossHead(model.get_output_embeddings())
        self.mi = mi_settings(objective)

    def forward(self, batch: Batch, weights: Weights) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's share of the step's total (0-d fp32), and the sums of all terms, detached."""
        states = models.target_states(self.model, batch)
        streams = {
            name: Stream(hidden, batch.labels[name], batch.cu[name]) for name, hidden in states.items()
        }
        return self.head(streams["predict"], streams.get("explain"), weights, self.mi)


def means(sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
    """Terms as people read them, from sums and counts of the same steps.

    Cross entropies in nats a token, the mutual-information terms in nats a question.
    """
    return {
        name: value / (counts.get(name.rsplit("_", 1)[-1]) or sums.get("mi_questions") or 1)
        for name, value in sums.items()
        if name != "mi_questions"
    }


def total(objective: ObjectiveConfig, mean: dict[str, float]) -> float:
    """The total loss of the mean terms."""
    if objective.method == "finetune":
        return mean["ce_predict"]
    value = objective.alpha * mean["ce_predict"] + (1 - objective.alpha) * mean["ce_explain"]
    return value + objective.beta * mean.get("mi", 0.0)
