"""The recommendation in about ten lines: the choice, its margin, its speed, and why not another one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ibdistill.config import zero_file
from ibdistill.models.presets import PRESETS
from ibdistill.planning.dryrun import Skeleton
from ibdistill.planning.published_shapes import PUBLISHED
from ibdistill.runtime.hardware import GIB
from plan import step_time
from plan.choice import Choice
from plan.lengths import MeasuredLengths
from plan.planner import ABOUT, Planner
from plan.stored import Stored

BOUNDS = {
    "student": "the student's matrix products",
    "head": "the matrix products of the loss",
    "teacher": "the teacher's forward pass",
    "gradients wait": "waiting for gradients of other ranks",
    "parameters wait": "waiting for parameters of other ranks",
    "teacher wait": "waiting for the teacher's parameters",
    "exchange wait": "exchanging parts of shared sequences",
    "optimizer": "the optimizer's update",
    "sampling": "sampling the student's own text",
    "checkpoint": "checkpoints",
    "launch wait": "launching kernels, which the host does one by one",
}
"""Part of a step (`step_time.step_seconds`) -> what it is called here."""
NOTICEABLE = 0.05
"""Share of the usable memory that a choice has to free to be shown as a roomier one."""


def line(label: str, text: str) -> str:
    """One fact of the summary, as a line with its label."""
    return f"  {label:9} {text}"


def named(choice: Choice) -> str:
    """What a choice is, in words."""
    teacher = "" if choice.placement == "none" else f", teacher {choice.placement}"
    checkpointing = ", with gradient checkpointing" * choice.checkpointing
    return f"{choice.file}{teacher}, micro-batches of {choice.micro_batch_size}{checkpointing}"


def speed(choice: Choice, planner: Planner) -> str:
    """Predicted seconds per step, what bounds them, and the GPU-hours of the run, in words."""
    steps = planner.config.optim.max_steps
    hours = choice.step * steps * planner.ranks / 3600
    return (
        f"{choice.step:.3g} s per step (predicted), bound by {BOUNDS[step_time.bound(choice.seconds)]}; "
        f"efficiency {step_time.efficiency(choice.seconds):.0%}; {hours:.3g} GPU-hours for {steps} steps"
    )


def memory(choice: Choice) -> str:
    """Peak bytes against those that there are, on the GPU and, with offloading, on the host, in words."""
    margin = choice.room - choice.bytes
    text = (
        f"{choice.bytes / GIB:.1f} of {choice.room / GIB:.1f} GiB usable on each GPU, "
        f"{f'{margin / GIB:.1f} to spare' if margin >= 0 else f'{-margin / GIB:.1f} too much'}"
    )
    if choice.host:
        text += f"; {choice.host / GIB:.1f} of a rank's {choice.host_room / GIB:.1f} GiB of the host's memory"
    return text


def sampled(choice: Choice, planner: Planner) -> list[str]:
    """What sampling the student's own text takes: one line or none."""
    own = planner.traces.sampled
    if own is None:
        return []
    seconds, texts = choice.seconds["sampling"], planner.sampled_per_step
    return [
        f"{seconds:.3g} s per step (predicted) for {texts:.3g} texts of up to {own.tokens} tokens on each "
        f"GPU; {own.cache / GIB:.2f} GiB of keys and values for {own.texts} at once (run.eval_batch_size)"
    ]


def saved(choice: Choice) -> str:
    """A checkpoint's bytes, its predicted seconds, and what it takes of a step, in words."""
    found = choice.checkpoint
    held, writing = f"in {found.held:.3g} s", f"in {found.writing:.3g} s beside the steps"
    if found.beside:
        written = f"copied to the host {held}, written {writing}"
    elif found.writing:
        written = f"written to the nodes' disks {held}, copied to the run's folder {writing}"
    else:
        written = f"written {held}"
    share = choice.seconds["checkpoint"] / choice.step
    memory = f"; up to {found.copied / GIB:.2f} GiB of a rank's part of the host's memory meanwhile"
    return (
        f"{found.bytes / GIB:.2f} GiB every {found.every} steps, {written} (predicted): {share:.1%} of the "
        f"time{memory if found.beside else ''}"
    )


