"""Which terms, with which weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ibdistill.config.methods import METHODS, QUESTION_ESTIMATORS, SAMPLED
from ibdistill.config.sections import Config, ObjectiveConfig, OptimConfig
from ibdistill.data.records import STREAMS
from ibdistill.objectives.teacher_answers import Wanted
from ibdistill.ops.head_loss.api import MISettings
from ibdistill.ops.head_loss.estimators import ESTIMATORS

GRADIENT = "gradient_"
"""Prefix of a term that is the squared norm of another term's gradient (`distillation.term_gradients`)."""


def streams_of(objective: ObjectiveConfig) -> Sequence[str]:
    """The streams that a method trains."""
    return METHODS[objective.method].streams


def tokenized_streams(objective: ObjectiveConfig) -> Sequence[str]:
    """The streams whose token ids a run has: those that it trains, and both of DSS where it trains one of
    them, because batches are sorted by the lengths of both."""
    streams = streams_of(objective)
    return streams if "reason" in streams else STREAMS


def pairs_of(streams: Sequence[str]) -> list[tuple[str, str | None]]:
    """The calls of the head loss: (segment of the label, segment of the rationale or None)."""
    pairs = []
    if "predict" in streams:
        pairs.append(("predict", "explain" if "explain" in streams else None))
    if "reason" in streams:
        pairs.append(("answer", "rationale"))
    return pairs


def shares(objective: ObjectiveConfig) -> dict[str, float]:
    """Each segment's share of the total: alpha and 1 - alpha, or all of it for the only one.

    Where a method trains the pair of DSS and the reason stream, that stream has `reason_share` of it.
    """
    pairs, found = pairs_of(streams_of(objective)), {}
    for label, rationale in pairs:
        own = {label: objective.alpha, rationale: 1.0 - objective.alpha} if rationale else {label: 1.0}
        if len(pairs) > 1:
            part = objective.reason_share if label == "answer" else 1.0 - objective.reason_share
            own = {segment: part * share for segment, share in own.items()}
        found |= own
    return found


def text_of(streams: Sequence[str]) -> tuple[str, list[str]]:
    """The segment that holds the rationale, in whose place the student's own text stands, and all segments
    that this text replaces."""
    label, rationale = pairs_of(streams)[-1]
    return rationale, [rationale] if rationale == "explain" else [rationale, label]


def _by_text(objective: ObjectiveConfig, counts: Mapping[str, float]) -> tuple[dict[str, float], float]:
    """`shares` of the data's segments, and the share of the student's own text in the distillation term.

    A question's text has the same weight whether it is the data's or the student's own. So where a part x of
    the questions has own text, it takes the part x of the shares of what it replaces.
    """
    found = shares(objective)
    if not counts.get("sampled_questions"):
        return found, 0.0
    part = counts["sampled_questions"] / counts["questions"]
    replaced = text_of(streams_of(objective))[1]
    own = part * sum(found[segment] for segment in replaced)
    return found | {segment: (1.0 - part) * found[segment] for segment in replaced}, own


def uses_mi(objective: ObjectiveConfig) -> bool:
    """Whether there is a mutual-information term, of whichever estimator."""
    return METHODS[objective.method].mi and objective.beta != 0


def mi_settings(objective: ObjectiveConfig) -> MISettings | None:
    """The mutual-information term that the head loss computes, or None."""
    if not uses_mi(objective) or objective.estimator in QUESTION_ESTIMATORS:
        return None
    return MISettings(
        estimator=objective.estimator,
        pool=objective.pool,
        gradient=objective.mi_gradient,
        temperature=objective.infonce_temperature,
        pair=objective.mi_pair,
    )


def compares_questions(objective: ObjectiveConfig) -> bool:
    """Whether the mutual-information term needs all questions of a rank's step at once."""
    mi = mi_settings(objective)
    return mi is not None and ESTIMATORS[mi.estimator].space == "state"


def check_split(objective: ObjectiveConfig, optim: OptimConfig, micro_batches: int) -> None:
    """Raise ValueError for an estimator that compares questions, where a rank has them in several parts.

    `micro_batches`: of one rank per step.
    """
    if micro_batches > 1 and compares_questions(objective):
        size, splits, whole = "batch_size", "micro_batch_size", optim.batch_size
        if optim.tokens_per_batch:
            size, splits, whole = "tokens_per_batch", "tokens_per_forward", optim.tokens_per_batch
        raise ValueError(
            f"objective.estimator is {objective.estimator}, which compares a step's questions with each "
            f"other, and optim.{splits} splits the {whole} of optim.{size} into {micro_batches} "
            "micro-batches per rank, each of which would only see its own: another loss. Leave "
            f"optim.{splits} out, with more ranks, a smaller optim.{size} or "
            "student.gradient_checkpointing where memory is short, or choose another objective.estimator"
        )


