"""What a run of each arm costs, for comparisons at equal compute.

    python tools/study.py speed STUDY.yaml OUT

All arms are loaded into one process and take turns, a few steps each, so that whatever else the
machine does slows all of them alike. Seconds are those of the process on a CPU, of the clock
on a GPU: of the steps, and of agreement's answers to the unlabelled questions. Loading,
evaluation and the text that a teacher writes once are not in it. The models must be there.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from study_plan import Run, Study

ROUNDS, STEPS = 12, 10


def measure(study: Study, out: Path) -> str:
    """A table: seconds a step and a run, as a ratio to the baseline's, and its steps in that time."""
    import torch
    from study_plan import resolved

    from ibdistill import agreement, distributed, train
    from ibdistill.job import prepare

    torch.set_num_threads(1)
    world = distributed.init()
    clock = time.process_time if world.device.type == "cpu" else time.perf_counter

    def timed(work) -> float:
        start = clock()
        work()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    chosen: dict[str, Run] = {}
    for run in study.runs:
        if run.ranks == 1:
            chosen.setdefault(run.arm, run)
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for arm, run in chosen.items():
            config = resolved(run, out)
            config.run.dir = str(Path(folder) / arm)
            jobs[arm] = prepare(config, world)
        steps: dict[str, list[float]] = {arm: [] for arm in jobs}
        for _ in range(ROUNDS):
            for arm, job in jobs.items():
                seconds = timed(lambda job=job: [train.train_step(job) for _ in range(STEPS)])
                steps[arm].append(seconds / STEPS)
        whole = {}
        for arm, job in jobs.items():
            whole[arm] = job.config.optim.max_steps * median(steps[arm][1:])
            if refreshes := len(agreement.due_steps(job.config)):
                whole[arm] += refreshes * timed(lambda job=job: train.refresh(job))
            job.board.close()
    lines = [
        f"{'arm':24} {'ms a step':>9} {'s a run':>8} {'ratio':>6}  steps of {study.baseline} in that time"
    ]
    base = whole[study.baseline]
    base_step = median(steps[study.baseline][1:])
    for arm, seconds in whole.items():
        lines.append(
            f"{arm:24} {1000 * median(steps[arm][1:]):9.1f} {seconds:8.1f} {seconds / base:6.2f}"
            f"  {round(seconds / base_step)}"
        )
    return "\n".join(lines)
