"""Settings of the distillation term that contradict other settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ibdistill.config.methods import METHODS, SAMPLED, WITHOUT_BETA
from ibdistill.config.teacher_consistency import needs_answers

if TYPE_CHECKING:
    from ibdistill.config.sections import Config, ObjectiveConfig


def check_distillation(config: Config) -> None:
    """Raise ValueError where settings of the distillation term contradict each other or the rest."""
    _check_weights(config.objective)
    _check_pmi(config)
    _check_sampled(config)
    _check_sampled_cache(config)


def _check_weights(objective: ObjectiveConfig) -> None:
    """Raise ValueError where weights of tokens stand without what they weigh."""
    weights = {
        "objective.kd_first": (objective.kd_first, 0),
        "objective.kd_later": (objective.kd_later, 0),
        "objective.kd_entropy": (objective.kd_entropy, "none"),
    }
    given = [f"{name} is {value}" for name, (value, default) in weights.items() if value != default]
    if given and not (METHODS[objective.method].kd and objective.gamma):
        raise ValueError(
            f"{' and '.join(given)}, which weighs the tokens of the distillation term, and objective.method "
            f"{objective.method} with objective.gamma {objective.gamma} has none; take kd, ib+kd, cot+kd or "
            "cot+ib+kd, or leave it out"
        )
    if objective.divergence_beta is not None and objective.divergence in WITHOUT_BETA:
        raise ValueError(
            f"objective.divergence_beta is {objective.divergence_beta}, and objective.divergence "
            f"{objective.divergence} has no parameter; leave it out"
        )
    if objective.kd_entropy_share < 1 and objective.kd_entropy == "none":
        raise ValueError(
            f"objective.kd_entropy_share is {objective.kd_entropy_share}, and objective.kd_entropy is none: "
            "whose entropy chooses the tokens? Take student or teacher"
        )


def _check_pmi(config: Config) -> None:
    """Raise ValueError where the target `pmi` contradicts other settings."""
    objective = config.objective
    contradicting = {
        f"objective.method {objective.method} with objective.gamma {objective.gamma} has no distillation term"
        "; take kd, ib+kd, cot+kd or cot+ib+kd": not (METHODS[objective.method].kd and objective.gamma),
        "teacher.placement server gives the most probable tokens alone, and their states are needed; choose "
        "another": config.teacher.placement == "server",
        "objective.mi_pair teacher pools the teacher's own distributions; take student": objective.mi_pair
        == "teacher",
    }
    for reason, holds in contradicting.items():
        if objective.kd_target == "pmi" and holds:
            raise ValueError(f"objective.kd_target is 'pmi', and {reason}")


def _check_sampled(config: Config) -> None:
    """Raise ValueError where a divergence from the student's own tokens contradicts other settings."""
    objective, own, teacher = config.objective, config.on_policy, config.teacher
    if objective.divergence not in SAMPLED:
        return
    given = f"objective.divergence is {objective.divergence!r}"
    if not METHODS[objective.method].kd:
        raise ValueError(
            f"{given}, and objective.method {objective.method} compares no distributions with a teacher's; "
            "take kd, ib+kd, cot+kd or cot+ib+kd, or leave objective.divergence out"
        )
    if not own.share:
        raise ValueError(
            f"{given}, an estimate from tokens that the student draws, and on_policy.share is 0, so there "
            "are none; set on_policy.share, or take reverse, which is what k1 estimates"
        )
    # only then are the tokens drawn from the distribution whose divergence is estimated
    whole = {
        "on_policy.temperature": own.temperature,
        "on_policy.top_p": own.top_p,
        "objective.kd_temperature": objective.kd_temperature,
    }
    if bent := [f"{name} is {value}" for name, value in whole.items() if value != 1]:
        raise ValueError(
            f"{given}, an estimate from tokens drawn from the student's distribution as it is, and "
            f"{' and '.join(bent)}; leave it at 1, or take reverse"
        )
    if teacher.cache and teacher.cache_form != "states" and teacher.placement != "server":
        raise ValueError(
            f"{given}, for which a drawn token's probability must be known, and teacher.cache_form "
            f"{teacher.cache_form} does not keep each token's; take states, or leave teacher.cache out"
        )
    if objective.mi_pair == "teacher":
        raise ValueError(
            f"{given} and objective.mi_pair is 'teacher': the data's text, whose distributions that pairs, "
            "is then not compared with the teacher; take mi_pair student, or reverse"
        )


def _check_sampled_cache(config: Config) -> None:
    """Raise ValueError where tokens drawn from the teacher's distributions do not say enough."""
    teacher, objective = config.teacher, config.objective
    if teacher.cache_form != "sampled":
        if teacher.cache_samples != type(teacher)().cache_samples:
            raise ValueError(
                f"teacher.cache_samples is {teacher.cache_samples}, which counts the draws of "
                f"teacher.cache_form sampled, and that is {teacher.cache_form!r}; take sampled, or leave "
                "teacher.cache_samples out"
            )
        return
    if not teacher.cache:
        raise ValueError(
            "teacher.cache_form is 'sampled', and there is no teacher.cache that would keep what is sampled; "
            "give teacher.cache a folder, or leave teacher.cache_form out"
        )
    given = {
        "objective.divergence": (objective.divergence, "forward", METHODS[objective.method].kd),
        "objective.mi_pair": (objective.mi_pair, "student", True),
        "objective.kd_entropy": ("teacher", "student", objective.kd_entropy == "teacher"),
    }
    for name, (value, way_out, is_used) in given.items():
        if is_used and value != way_out:
            raise ValueError(
                f"teacher.cache_form is 'sampled' and {name} is {value!r}: from a few tokens drawn from the "
                "teacher's distribution only the gradient of the forward KL can be estimated without a bias; "
                f"take {name} {way_out}, or teacher.cache_form topk or states"
            )


def check_alignment(config: Config) -> None:
    """Raise ValueError where a teacher of another vocabulary cannot do what other settings ask of it."""
    teacher, objective = config.teacher, config.objective
    contradicting = {
        "teacher.placement is 'none', so no teacher answers; choose one": teacher.placement == "none",
        "nothing is compared with a teacher; leave it out": not needs_answers(objective),
        "teacher.placement is 'server', which scores the student's tokens; choose another": teacher.placement
        == "server",
        f"teacher.cache_form is {teacher.cache_form!r}, of the student's tokens; take states": bool(
            teacher.cache
        )
        and teacher.cache_form in ("topk", "sampled"),
        "objective.mi_pair is 'teacher', which pools its distribution over the student's vocabulary; take "
        "student": objective.mi_pair == "teacher",
        f"objective.divergence is {objective.divergence!r}, of a token that the teacher may not have; take "
        "reverse": objective.divergence in SAMPLED,
        "objective.kd_first, kd_later or kd_entropy weighs single tokens of the student's, and spans have no "
        "weights; leave it out": (objective.kd_first, objective.kd_later, objective.kd_entropy)
        != (0, 0, "none"),
    }
    for reason, holds in contradicting.items():
        if objective.alignment == "text" and holds:
            raise ValueError(f"objective.alignment is 'text', and {reason}")
