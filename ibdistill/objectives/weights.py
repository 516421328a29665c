"""Which terms, with which weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ibdistill.config.sections import ObjectiveConfig
from ibdistill.objectives.teacher_answers import Wanted
from ibdistill.ops.head_loss.api import MISettings, Weights

if TYPE_CHECKING:
    pass
logger = logging.getLogger("ibdistill")


def streams_of(objective: ObjectiveConfig) -> Sequence[str]:
    """The streams that a method trains."""
    return ("predict",) if objective.method == "finetune" else ("predict", "explain")


def mi_settings(objective: ObjectiveConfig) -> MISettings | None:
    """The mutual-information term that the head loss computes, or None."""
    if "ib" not in objective.method or objective.beta == 0 or objective.estimator in ("vid", "vib"):
        return None
    return MISettings(
        estimator=objective.estimator,
        pool=objective.pool,
        gradient=objective.mi_gradient,
        temperature=objective.infonce_temperature,
        pair=objective.mi_pair,
    )


def uses_vid(objective: ObjectiveConfig) -> bool:
    """Whether the mutual-information term is the one between teacher and student states."""
    return "ib" in objective.method and objective.beta != 0 and objective.estimator == "vid"


def uses_vib(objective: ObjectiveConfig) -> bool:
    """Whether the mutual-information term is the bottleneck between question and decoder."""
    return "ib" in objective.method and objective.beta != 0 and objective.estimator == "vib"


def distils(objective: ObjectiveConfig) -> bool:
    """Whether the teacher's token distributions are distilled."""
    return "kd" in objective.method and objective.gamma != 0


def wanted(objective: ObjectiveConfig) -> Wanted | None:
    """What the objective asks of a teacher; None: nothing."""
    pairs = "ib" in objective.method and objective.beta != 0 and objective.mi_pair == "teacher"
    result = Wanted(uses_vid(objective), distils(objective) or pairs, objective.kd_temperature)
    return result if result.questions or result.targets else None


def teacher_streams(objective: ObjectiveConfig) -> Sequence[str]:
    """The streams whose targets a teacher reads; none if it is asked for question states only."""
    asked = wanted(objective)
    return streams_of(objective) if asked and asked.targets else ()


def step_weights(objective: ObjectiveConfig, counts: dict[str, int]) -> Weights:
    """What each term's *sum* is multiplied with, given a step's global counts (`sampler.Sampler.counts`)."""
    if objective.method == "finetune":
        return Weights(ce_predict=1.0 / counts["predict"])
    predict = objective.alpha / counts["predict"]
    explain = (1.0 - objective.alpha) / max(1, counts["explain"])
    gamma = objective.gamma if distils(objective) else 0.0
    return Weights(
        ce_predict=predict,
        ce_explain=explain,
        mi=objective.beta / max(1, counts["explained"]) if mi_settings(objective) else 0.0,
        kd_predict=gamma * predict,
        kd_explain=gamma * explain,
    )


def means(sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
    """Terms as people read them, from sums and counts of the same steps.

    Cross entropies and divergences in nats a token, the mutual-information terms in nats a
    question; `vid` in nats a question token and teacher dimension, `vib` in nats a question token, its
    twin in the explain stream included.
    """
    counts = counts | dict.fromkeys(("vid", "vib"), counts.get("question_tokens", 0))
    return {
        name: value / (counts.get(name.rsplit("_", 1)[-1]) or sums.get("mi_questions") or 1)
        for name, value in sums.items()
        if name != "mi_questions"
    }


def total(objective: ObjectiveConfig, mean: dict[str, float]) -> float:
    """The total loss of the mean terms."""
    if objective.method == "finetune":
        return mean["ce_predict"]
    shares = {"predict": objective.alpha, "explain": 1 - objective.alpha}
    value = sum(share * mean[f"ce_{stream}"] for stream, share in shares.items())
    if distils(objective):
        value += objective.gamma * sum(share * mean[f"kd_{stream}"] for stream, share in shares.items())
    term = next((mean[name] for name in ("vid", "vib", "mi") if name in mean), 0.0)
    return value + (objective.beta or 0.0) * term


GRADIENT = "gradient_"
"""Prefix of a term that is the squared norm of another term's gradient, see `objectives.term_gradients`."""
