"""What an interval between two logging steps shows: its scalars, by TensorBoard tag, and its console line."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import deepspeed

from ibdistill.config.sections import Config
from ibdistill.models.operations import operations_per_token
from ibdistill.monitor.meter import Interval
from ibdistill.objectives.weights import means, total
from ibdistill.ops.head_loss.estimators import ESTIMATORS
from ibdistill.runtime import distributed, hardware
from ibdistill.runtime.distributed import World


def scalars(
    interval: Interval,
    config: Config,
    world: World,
    engine: deepspeed.DeepSpeedEngine,
    teacher_seconds: Mapping[str, float],
    peak_rate: float,
) -> dict[str, float]:
    """All scalars of an interval that do not depend on the run's position. Collective.

    `peak_rate`: as the function `peak_rate` gives it.
    `teacher_seconds`: what `TeacherAnswers.timers` measured on this rank, in seconds of the whole interval;
    empty without a teacher. What it calls `stall` is the time that the student waited for the teacher.
    """
    result = losses(interval, config) | gradients(interval, config.optim.clip_norm)
    result |= speed(interval, world, teacher_seconds.get("stall", 0.0))
    result |= {f"speed/{name}_s": seconds / interval.steps for name, seconds in teacher_seconds.items()}
    operations = operations_per_token(engine.module.model)
    result["speed/mfu"] = utilization(interval, operations, peak_rate, world)
    peak = distributed.max_over_ranks(hardware.peak_memory(world.device))
    result["memory/peak_gib"] = peak / hardware.GIB
    result["memory/model_states_gib"] = hardware.model_states(engine) / hardware.GIB
    result["optim/lr"] = engine.get_lr()[0]
    return result


def line(values: Mapping[str, float], step: int, last_step: int) -> str:
    """The console line of a step, from its scalars."""
    losses = "  ".join(f"{tag.removeprefix('loss/')} {v:.4f}" for tag, v in values.items() if "loss/" in tag)
    left = timedelta(seconds=round(values["speed/step_s"] * (last_step - step)))
    return (
        f"step {step}/{last_step}  {losses}  grad {values['grad/norm']:.3g}  lr {values['optim/lr']:.3g}  "
        f"{values['speed/tokens_per_s']:.0f} tokens/s  {values['speed/step_s']:.2f} s/step  eta {left}"
    )


def losses(interval: Interval, config: Config) -> dict[str, float]:
    """The objective, its terms (means by `objectives.weights.means`), and how often the teacher is right.

    For an estimator that is a cross entropy between distributions, `mi/kl` stands in place of the bound: how
    far it lies above its floor, the entropy. Both are means over questions, the same however ranks and
    micro-batches split a step, whereas the bound's H(V) is estimated from the questions of one micro-batch,
    and grows with their number up to its logarithm.
    """
    sums = dict(interval.terms)
    asked, right = (sums.pop(f"teacher_{name}", 0.0) for name in ("asked", "right"))
    terms = means(sums, interval.counts)
    result = {"loss/total": total(config.objective, terms, interval.counts)}
    estimator = ESTIMATORS.get(config.objective.estimator)
    if estimator and estimator.is_cross_entropy and terms.pop("mi_bound", None) is not None:
        result["mi/kl"] = terms["mi"] - terms["mi_entropy"]
    result |= {tag(name): value for name, value in terms.items()}
    if terms.get("mi"):
        result["mi/constant_share"] = constant_share(terms["mi"], terms.get("mi_constant", 0.0))
    if asked and config.data.label_source == "gt":
        result["teacher/accuracy"] = right / asked
    return result


def tag(term: str) -> str:
    """The TensorBoard tag of a term: `ce_predict` -> `loss/predict`, `kd_predict` -> `loss/kd_predict`,
    `mi` -> `loss/mi`, `mi_bound` -> `mi/bound`, `vid` -> `loss/vid`,
    `correct_predict` -> `accuracy/predict_tokens`."""
    kind, _, rest = term.partition("_")
    if kind == "correct":
        return f"accuracy/{rest}_tokens"
    if kind == "mi" and rest:
        return f"mi/{rest}"
    return f"loss/{rest if kind == 'ce' else term}"


def constant_share(term: float, constant: float) -> float:
    """The share (0..1) of a term that is its constant part. The rest is what the student can change; the
    term may lie on either side of the constant."""
    return 1.0 - abs(term - constant) / max(term, constant)


def gradients(interval: Interval, clip_norm: float) -> dict[str, float]:
    """The last step's gradient norm, the share of steps that were clipped, and each term's norm and share.

    `vid` and `vib` reach the student in the question's states instead of the head, and have no share.
    """
    norms = interval.norms
    result = {"grad/norm": norms[-1] if norms else 0.0}
    if clip_norm > 0 and norms:
        result["grad/clipped_share"] = sum(norm > clip_norm for norm in norms) / len(norms)
    shared = {name: norm for name, norm in interval.gradients.items() if name not in ("vid", "vib")}
    sum_of_norms = sum(shared.values())
    for name, norm in interval.gradients.items():
        result[f"grad/norm_{name.removeprefix('ce_')}"] = norm
        if sum_of_norms > 0 and name in shared and len(shared) > 1:
            result[f"grad/share_{name.removeprefix('ce_')}"] = norm / sum_of_norms
    return result


def speed(interval: Interval, world: World, stall: float = 0.0) -> dict[str, float]:
    """Throughput and padding. The time of a step that no other part claims is the student's.

    `stall`: seconds of the interval in which the student waited for the teacher.
    """
    parts = {f"speed/{name}_s": seconds / interval.steps for name, seconds in interval.parts.items()}
    step = interval.seconds / interval.steps
    return {
        "speed/tokens_per_s": interval.tokens / interval.seconds,
        "speed/tokens_per_s_per_device": interval.tokens / interval.seconds / world.size,
        "speed/step_s": step,
        **parts,
        "speed/student_s": step - sum(parts.values()) - stall / interval.steps,
        "data/padded_share": 1 - interval.tokens / interval.positions,
        "data/own_text_share": interval.counts.get("sampled", 0) / max(1, interval.targets),
    }


def utilization(interval: Interval, operations: tuple[int, int], peak: float, world: World) -> float:
    """Model FLOPs utilization (Chowdhery et al., arXiv 2204.02311): the share of the devices' peak rate.

    `operations`: those of a question's and of a target's token (`operations_per_token`). `peak`: operations
    per second of one device.
    """
    done = operations[0] * (interval.tokens - interval.targets) + operations[1] * interval.targets
    return done / interval.seconds / peak / world.size


def peak_rate(config: Config, world: World) -> float:
    """Operations per second that a device could do: `run.peak_tflops`, or else `hardware.peak_rate`."""
    return 1e12 * config.run.peak_tflops or hardware.peak_rate(
        world.device, hardware.DTYPES[config.student.precision]
    )