def relative(choice: Choice, best: Choice) -> str:
    """A choice's speed against that of the recommended one, in words."""
    ratio = choice.step / best.step
    if abs(ratio - 1) < 0.005:
        return "predicted to be as fast"
    return f"{ratio - 1:.0%} slower" if ratio > 1 else f"{1 - ratio:.0%} faster"


def faster(options: Sequence[Choice], best: Choice) -> str:
    """The fastest faster choice that fits, else the one that lacks least memory, and why it is not taken."""
    quicker = [c for c in options if c.step < 0.995 * best.step]
    if not quicker:
        return "nothing: no choice is predicted to be faster"
    if fitting := [c for c in quicker if c.fits]:
        choice = min(fitting, key=lambda c: c.step)
        why = f"within {ABOUT - 1:.0%}, which predictions cannot tell apart, and less simple"
        if choice.step * ABOUT < best.step:
            why = "it offloads, which is taken only where nothing else fits"
        return f"{named(choice)}: {choice.step:.3g} s, {relative(choice, best)}; not taken: {why}"
    choice = min(quicker, key=lambda c: (max(c.bytes - c.room, 0) + max(c.host - c.host_room, 0), c.step))
    return f"{named(choice)}: {choice.step:.3g} s, {relative(choice, best)}; does not fit: {memory(choice)}"


def roomier(options: Sequence[Choice], best: Choice) -> str:
    """The fastest of the choices that free a noticeable part of the memory, in words."""
    smaller = [c for c in options if c.fits and c.bytes < best.bytes - NOTICEABLE * best.room]
    if not smaller:
        return f"nothing frees more than {NOTICEABLE:.0%} of the GPU"
    choice = min(smaller, key=lambda c: (round(c.step / best.step, 2), -c.micro_batch_size, c.bytes))
    slow = relative(choice, best)
    if choice.step < 1.005 * best.step:
        slow += "; not taken: less simple"
    return f"{named(choice)}: {choice.bytes / GIB:.1f} GiB, {choice.step:.3g} s per step, {slow}"


def replaced(planner: Planner, best: Choice, assumed: Collection[str]) -> list[str]:
    """The settings that the recommendation replaces, and how the run would be as given: one line or none.

    Only settings that the user or the recipe chose count. `assumed`: those that nobody chose.
    """
    config = planner.config
    asked = {
        "deepspeed.config": (config.deepspeed.config, best.file),
        "teacher.placement": (config.teacher.placement, best.placement),
        "student.gradient_checkpointing": (config.student.gradient_checkpointing, best.checkpointing),
    }
    changed = [
        f"{name} {given} by {chosen}"
        for name, (given, chosen) in asked.items()
        if given not in (chosen, "auto", False) and name not in assumed
    ]
    if not changed:
        return []
    file = best.file if config.deepspeed.config == "auto" else config.deepspeed.config
    kept = config.student.gradient_checkpointing or best.checkpointing
    given = planner.choice(config.teacher.placement, file, kept, best.micro_batch_size)
    cost = f"{given.step:.3g} s per step, {relative(given, best)}; {'fits' if given.fits else 'does not fit'}"
    return [f"{', '.join(changed)}. As given: {cost}: {memory(given)}"]


def origin(name: str) -> str:
    """Where the shape of a model is from, by its name."""
    if name in PRESETS:
        return "a preset"
    if name in PUBLISHED:
        return "a known shape, no file read"
    if Path(name).is_dir():
        return "its folder's config.json, all that planning needs"
    return "its config.json on the hub"


