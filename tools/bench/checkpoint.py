"""How long a checkpoint holds up the steps, and when it is whole.

    deepspeed --num_gpus 2 tools/bench/checkpoint.py RECIPE --section.field value ...

It is written before the next step, and beside the steps after a copy in memory. With `run.local_dir` two
more ways go through that folder: one after a copy in memory, the other where there is no room for that
copy. The ways take turns, `REPEATS` times, in `run.dir`, which must be new, and whose checkpoints are removed
at the end. A line for each has the slowest rank's seconds that the next step waits, and until it counts.
"""

from __future__ import annotations

import shutil
import sys
import time
from statistics import median
from unittest import mock

from ibdistill import train
from ibdistill.config import command_line
from ibdistill.config.load import load_settings
from ibdistill.runtime import distributed
from ibdistill.training import checkpoint_write
from ibdistill.training.checkpoint_write import local_folder
from ibdistill.training.job import Job
from ibdistill.training.prepare import prepare

REPEATS = 5
WAYS = {"before the next step": (False, False, True), "beside the steps": (True, False, True)}
"""Whether it is written beside the steps, through `run.local_dir`, and with a copy in memory."""
LOCAL_WAYS = {"through run.local_dir": (True, True, True), "the same, no copy in memory": (True, True, False)}


def main() -> None:
    world = distributed.init()
    with distributed.user_errors():
        given = command_line.parse(sys.argv[1:])
        job = prepare(load_settings(given.first, given.settings), world)
        if job.state.step:
            raise ValueError(f"run.dir {str(job.folder)!r} holds a run already; give a new folder")
    ways = WAYS | (LOCAL_WAYS if job.config.run.local_dir else {})
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            train.train_step(job)
            seconds[name].append(measured(job, *way))
    if world.rank == 0:
        shutil.rmtree(job.checkpoints.folder)
        for name, found in seconds.items():
            waits, whole = zip(*found, strict=True)
            waits, whole = (f"least {min(s):.2f} s, median {median(s):.2f} s" for s in (waits, whole))
            print(f"{name}: the step waits {waits}; whole after {whole}")


def measured(job: Job, beside: bool, local: bool, copies: bool) -> tuple[float, float]:
    """The slowest rank's seconds that the next step waits for a checkpoint, and those until it counts."""
    job.checkpoints._local = local_folder(job.config.run) if local else None
    room = checkpoint_write.free_memory if copies else lambda device, ranks_on_node: 0
    distributed.gather_objects(None)  # all ranks begin together
    start = time.perf_counter()
    with mock.patch.object(checkpoint_write, "free_memory", room):
        job.checkpoints.begin(job.engine, job.state, beside=beside)
    if not beside:
        job.checkpoints.wait()
    waited = time.perf_counter() - start
    job.checkpoints.wait()
    found = distributed.gather_objects((waited, time.perf_counter() - start))
    return max(waits for waits, _ in found), max(whole for _, whole in found)


if __name__ == "__main__":
    main()
    distributed.exit_at_once(0)
