"""Runs that checks step by themselves: built as train.py builds them, stepped, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from accept.lines import Context
from ibdistill import train
from ibdistill.config.sections import Config
from ibdistill.runtime import distributed
from ibdistill.runtime.distributed import World
from ibdistill.training.job import Job
from ibdistill.training.prepare import prepare

_WORLD: list[World] = []


def world() -> World:
    """This process's group, joined at the first call."""
    if not _WORLD:
        _WORLD.append(distributed.init())
    return _WORLD[0]


@contextmanager
def job_of(config: Config) -> Iterator[Job]:
    """A job, whose memory is given back at the end of the block."""
    job = prepare(config, world())
    try:
        yield job
    finally:
        job.board.close()
        job.engine.destroy()
        del job
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def wait(context: Context) -> None:
    """Wait until the device has finished its work."""
    if context.device.type == "cuda":
        torch.cuda.synchronize()


def losses(job: Job, steps: int) -> list[float]:
    """The loss of each of so many steps: the sum of the mean terms that the job's meter holds after the
    step."""
    values = []
    for _ in range(steps):
        with _seen(job) as totals:
            train.train_step(job)
        values.append(float(torch.stack(totals).sum()))
    return values


@contextmanager
def _seen(job: Job) -> Iterator[list[torch.Tensor]]:
    """The losses that the job's engine is asked to differentiate meanwhile, on this rank."""
    backward, totals = job.engine.backward, []

    def note(loss: torch.Tensor, **more) -> None:
        totals.append(loss.detach() / job.world.size)
        backward(loss, **more)

    job.engine.backward = note
    try:
        yield totals
    finally:
        job.engine.backward = backward


def seconds_of(context: Context, action: Callable[[], object]) -> float:
    """Seconds of an action with all that it starts on the device."""
    wait(context)
    start = time.perf_counter()
    action()
    wait(context)
    return time.perf_counter() - start


def step_seconds(context: Context, job: Job, steps: int) -> list[float]:
    """Seconds of each of so many steps. The host waits for the device after each step."""
    return [seconds_of(context, lambda: train.train_step(job)) for _ in range(steps)]