def whole_questions(config: Config) -> bool:
    """Whether ranks that share sequences bring each question's states together on one of them
    (`models.sequence_parallel`): for pooled terms, weights of a text's tokens, and answers that are kept
    whole, are about the student's own text alone, or come from other tokens than the student reads."""
    objective, teacher = config.objective, config.teacher
    weighs = objective.kd_first or objective.kd_later or objective.kd_entropy != "none"
    pooled = mi_settings(objective) is not None
    own, pmi, text = objective.divergence in SAMPLED, purifies(objective), objective.alignment == "text"
    return bool(pooled or weighs or teacher.cache or own or pmi or text)


def uses_vid(objective: ObjectiveConfig) -> bool:
    """Whether the mutual-information term is the one between teacher and student states."""
    return uses_mi(objective) and objective.estimator == "vid"


def uses_vib(objective: ObjectiveConfig) -> bool:
    """Whether the mutual-information term is the bottleneck between question and decoder."""
    return uses_mi(objective) and objective.estimator == "vib"


def distils(objective: ObjectiveConfig) -> bool:
    """Whether the teacher's token distributions are distilled."""
    return METHODS[objective.method].kd and objective.gamma != 0


def distils_data(objective: ObjectiveConfig) -> bool:
    """Whether they are on the data's text too; k1, k2 and k3 need tokens that the student has drawn."""
    return distils(objective) and objective.divergence not in SAMPLED


def purifies(objective: ObjectiveConfig) -> bool:
    """Whether the teacher reads the references too, for the target `pmi`."""
    return distils(objective) and objective.kd_target == "pmi"


def wanted(objective: ObjectiveConfig) -> Wanted | None:
    """What the objective asks of a teacher; None: nothing."""
    pairs = uses_mi(objective) and objective.mi_pair == "teacher"
    targets = distils(objective) or pairs
    own = distils(objective) and not distils_data(objective)
    result = Wanted(uses_vid(objective), targets, objective.kd_temperature, purifies(objective), own)
    return result if result.questions or result.targets else None


def teacher_streams(objective: ObjectiveConfig) -> Sequence[str]:
    """The streams whose targets a teacher reads; none if it is asked for question states only."""
    asked = wanted(objective)
    return streams_of(objective) if asked and asked.targets else ()


def step_weights(objective: ObjectiveConfig, counts: dict[str, int]) -> dict[str, float]:
    """What each term's *sum* is multiplied with, given a step's global counts (`sampler.Sampler.counts`).

    Terms are named by segment: `ce_predict`, `kd_rationale`, and so on; `mi` has no segment. The student's
    own text (`sampler.OnPolicySampler`) counts as the segment `sampled`, which has no cross entropy.
    """
    of_data, of_own = _by_text(objective, counts)
    # a step may have no rationale at all: its sums are 0, and the factor only has to be finite
    per_token = {segment: share / max(1, counts[segment]) for segment, share in of_data.items()}
    gamma = objective.gamma if distils(objective) else 0.0
    data = gamma if distils_data(objective) else 0.0
    own = {"kd_sampled": gamma * of_own / max(1, counts["sampled"])} if "sampled" in counts else {}
    return own | {
        **{f"ce_{segment}": factor for segment, factor in per_token.items()},
        "mi": objective.beta / max(1, counts["explained"]) if mi_settings(objective) else 0.0,
        **{f"kd_{segment}": data * factor for segment, factor in per_token.items()},
    }


def means(sums: dict[str, float], counts: dict[str, float]) -> dict[str, float]:
    """Terms as people read them, from sums and counts of the same steps.

    Cross entropies and divergences are in nats per token, the mutual-information terms in nats per question;
    `vid` is in nats per question token and teacher dimension, `vib` in nats per question token, summed over
    the streams that read the question.
    """
    counts = counts | dict.fromkeys(("vid", "vib"), counts.get("question_tokens", 0))
    return {
        name: value / (counts.get(name.rsplit("_", 1)[-1]) or sums.get("mi_questions") or 1)
        for name, value in sums.items()
        if name != "mi_questions"
    }


def total(
    objective: ObjectiveConfig, mean: dict[str, float], counts: Mapping[str, float] | None = None
) -> float:
    """The total loss of the mean terms, as `means` names them; with own text, from the counts of its
    steps."""
    of_data, of_own = _by_text(objective, counts or {})
    value = sum(share * mean[f"ce_{segment}"] for segment, share in of_data.items())
    if distils(objective):
        kd = 0.0
        if distils_data(objective):
            kd = sum(share * mean[f"kd_{segment}"] for segment, share in of_data.items())
        value += objective.gamma * (kd + of_own * mean.get("kd_sampled", 0.0))
    term = next((mean[name] for name in ("vid", "vib", "mi") if name in mean), 0.0)
    return value + (objective.beta or 0.0) * term
