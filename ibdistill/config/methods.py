"""The methods: which streams are trained, and which terms join their cross entropies.

Streams are kinds of rows: predict (question, label), explain (question, rationale) and reason (question,
rationale, label).

The table stands in `config`, not in `objectives`, because both need it: settings are checked against it
before torch is imported, and a package imports only those before it.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from ibdistill.config.fields import Rule

PREDICT, BOTH, REASON = ("predict",), ("predict", "explain"), ("reason",)

HEAD_ESTIMATORS, QUESTION_ESTIMATORS = ("paper", "normalized", "infonce"), ("vid", "vib")
"""Estimators of the mutual-information term: between the two streams, and on the question's states."""

DIVERGENCES = tuple("forward reverse jsd skew_forward skew_reverse adaptive total_variation top1".split())
"""The names in `ops.head_loss.divergences.DIVERGENCES`, for checks before torch is imported."""

SAMPLED = ("k1", "k2", "k3")
"""The names in `ops.head_loss.sampled_token.SAMPLED`: estimates from tokens that the student has drawn."""
WITHOUT_BETA = ("forward", "reverse", "total_variation", "top1", *SAMPLED)
"""Those divergences that have no parameter `beta`."""


class Method(NamedTuple):
    """What a method minimises."""

    streams: tuple[str, ...]
    """Streams whose cross entropies are minimised, in the order of `records.SEGMENTS`."""
    mi: bool = False
    """Whether the mutual-information term joins them, between predict and explain or between a reason
    stream's answer and rationale; one such pair at most."""
    kd: bool = False
    """Whether the divergence from the teacher's token distributions joins them."""

    @property
    def explains(self) -> bool:
        """Whether rationales are learned."""
        return self.streams != PREDICT


METHODS = {
    "finetune": Method(PREDICT),
    "dss": Method(BOTH),
    "ib": Method(BOTH, mi=True),
    "kd": Method(BOTH, kd=True),
    "ib+kd": Method(BOTH, mi=True, kd=True),
    "cot": Method(REASON),
    "cot+ib": Method(REASON, mi=True),
    "cot+kd": Method(REASON, kd=True),
    "cot+ib+kd": Method(REASON, mi=True, kd=True),
    "dss+cot": Method((*BOTH, *REASON)),
}
"""Name -> method. A new method is one more line."""


def is_estimator(name: str) -> bool:
    """Whether `objective.estimator` may be this: one of ours, or one that somebody added to the registry."""
    if name in ("auto", *HEAD_ESTIMATORS, *QUESTION_ESTIMATORS):
        return True
    # imports torch, so only for a name that is not known here
    from ibdistill.ops.head_loss.estimators import ESTIMATORS

    return name in ESTIMATORS


def is_divergence(name: str) -> bool:
    """Whether `objective.divergence` may be this: one of ours, or one that somebody added to the registry."""
    if name in (*DIVERGENCES, *SAMPLED):
        return True
    from ibdistill.ops.head_loss.divergences import DIVERGENCES as registry

    return name in registry


EstimatorName = Annotated[
    str, Rule(is_estimator, "auto, paper, normalized, infonce, vid, vib or a name added to ESTIMATORS")
]
DivergenceName = Annotated[
    str, Rule(is_divergence, f"{', '.join([*DIVERGENCES, *SAMPLED])} or a name added to DIVERGENCES")
]
