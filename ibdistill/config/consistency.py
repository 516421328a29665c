"""Settings that follow from other settings, and settings that contradict each other.

Everything here looks at a whole `sections.Config` whose single values have passed their own rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ibdistill.config import teacher_consistency
from ibdistill.config.distillation import check_alignment, check_distillation
from ibdistill.config.methods import METHODS, SAMPLED
from ibdistill.config.zero_file import zero_stage

if TYPE_CHECKING:
    from ibdistill.config.sections import Config, RunConfig


_UNSHARDED = ("none", "replica", "cache", "server")


def settle(config: Config) -> None:
    """Replace the settings whose value follows from others (auto, none, a share) by that value."""
    teacher, objective, optim = config.teacher, config.objective, config.optim
    share_or_steps = optim.warmup_steps
    optim.warmup_steps = round(share_or_steps * optim.max_steps if share_or_steps < 1 else share_or_steps)
    if objective.estimator == "auto":
        white_box = teacher.placement not in ("none", "server") and objective.mi_pair == "student"
        objective.estimator = "vid" if white_box else "paper"
    if objective.beta is None:
        objective.beta = {"vid": 1.0, "vib": 1e-3}.get(objective.estimator, 0.1)
    if teacher.cache and teacher.cache_form == "auto":
        drawn = objective.divergence in SAMPLED and teacher.placement != "server"
        whole = objective.mi_pair == "teacher" or objective.alignment == "text" or drawn
        teacher.cache_form = "states" if whole else "topk"


def settle_precision(config: Config, *, multiplies_bf16: bool) -> None:
    """Replace `student.precision` auto by what it stands for on devices that multiply in bf16, or do not.

    fp32 on a GPU stays in full precision: bf16 is the fast choice, and fp32 is the one to compare it with,
    which TF32's products, of 11 bits, would not be.
    """
    if config.student.precision == "auto":
        config.student.precision = "bf16" if multiplies_bf16 else "fp32"


def check(config: Config) -> None:
    """Raise ValueError where settings contradict; it names the settings, their values and the way out."""
    optim = config.optim
    if optim.warmup_steps > optim.max_steps:
        raise ValueError(
            f"optim.warmup_steps is {optim.warmup_steps}, more than optim.max_steps ({optim.max_steps}); "
            "give fewer steps, or a share of them below 1"
        )
    _check_run(config.run)
    _check_batches(config)
    _check_4bit(config)
    _check_streams(config)
    _check_chat(config)
    check_distillation(config)
    check_alignment(config)
    teacher_consistency.check(config)
    _check_unlabelled(config)
    _check_on_policy(config)
    _check_sequence_parallel(config)


def _check_run(run: RunConfig) -> None:
    """Raise ValueError where settings of the run contradict."""
    if run.patience and not run.eval_every:
        raise ValueError(
            f"run.patience is {run.patience}, which counts evaluations, and run.eval_every is 0, so there "
            "are none before the end; set run.eval_every"
        )
    if run.keep_every % run.save_every:
        raise ValueError(
            f"run.keep_every is {run.keep_every}, and run.save_every {run.save_every} does not divide it, so "
            "there is no checkpoint at those steps; give a multiple"
        )
    if run.push_to_hub and not run.export:
        raise ValueError(
            f"run.push_to_hub is {run.push_to_hub[:100]!r}, and run.export is false, so there is nothing to "
            "send; leave one of the two out"
        )


def _check_batches(config: Config) -> None:
    """Raise ValueError where settings of the batches contradict."""
    optim, data = config.optim, config.data
    if optim.tokens_per_forward and not optim.tokens_per_batch:
        raise ValueError(
            f"optim.tokens_per_forward is {optim.tokens_per_forward}, which splits optim.tokens_per_batch, "
            "and that is 0; set it, or optim.micro_batch_size instead"
        )
    if optim.tokens_per_batch:
        plain = type(optim)()
        others = {
            "optim.batch_size": (
                optim.batch_size,
                plain.batch_size,
                f"leave one of the two out (its default {plain.batch_size} does that too)",
            ),
            "optim.micro_batch_size": (optim.micro_batch_size, 0, "set optim.tokens_per_forward instead"),
            "data.bucket_batches": (data.bucket_batches, 1, "leave it out, or set optim.batch_size"),
            "data.unlabelled": (data.unlabelled, None, "leave it out, or set optim.batch_size"),
        }
        for name, (value, default, way_out) in others.items():
            if value != default:
                raise ValueError(
                    f"optim.tokens_per_batch is {optim.tokens_per_batch} and {name} is {str(value)[:100]!r}, "
                    f"which counts questions; {way_out}"
                )
    if data.packing == "on" and config.student.compile:
        raise ValueError(
            "data.packing is 'on' and student.compile is true: each packed row has lengths of its own, for "
            "which the model would be compiled anew; leave one of the two out"
        )


def _check_streams(config: Config) -> None:
    """Raise ValueError where settings of the data go with other streams than the method's."""
    data, name = config.data, config.objective.method
    streams = METHODS[name].streams
    if data.missing_rationales == "predict_only" and "predict" not in streams:
        raise ValueError(
            "data.missing_rationales is 'predict_only', which lets records without a rationale train the "
            f"predict stream, and objective.method {name} has none; leave it at refuse, or take dss+cot"
        )
    if "reason" not in streams:
        given = {"data.answer_marker": data.answer_marker, "data.long_reasoning": data.long_reasoning}
        for setting, default in (("data.answer_marker", ""), ("data.long_reasoning", "drop")):
            if given[setting] != default:
                raise ValueError(
                    f"{setting} is {given[setting][:100]!r}, which is for the reason stream, and "
                    f"objective.method {name} has none; leave it out, or take cot"
                )
    elif data.answer_marker and not data.answer_marker.strip():
        raise ValueError(
            f"data.answer_marker is {data.answer_marker[:100]!r}, white space alone; give words, or leave "
            "it out"
        )


