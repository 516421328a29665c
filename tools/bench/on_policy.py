"""Seconds per step by part, without text of the student's own, with text for an epoch, and for every step:

    python tools/bench/on_policy.py [--student t5-mini] [--teacher t5-v1_1-small] [--method kd]

`off` learns from the data's text. `offline` samples before each epoch (`on_policy.every` 1), `online` before
each step. Both take all text from the student (`on_policy.share` 1). Each is a run by
`training.prepare.prepare` on the demo corpus, with the calls of `ibdistill.train.train`, of one epoch of
`steps` steps. The variants take turns at every epoch, and of each the epoch with the least time counts; one
before them warms up.

Parts: `sampling` (decoding, its file, and the new features), `teacher` (its answers), `forward` (with the
loss), `backward` (with the reduction of gradients, where a stage does it there), `optimizer`, `data` (the
wait for micro-batches), and the rest of the step. On a GPU each part ends with a synchronisation, so what
would overlap is added up. A student with random weights hardly ever ends a text, so its texts have
`max_tokens`.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from functools import partial
from typing import Any

import devices

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.models import presets
from ibdistill.runtime import distributed
from ibdistill.runtime.distributed import World
from ibdistill.training import on_policy
from ibdistill.training.job import Job
from ibdistill.training.prepare import prepare

VARIANTS = {"off": {"on_policy.share": 0.0}, "offline": {}, "online": {"on_policy.every": 1e-9}}
PARTS = ("sampling", "teacher", "forward", "backward", "optimizer", "data")


def instrument(job: Job, seconds: Counter[str]) -> None:
    """Let the parts of a job's steps add their seconds."""

    def timed(owner: Any, name: str, part: str) -> None:
        whole = getattr(owner, name)

        def measured(*args, **kwargs):
            result = []
            seconds[part] += devices.timed(lambda: result.append(whole(*args, **kwargs)), job.world.device)
            return result[0]

        setattr(owner, name, measured)

    timed(job.teacher_answers, "of", "teacher")
    timed(job.engine, "forward", "forward")
    timed(job.engine, "backward", "backward")
    timed(job.engine, "step", "optimizer")
    timed(job, "micro_batches", "data")


def epoch(job: Job, seconds: Counter[str]) -> None:
    """The steps of an epoch, from its first on, with their samplings."""
    job.state.step = 0
    for _ in range(job.sampler.steps_per_epoch):
        if on_policy.is_due(job):
            seconds["sampling"] += devices.timed(partial(train.sample_own_text, job), job.world.device)
        train.train_step(job)


def measure(jobs: dict[str, Job], rounds: int) -> dict[str, dict[str, float]]:
    """Variant -> part -> seconds per step, of the epoch with the least time in all; with `all`."""
    found: dict[str, dict[str, float]] = {}
    seconds = {name: Counter() for name in jobs}
    for name, job in jobs.items():
        instrument(job, seconds[name])
    for turn in range(-1, rounds):
        for name, job in sorted(jobs.items(), reverse=turn % 2 == 0):
            seconds[name].clear()
            seconds[name]["all"] = devices.timed(partial(epoch, job, seconds[name]), job.world.device)
            if turn >= 0 and (name not in found or seconds[name]["all"] < found[name]["all"]):
                found[name] = dict(seconds[name])
    return {
        name: {part: own[part] / jobs[name].sampler.steps_per_epoch for part in own}
        for name, own in found.items()
    }


def main(
    student: str = "t5-mini",
    teacher: str = "t5-v1_1-small",
    method: str = "kd",
    batch_size: int = 8,
    max_tokens: int = 64,
    precision: str = "fp32",
    zero: str = "auto",
    steps: int = 8,
    rounds: int = 3,
    local_rank: int = -1,
) -> None:
    """Measure and print. `student`, `teacher`: presets or folders. `method`: one with kd. `max_tokens`: of a
    text. An epoch has `steps` steps."""
    world = distributed.init()
    logging.getLogger("ibdistill").setLevel(logging.ERROR)
    settings = {
        "run.report_to": [],
        "student.model": student,
        "student.precision": precision,
        "teacher.model": teacher,
        "teacher.precision": precision,
        "teacher.placement": "replica",
        "objective.method": method,
        "data.subsample": batch_size * steps,
        "optim.batch_size": batch_size,
        "optim.max_steps": steps,
        "deepspeed.config": zero,
        "on_policy.share": 1.0,
        "on_policy.max_tokens": max_tokens,
    }
    if student in presets.PRESETS and not student.startswith("demo-"):
        settings["student.tokenizer"] = "train"
    with tempfile.TemporaryDirectory() as root:
        root = distributed.gather_objects(root)[0]
        jobs = {name: build(f"{root}/{name}", settings | own, world) for name, own in VARIANTS.items()}
        found = measure(jobs, rounds)
    if world.rank:
        return
    print(f"{student} from {teacher}, {method}, {precision}, {zero}, batch {batch_size}, {world.size} ranks")
    print(f"{steps} steps an epoch, texts of at most {max_tokens} tokens, on {devices.name(world.device)}")
    print("seconds   per step" + "".join(f"{part:>11}" for part in (*PARTS, "rest")))
    for name in VARIANTS:
        own = found[name]
        parts = [own.get(part, 0.0) for part in PARTS]
        print(
            f"{name:10}{own['all']:8.3f}" + "".join(f"{v:11.3f}" for v in (*parts, own["all"] - sum(parts)))
        )


def build(folder: str, settings: dict[str, object], world: World) -> Job:
    """A run, ready to step. Collective."""
    return prepare(load_settings("demo", settings | {"run.dir": folder}), world)


if __name__ == "__main__":
    import fire

    fire.Fire(main)
