"""Will it fit, how fast, what does it cost:

    python tools/plan.py RECIPE [--section.field value] --nodes 4 --gpus-per-node 8 --gpu h100-80g
    python tools/plan.py table      # the README's table
    python tools/plan.py gpus       # the figures of the GPUs and their sources

Reads configurations, no weights; published models (`ibdistill/shapes.py`) need no network. `--rates.FIELD v`
replaces a figure of the GPU, `--tokens.question`, `--tokens.label`, `--tokens.rationale` the lengths of all
questions and targets, which are the recipe's limits otherwise. `--out FOLDER` writes the recommended
DeepSpeed file and the sbatch line there. Bytes are modelled on what DeepSpeed was measured to do
(`tests/test_footprint.py`); seconds are predictions from data sheets, and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import Any

from ibdistill.config import sections, zero_file
from ibdistill.config.load import load_settings
from ibdistill.runtime.hardware import GIB
from plan import accelerators, costs
from plan.accelerators import ACCELERATORS
from plan.planner import Choice, Planner

PAIRS = (
    ("google-t5/t5-base", "google-t5/t5-11b"),
    ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-72B"),
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-405B"),
)
LENGTHS = {"question": 128, "label": 8, "rationale": 128}
QUESTIONS = 16
"""Of a rank in a step of the table."""
BATCH = 64
"""Of all ranks, in its last column: the recipes'."""


def main(
    recipe: str | None = None,
    *extra: Any,
    nodes: int = 1,
    gpus_per_node: int = 1,
    gpu: str = "h100-80g",
    out: str = "",
    **overrides: Any,
) -> None:
    """Sampler a recipe; `table` and `gpus` are named in the module's docstring."""
    if overrides.pop("help", False) or recipe is None:
        print(__doc__)
        return
    if extra:
        raise ValueError(f"unexpected arguments {extra}; settings are given as --section.field value")
    for name, value in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    rates = accelerators.accelerator(gpu, taken(overrides, "rates"))
    tokens = taken(overrides, "tokens")
    if recipe == "table":
        table(rates, gpu)
    elif recipe == "gpus":
        gpus()
    else:
        loaded = load_settings(recipe, overrides)
        planner = Planner(loaded, rates, nodes, gpus_per_node, **lengths(loaded, tokens))
        report(planner, recipe, gpu, overrides, out)


def taken(overrides: dict[str, Any], section: str) -> dict[str, Any]:
    """The overrides of a section that isn't the run's, taken out."""
    names = [name for name in overrides if name.startswith(f"{section}.")]
    return {name.removeprefix(f"{section}."): overrides.pop(name) for name in names}


