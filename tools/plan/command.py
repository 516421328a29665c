"""Whether a run fits, how fast it would be and what it would cost:

    python tools/plan.py [RECIPE] [--section.field value] --nodes 4 --gpus-per-node 8 --gpu h100-80g
    python tools/plan.py --student.model Qwen/Qwen2.5-1.5B --teacher.model Qwen/Qwen2.5-7B      # no recipe
    python tools/plan.py table      # recommendations for three pairs of models on 1 to 512 GPUs
    python tools/plan.py gpus       # the figures of the GPUs and their sources

The recommendation comes first: the choice, its margin, its predicted seconds and what bounds them, the next
faster and the next roomier choice and why they were not taken, and which of the given settings it replaces.
`--all` adds a table of every choice, `--out FOLDER` writes the DeepSpeed file and the sbatch line there.

No weights are read. A published model (`ibdistill/planning/published_shapes.py`) needs no file at all, and a
folder needs only its config.json. `--rates.FIELD v` replaces a figure of the GPU. Lengths are measured on
the training records where `data.path` is given, and are the settings' limits otherwise;
`--tokens.question`, `--tokens.label` and `--tokens.rationale` replace them. Without a recipe and with a
teacher the objective is ib. Bytes are modelled on what DeepSpeed was measured to do
(`tests/planning/test_footprint.py`); seconds are predictions from data sheets, and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ibdistill.config import command_line
from ibdistill.config.load import load_settings
from ibdistill.runtime.hardware import GIB
from plan import accelerators, lengths, step_time, summary, tables
from plan.accelerators import ACCELERATORS
from plan.planner import Planner

PAIRS = (
    ("google-t5/t5-base", "google-t5/t5-11b"),
    ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-72B"),
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-405B"),
)
"""Student and teacher of each row of the table."""
LENGTHS = {"question": 128, "label": 8, "rationale": 128}
"""Tokens, in the table."""
QUESTIONS = 16
"""Questions of each rank in a step of the table."""
BATCH = 64
"""Questions of all ranks together in the table's last column, as in the recipes."""


def from_command_line(arguments: Sequence[str]) -> None:
    """Plan what `sys.argv[1:]` asks for. Raises ValueError that names a bad argument."""
    given = command_line.parse(arguments, options=["nodes", "gpus_per_node", "gpu", "out", "all"])
    if given.help or not arguments:
        print(__doc__)
        return
    options: dict[str, Any] = dict(given.options)
    if options.get("all", True) is not True:
        raise ValueError(f"--all is {options['all'][:80]!r}; it takes no value, so give it last")
    for name in ("gpu", "out"):
        if options.get(name) is True:
            raise ValueError(f"--{name} is given without a value")
    for name in ("nodes", "gpus_per_node"):
        options |= {name: number(options[name], int)} if name in options else {}
    settings: dict[str, Any] = dict(given.settings)  # text: the settings' own reader reads it
    for section, kind in (("rates", float), ("tokens", int)):
        settings |= {
            name: number(text, kind) for name, text in settings.items() if name.startswith(f"{section}.")
        }
    main(given.first, **options, **settings)


def number(text: str | bool, kind: type[int] | type[float]) -> int | float | str | bool:
    """The number that stands there, or what is given if it is none: the checks of the value name that."""
    try:
        return kind(text) if isinstance(text, str) else text
    except ValueError:
        return text


def main(
    recipe: str | None = None,
    nodes: int = 1,
    gpus_per_node: int = 1,
    gpu: str = "h100-80g",
    out: str = "",
    **overrides: Any,
) -> None:
    """Plan a run; `recipe` may also be `table` or `gpus`. Raises ValueError that names a bad argument."""
    for name, value in (("--nodes", nodes), ("--gpus-per-node", gpus_per_node)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    rates = accelerators.accelerator(gpu, taken(overrides, "rates"))
    tokens, everything = taken(overrides, "tokens"), overrides.pop("all", False)
    if recipe == "table":
        table(rates, gpu)
        return
    if recipe == "gpus":
        gpus()
        return
    assumed = assume(recipe, overrides)
    loaded = load_settings(recipe, assumed | overrides)
    tokens = lengths.settle(loaded, tokens)
    sizes = {name: getattr(tokens, name) for name in lengths.NAMES}
    planner = Planner(loaded, rates, nodes, gpus_per_node, **sizes)
    options = planner.options()
    best = planner.best(options)
    print("\n".join(summary.summary(planner, options, gpu, tokens, assumed)))
    if best is not None:
        submit = summary.submission(planner, best, recipe, assumed | overrides, out)
        print(summary.line("submit", submit))
        if out:
            summary.write(out, best, submit)
    if everything:
        tables.print_all(planner, best.micro_batch_size if best else planner.micro_batch_sizes()[-1])
    else:
        print(
            summary.line(
                "more", "--all prints every choice, --out FOLDER writes the DeepSpeed file and submit.sh"
            )
        )


def assume(recipe: str | None, overrides: dict[str, Any]) -> dict[str, Any]:
    """The settings that are assumed for a plan without a recipe that names a teacher and not its use."""
    if recipe is not None or "teacher.model" not in overrides:
        return {}
    assumed = {"teacher.placement": "replica"}
    if not any(name.startswith("objective.") for name in overrides):
        assumed["objective.method"] = "ib"
    return {name: value for name, value in assumed.items() if name not in overrides}


def taken(overrides: dict[str, Any], section: str) -> dict[str, Any]:
    """The overrides of a section that is the planner's own; they are taken out of the dictionary."""
    names = [name for name in overrides if name.startswith(f"{section}.")]
    return {name.removeprefix(f"{section}."): overrides.pop(name) for name in names}


def table(rates: accelerators.Accelerator, gpu: str) -> None:
    """Print the README's table: three pairs of models on 1 to 512 GPUs."""
    print(
        f"{gpu}, {rates.room() / GIB:.1f} GiB usable, nodes of 8; bf16, ib+kd with vid, {QUESTIONS} "
        f"questions per GPU and\nstep ({', '.join(f'{name} {n}' for name, n in LENGTHS.items())} tokens). "
        "gather: GiB of the teacher per step.\nPredicted: s/step; eff., the share of it in products; bound, "
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
            last = f"{step_time.efficiency(few.seconds):.0%}" if few else "-"
            print(f"{name:11}{ranks:5}  {row}{last:>6}", flush=True)


def table_row(planner: Planner) -> str:
    """The recommended choice of one row, with its memory and seconds, or what does not fit."""
    best = planner.best()
    if best is None:
        least = planner.smallest()
        return f"does not fit: {least.bytes / GIB:.0f} GiB with {least.placement}, {least.file}"
    choice = f"{best.placement}, {best.file}{'+c' * best.checkpointing} x {best.micro_batch_size}"
    gathered, save = best.traffic.get("teacher", 0) / GIB, best.checkpoint.writing or best.checkpoint.held
    return (
        f"{choice:32}{best.bytes / GIB:5.1f}{best.step:8.2f}{step_time.efficiency(best.seconds):6.0%}  "
        f"{step_time.bound(best.seconds):16}{gathered:7.0f}{save:7.1f}"
    )


def gpus() -> None:
    """Print every figure of every GPU, and where it is from."""
    for name, rates in ACCELERATORS.items():
        values = ", ".join(f"{k} {v:g}" for k, v in dataclasses.asdict(rates).items() if k != "source")
        print(f"{name}: {values}\n    {rates.source}")
