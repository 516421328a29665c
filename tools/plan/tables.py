"""Every choice of a plan: what `--all` prints below the recommendation."""

from __future__ import annotations

from collections.abc import Sequence

from ibdistill.runtime.hardware import GIB
from plan.choice import Choice
from plan.planner import Planner
from plan.summary import speed

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "teacher")


def print_all(planner: Planner, micro: int) -> None:
    """Print the operations, memory and speed of every choice at one micro-batch size."""
    choices = planner.choices(micro)
    one, work = choices[0].seconds, planner.traces.operations(False, micro)
    steps = -(-planner.per_rank // micro)
    print(
        f"\nmicro-batches of {micro}, {steps} per step. Operations per step on each GPU: student "
        f"{steps * work.student:.3g}, head {steps * work.head:.3g}, teacher {steps * work.teacher:.3g}; at "
        f"{planner.gpu.utilization:.0%} of the peak {one['student']:.3g}, {one['head']:.3g}, "
        f"{one['teacher']:.3g} s (predicted)\n{planner.gpu.source}\n"
    )
    print("GiB on each GPU (+c: with checkpointing; the largest of what comes and goes counts)")
    print_memory(choices)
    print("\nGiB per step, of whole tensors, and predictions (+c as above)")
    print_speed(choices, planner)


def print_memory(choices: Sequence[Choice]) -> None:
    """Print the parts of every choice's memory, with one block of lines for each placement and ZeRO file."""
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


def print_speed(choices: Sequence[Choice], planner: Planner) -> None:
    """Print one line for each placement and ZeRO file, without checkpointing where that fits."""
    print(
        f"{'placement':12}{'deepspeed':16}"
        + "".join(f"{name.replace('_', '-')[:11]:>12}" for name in COLLECTIVES)
    )
    for plain, saving in zip(choices[::2], choices[1::2], strict=True):
        chosen = plain if plain.fits or not saving.fits else saving
        sizes = "".join(f"{chosen.traffic.get(name, 0) / GIB:15.2f}" for name in COLLECTIVES)
        mark = "+c" if chosen.checkpointing else ""
        print(
            f"{chosen.placement:12}{chosen.file + mark:16}{sizes}  {speed(chosen, planner)}"
            f"{'' if chosen.fits else '  (does not fit)'}"
        )