def _check_chat(config: Config) -> None:
    """Raise ValueError where settings of the chat format contradict, or stand without it."""
    data, teacher = config.data, config.teacher
    if data.format == "plain":
        names = "system", "think_open", "think_close"
        if given := [f"data.{name}" for name in names if getattr(data, name)]:
            raise ValueError(
                f"{' and '.join(given)} goes with data.format chat, and data.format is 'plain'; take chat, "
                "or leave it out"
            )
        return
    if data.answer_marker:
        raise ValueError(
            f"data.answer_marker is {data.answer_marker[:100]!r}, and data.format is 'chat', where "
            "data.think_close stands between rationale and answer; give that instead"
        )
    if teacher.rationales != "none" and not teacher.template:
        raise ValueError(
            f"teacher.rationales is {teacher.rationales!r} with data.format chat: set teacher.template, "
            "which says in the teacher's own format what it is asked"
        )


def _check_4bit(config: Config) -> None:
    """Raise ValueError where the settings of a student in 4 bits contradict."""
    student, file = config.student, config.deepspeed.config
    if not student.load_in_4bit:
        return
    if not student.lora_rank:
        raise ValueError(
            "student.load_in_4bit freezes the weights, and student.lora_rank is 0, so nothing would be "
            "trained; set student.lora_rank, 16 say"
        )
    if student.init == "random":
        raise ValueError(
            "student.load_in_4bit freezes the weights, and student.init is 'random'; take pretrained"
        )
    if file != "auto" and zero_stage(config) == 3:
        raise ValueError(
            f"student.load_in_4bit goes with ZeRO up to stage 2, and deepspeed.config is {file!r}, of stage "
            "3: 4-bit weights are not sharded; take zero2"
        )


