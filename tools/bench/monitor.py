"""What monitoring costs: python tools/bench/monitor.py [--preset demo-student]

The same run twice, in turns of ten steps: `on` logs at the defaults (TensorBoard, the terms' gradients every
100 steps, a console line every 10), `off` only trains. All of it is repeated in rounds, and the least time of
each block of ten steps counts (on a shared machine the mean measures the neighbours). Evaluations are left
out, since they are no part of a step.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import devices
import numpy as np

from ibdistill import train
from ibdistill.config import sections
from ibdistill.config.load import load_settings
from ibdistill.runtime import distributed
from ibdistill.training.job import Job
from ibdistill.training.prepare import prepare

BLOCK = sections.RunConfig.log_every
PERIOD = sections.RunConfig.term_gradients_every


def build(
    folder: Path, preset: str, method: str, batch_size: int, world: distributed.World, is_on: bool
) -> Job:
    """A run of the demo recipe, ready to step, with monitoring or without."""
    settings = {
        "run.dir": str(folder),
        "run.report_to": ["tensorboard", "jsonl"] if is_on else [],
        "objective.method": method,
        "optim.batch_size": batch_size,
        "student.model": preset,
    }
    if not preset.startswith("demo-"):
        settings["student.tokenizer"] = "train"
    return prepare(load_settings("demo", settings), world)


def block(job: Job, is_on: bool) -> float:
    """Seconds of ten steps, with what `on` writes after them."""

    def steps() -> None:
        for _ in range(BLOCK):
            train.train_step(job)
        if is_on:
            train.log(job)

    return devices.timed(steps, job.world.device)


def main(
    preset: str = "demo-student",
    method: str = "ib",
    batch_size: int = 16,
    rounds: int = 5,
    steps: int = PERIOD,
) -> None:
    """Measure and print. `preset`: a shape of `presets.PRESETS`; a round has `steps` steps per variant."""
    world = distributed.init()
    logging.getLogger("ibdistill").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as root:
        jobs = {
            name: build(Path(root) / name, preset, method, batch_size, world, name == "on")
            for name in ("off", "on")
        }
        blocks = steps // BLOCK
        best = {name: np.full(blocks, np.inf) for name in jobs}
        for turn in range(-1, rounds * blocks):  # the first turn warms up
            for name, job in sorted(jobs.items(), reverse=turn % 2 == 0):  # neither always goes first
                if turn == 0:
                    job.state.step = 0
                seconds = block(job, name == "on")
                if turn >= 0:
                    best[name][turn % blocks] = min(best[name][turn % blocks], seconds)
        for job in jobs.values():
            job.board.close()
    step = {name: float(seconds.sum()) / steps for name, seconds in best.items()}
    print(f"{preset}, {method}, batch {batch_size}, {rounds} rounds of {steps} steps, {world.size} ranks")
    print(f"both run on {devices.name(world.device)}")
    print(f"off {1000 * step['off']:.2f} ms/step, on {1000 * step['on']:.2f} ms/step")
    print(f"monitoring costs {step['on'] / step['off'] - 1:.2%} of the step time")


if __name__ == "__main__":
    import fire

    fire.Fire(main)