def lengths(loaded: sections.Config, given: dict[str, Any]) -> dict[str, int]:
    """Tokens of a question, label and rationale."""
    limits = {name: getattr(loaded.data, f"max_{name}_tokens") for name in LENGTHS}
    for name, value in given.items():
        if name not in limits:
            raise ValueError(f"unknown length tokens.{name}; there are {', '.join(limits)}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"tokens.{name} is {value!r}; it must be a whole number of at least 1")
    return limits | given


def report(planner: Planner, recipe: str, gpu: str, overrides: dict[str, Any], out: str) -> None:
    """All about a recipe, then the recommendation."""
    loaded, best = planner.config, planner.best()
    micro = best.micro_batch_size if best else planner.micro_batch_sizes()[-1]
    models = {"student": (loaded.student, planner.student), "teacher": (loaded.teacher, planner.teacher)}
    for name, (settings, skeleton) in models.items():
        if skeleton is not None:
            count = sum(n for n, _ in skeleton.sizes())
            print(f"{name} {settings.model}: {count / 1e9:.3f} billion parameters, {settings.precision}")
    print(
        f"{planner.nodes} nodes x {planner.on_node} {gpu}, {planner.gpu.room() / GIB:.1f} GiB usable each "
        f"({planner.gpu.source})\n{loaded.optim.batch_size} questions a step, {planner.per_rank} a GPU, "
        f"micro-batches of {micro}, every question {planner.question} tokens, label {planner.label}, "
        f"rationale {planner.rationale}"
    )
    one = planner.choice(planner.placements()[0], "zero0", False, micro).seconds
    work = planner._operations(False, micro)
    steps = planner.per_rank // micro
    print(
        f"operations a step and GPU: student {steps * work.student:.3g}, head {steps * work.head:.3g}, "
        f"teacher {steps * work.teacher:.3g}; at {planner.gpu.utilization:.0%} of the peak "
        f"{one['student']:.3g}, {one['head']:.3g}, {one['teacher']:.3g} s (predicted)\n"
    )
    choices = planner.choices(micro)
    print("GiB on each GPU (+c: with checkpointing; the largest of what comes and goes counts)")
    print_memory(choices)
    print("\nGiB a step, of whole tensors, and predictions (+c as above)")
    print_speed(choices, planner)
    size, seconds = planner.checkpoint()
    every = loaded.run.save_every
    print(f"\na checkpoint: {size / GIB:.2f} GiB, predicted {seconds:.1f} s, every {every} steps")
    if best is None:
        least = planner.smallest()
        print(
            f"\nNothing fits. The least is {least.bytes / GIB:.1f} GiB a GPU, with {named(least)}: use more "
            "or larger GPUs, student.lora_rank, or a teacher.cache written elsewhere"
        )
        return
    recommend(planner, best, recipe, overrides, out)


def print_memory(choices: list[Choice]) -> None:
    """One line for each placement and ZeRO file."""
    names = list(dict.fromkeys(name for c in choices for name in c.states))
    print(
        f"{'placement':12}{'deepspeed':14}"
        + "".join(f"{name.replace('teacher ', 't.'):>11}" for name in names)
    )
    for plain, saving in zip(choices[::2], choices[1::2], strict=True):
        print(
            f"{plain.placement:12}{plain.file:14}"
            + "".join(f"{plain.states.get(name, 0) / GIB:11.2f}" for name in names)
        )
        for choice, mark in ((plain, ""), (saving, "+c")):
            coming = ", ".join(f"{name} {size / GIB:.2f}" for name, size in choice.activations.items())
            margin = (choice.room - choice.bytes) / GIB
            verdict = "fits" if choice.fits else "DOES NOT FIT"
            there = f"{choice.host / GIB:.2f} of {choice.host_room / GIB:.2f}"
            host = f"; host's memory {there}" if choice.host else ""
            total = f"{choice.bytes / GIB:.2f}: {verdict}, margin {margin:.2f}{host}"
            print(f"    {mark:2} + max({coming}) = {total}")


def print_speed(choices: list[Choice], planner: Planner) -> None:
    """One line for each placement and ZeRO file, at the least that fits."""
    print(
        f"{'placement':12}{'deepspeed':16}{'all-gather':>11}{'red-scatter':>12}{'all-reduce':>11}{'teacher':>9}"
    )
    for plain, saving in zip(choices[::2], choices[1::2], strict=True):
        chosen = plain if plain.fits or not saving.fits else saving
        sizes = [
            chosen.traffic.get(n, 0) / GIB for n in ("all_gather", "reduce_scatter", "all_reduce", "teacher")
        ]
        mark = "+c" if chosen.checkpointing else ""
        print(
            f"{chosen.placement:12}{chosen.file + mark:16}{sizes}   {speed(chosen, planner)}"
            f"{'' if chosen.fits else '  (does not fit)'}"
        )


def speed(choice: Choice, planner: Planner) -> str:
    """Predictions in a line."""
    hours = choice.step * planner.config.optim.max_steps * planner.ranks / 3600
    return (
        f"{choice.step:.3g} s/step, bound by {costs.bound(choice.seconds)}, efficiency "
        f"{costs.efficiency(choice.seconds):.0%}, {hours:.3g} GPU-hours"
    )


def named(choice: Choice) -> str:
    """A choice in words."""
    return (
        f"{choice.file}, teacher {choice.placement}, micro-batches of {choice.micro_batch_size}"
        f"{', checkpointing' * choice.checkpointing}"
    )


def recommend(planner: Planner, best: Choice, recipe: str, overrides: dict[str, Any], out: str) -> None:
    """Print, and with `out` write, the DeepSpeed file and the sbatch line."""
    content = json.dumps(zero_file.read_ds_config(best.file), indent=2)
    file = str(Path(out) / "ds_config.json") if out else best.file
    settings = overrides | {"deepspeed.config": file, "optim.micro_batch_size": best.micro_batch_size}
    if planner.teacher is not None:
        settings["teacher.placement"] = best.placement
    if best.checkpointing:
        settings["student.gradient_checkpointing"] = True
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    options = [f"--nodes={planner.nodes}"]
    options += [f"--{what}-per-node={planner.on_node}" for what in ("gpus", "ntasks")]
    line = shlex.join(["sbatch", *options, "slurm/distill.sh", recipe, *arguments])
    print(
        f"\nRecommended: {named(best)}: {best.bytes / GIB:.1f} of {best.room / GIB:.1f} GiB, predicted "
        f"{speed(best, planner)}; up to {planner.loading(best.placement) / GIB:.1f} GiB of a node's memory "
        f"while loading\n{line}\n{content}"
    )
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        Path(file).write_text(content + "\n")
        (Path(out) / "submit.sh").write_text(f"#!/bin/bash\n{line}\n")


def table(rates: accelerators.Accelerator, gpu: str) -> None:
    """Three pairs of models on 1 to 512 GPUs: the README's table."""
    print(
        f"{gpu}, {rates.room() / GIB:.1f} GiB usable, nodes of 8; bf16, ib+kd with vid, {QUESTIONS} "
        f"questions a GPU and\nstep ({', '.join(f'{name} {n}' for name, n in LENGTHS.items())} tokens). "
        "gather: GiB of the teacher a step.\nPredicted: s/step; eff., the share of it in products; bound, "
        "what takes longest; save, seconds\nof a checkpoint; last, eff. where all GPUs share "
        f"{BATCH} questions\n\n"
        "pair        GPUs  choice                            GiB  s/step  eff.  bound            "
        "gather   save  last"
    )
    for student, teacher in PAIRS:
        settings = {"student.model": student, "teacher.model": teacher, "teacher.placement": "replica"}
        settings |= {"student.precision": "bf16", "objective.method": "ib+kd", "optim.batch_size": QUESTIONS}
        planner = Planner(load_settings(None, settings), rates, 1, 1, **LENGTHS)
        for ranks in (1, 8, 64, 512):
            name = f"{student.split('-')[-1]}, {teacher.split('-')[-1]}"
            nodes, on_node = math.ceil(ranks / 8), min(ranks, 8)
            row = table_row(planner.on(nodes, on_node, QUESTIONS * ranks))
            few = planner.on(nodes, on_node, BATCH).best() if BATCH % ranks == 0 else None
            last = f"{costs.efficiency(few.seconds):.0%}" if few else "-"
            print(f"{name:11}{ranks:5}  {row}{last:>6}", flush=True)


def table_row(planner: Planner) -> str:
    best = planner.best()
    if best is None:
        least = planner.smallest()
        return f"does not fit: {least.bytes / GIB:.0f} GiB with {least.placement}, {least.file}"
    choice = f"{best.placement}, {best.file}{'+c' * best.checkpointing} x {best.micro_batch_size}"
    gathered, (_, save) = best.traffic.get("teacher", 0) / GIB, planner.checkpoint()
    return (
        f"{choice:32}{best.bytes / GIB:5.1f}{best.step:8.2f}{costs.efficiency(best.seconds):6.0%}  "
        f"{costs.bound(best.seconds):16}{gathered:7.0f}{save:7.1f}"
    )


def gpus() -> None:
    """All figures."""
    for name, rates in ACCELERATORS.items():
        values = ", ".join(f"{k} {v:g}" for k, v in dataclasses.asdict(rates).items() if k != "source")
        print(f"{name}: {values}\n    {rates.source}")