def _check_unlabelled(config: Config) -> None:
    """Raise ValueError where the settings of `data.unlabelled` contradict others."""
    data, batch_size = config.data, config.optim.batch_size
    if data.unlabelled is None:
        return
    if not data.agree_at or sorted(set(data.agree_at)) != data.agree_at:
        raise ValueError(
            f"data.agree_at is {data.agree_at}; give one or more shares of optim.max_steps in rising order"
        )
    if not 0 < data.pseudo_batch_size(batch_size) < batch_size:
        raise ValueError(
            f"data.agree_share is {data.agree_share}, which is {data.pseudo_batch_size(batch_size)} of "
            f"optim.batch_size {batch_size}; at least one record must be pseudo-labelled and one labelled"
        )
    if "explain" not in METHODS[config.objective.method].streams:
        raise ValueError(
            "data.unlabelled compares the answers of the streams predict and explain, and objective.method "
            f"{config.objective.method} does not train both; "
            "choose another method, or leave data.unlabelled out"
        )
    if (placement := config.teacher.placement) in ("cache", "server"):
        raise ValueError(
            f"data.unlabelled makes new text, for which teacher.placement {placement}, whose answers are "
            "there before training, has none; choose another teacher.placement"
        )


def _check_on_policy(config: Config) -> None:
    """Raise ValueError where text of the student's own contradicts other settings."""
    objective, share = config.objective, config.on_policy.share
    if not share:  # the baseline of a sweep over shares, whose other settings may stay
        return
    setting = f"on_policy.share is {share}"
    if not METHODS[objective.method].kd or not objective.gamma:
        raise ValueError(
            f"{setting}: the student's own text is learned by the distillation term alone, and "
            f"objective.method {objective.method} with objective.gamma {objective.gamma} has none; take "
            "kd, ib+kd, cot+kd or cot+ib+kd"
        )
    if round(config.on_policy.start * config.optim.max_steps) >= config.optim.max_steps:
        raise ValueError(
            f"{setting}, and on_policy.start is {config.on_policy.start}: none of the "
            f"{config.optim.max_steps} steps (optim.max_steps) comes after that; lower it"
        )
    limit = config.data.answer_limits()[METHODS[objective.method].streams[-1]]
    if config.on_policy.max_tokens > limit:
        raise ValueError(
            f"on_policy.max_tokens is {config.on_policy.max_tokens}, and the data's text in its place has at "
            f"most {limit} tokens (data.max_rationale_tokens, and data.max_label_tokens in a reason stream), "
            "for which positions and memory are checked; raise these, or lower it"
        )
    if config.teacher.placement == "cache":
        raise ValueError(
            f"{setting}: the student's own text is new, and teacher.placement cache, whose answers are there "
            "before training, has none for it; choose another teacher.placement"
        )
    if config.data.unlabelled is not None:
        raise ValueError(
            f"{setting}, and data.unlabelled is set, which changes the batches too; leave one out"
        )
    if config.optim.tokens_per_batch:
        raise ValueError(
            f"{setting}, and optim.tokens_per_batch is {config.optim.tokens_per_batch}: how long the "
            "student's own text will be is not known when batches are planned; set optim.batch_size instead"
        )


def _check_sequence_parallel(config: Config) -> None:
    """Raise ValueError for what ranks that share a sequence cannot compute."""
    objective, teacher, ranks = config.objective, config.teacher, config.optim.sequence_parallel
    if ranks == 1:
        return
    setting = f"optim.sequence_parallel is {ranks}"
    if config.data.packing != "on":
        raise ValueError(f"{setting}, which cuts packed rows, and data.packing is 'off'; set data.packing on")
    if teacher_consistency.needs_answers(objective) and teacher.placement not in _UNSHARDED:
        raise ValueError(
            f"{setting}, and teacher.placement is {teacher.placement!r}: the teacher has to answer for the "
            "part of a sequence that a rank holds, which a sharded one does not; take teacher.placement "
            "replica, or cache"
        )
