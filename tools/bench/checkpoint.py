"""How long a checkpoint holds up the steps: written before the next step, and beside the steps.

    deepspeed --num_gpus 2 tools/bench/checkpoint.py RECIPE --section.field value ...

The two take turns, `REPEATS` times, in `run.dir`, which must be new, and whose checkpoints are removed at the
end. The last two lines have the least and the median of the slowest rank's seconds.
"""

from __future__ import annotations

import shutil
import sys
import time
from statistics import median

from ibdistill import train
from ibdistill.config import command_line
from ibdistill.config.load import load_settings
from ibdistill.runtime import distributed
from ibdistill.training.prepare import prepare

REPEATS = 5


def main() -> None:
    world = distributed.init()
    with distributed.user_errors():
        given = command_line.parse(sys.argv[1:])
        job = prepare(load_settings(given.first, given.settings), world)
        if job.state.step:
            raise ValueError(f"run.dir {str(job.folder)!r} holds a run already; give a new folder")
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(REPEATS):
        for beside, found in seconds.items():
            train.train_step(job)
            distributed.gather_objects(None)  # all ranks begin together
            start = time.perf_counter()
            job.checkpoints.begin(job.engine, job.state, beside=beside)
            if not beside:
                job.checkpoints.wait()
            found.append(max(distributed.gather_objects(time.perf_counter() - start)))
            job.checkpoints.wait()
    if world.rank == 0:
        shutil.rmtree(job.checkpoints.folder)
        for beside, found in seconds.items():
            name = "beside the steps" if beside else "before the next step"
            print(f"{name}: least {min(found):.2f} s, median {median(found):.2f} s")


if __name__ == "__main__":
    main()
    distributed.exit_at_once(0)