def parameters(skeleton: Skeleton) -> str:
    """A model's number of parameters, in words."""
    count = sum(n for n, _ in skeleton.sizes())
    return f"{count / 1e9:.3f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def models(planner: Planner) -> str:
    """The models that are planned for, with their sizes, precisions and origins."""
    config, parts = planner.config, []
    for what, settings, skeleton in (
        ("student", config.student, planner.student),
        ("teacher", config.teacher, planner.teacher),
    ):
        if skeleton is not None:
            about = f"{parameters(skeleton)} parameters, {settings.precision}, {origin(settings.model)}"
            parts.append(f"{what} {settings.model} ({about})")
    return "; ".join(parts)


def stored(tables: Stored) -> str:
    """The bytes of the data's tables, and what of them is in memory, in words."""
    return (
        f"{(tables.ids + tables.texts) / GIB:.2f} GiB on the disk of each node, or a shared one "
        f"(data.cache_dir): {tables.ids / GIB:.2f} of token ids, {tables.texts / GIB:.2f} of texts, of "
        f"{tables.records} training records. Ranks share what they read of it in memory, which can be "
        f"dropped; each holds {tables.numbers / GIB:.2f} GiB of numbers"
    )


def submission(
    planner: Planner, best: Choice, recipe: str | None, overrides: dict[str, Any], out: str
) -> str:
    """The sbatch line of a recommendation; with `out`, its DeepSpeed file is the one in that folder."""
    file = str(Path(out) / "ds_config.json") if out else best.file
    settings = overrides | {"deepspeed.config": file, "optim.micro_batch_size": best.micro_batch_size}
    if planner.teacher is not None:
        settings["teacher.placement"] = best.placement
    if best.checkpointing:
        settings["student.gradient_checkpointing"] = True
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    options = [f"--nodes={planner.nodes}"]
    options += [f"--{what}-per-node={planner.on_node}" for what in ("gpus", "ntasks")]
    return shlex.join(["sbatch", *options, "slurm/distill.sh", *([recipe] if recipe else []), *arguments])


def summary(
    planner: Planner,
    options: Sequence[Choice],
    gpu: str,
    lengths: MeasuredLengths,
    assumed: Collection[str] = (),
) -> list[str]:
    """The lines about the recommended choice, or about the lack of one."""
    best = planner.best(options)
    where = f"{planner.nodes} x {planner.on_node} {gpu}, {planner.config.optim.batch_size} questions per step"
    tokens = f"question {planner.question}, label {planner.label}, rationale {planner.rationale} tokens"
    facts = [line("models", models(planner)), line("lengths", f"{tokens}: {lengths.source}")]
    facts += [line("tables", stored(lengths.stored))] if lengths.stored else []
    if "objective.method" in assumed:
        facts.append(line("assumed", f"objective.method {planner.config.objective.method}, as none is given"))
    if best is None:
        least = planner.smallest()
        lacks = f"{named(least)}, needs least: {memory(least)}"
        way_out = "use more or larger GPUs, student.lora_rank, shorter data.max_*_tokens, or a teacher.cache"
        return [f"Nothing fits {where}", line("closest", lacks), line("way out", way_out), *facts]
    loading = planner.loading(best.placement) / GIB
    return [
        f"Recommended for {where}: {named(best)}",
        line("fits", f"{memory(best)}; up to {loading:.1f} GiB of a node's memory while loading"),
        line("speed", speed(best, planner)),
        *(line("sampling", text) for text in sampled(best, planner)),
        line("saving", saved(best)),
        line("faster", faster(options, best)),
        line("roomier", roomier(options, best)),
        *(line("replaced", text) for text in replaced(planner, best, assumed)),
        *facts,
    ]


def write(out: str, best: Choice, submit: str) -> None:
    """Write the DeepSpeed file and the sbatch line to the folder `out`."""
    content = json.dumps(zero_file.read_ds_config(best.file), indent=2)
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "ds_config.json").write_text(content + "\n")
    (Path(out) / "submit.sh").write_text(f"#!/bin/sh\n{submit}\n")
