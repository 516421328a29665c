"""What one run of each arm costs, for comparisons at equal compute.

    python tools/study.py speed STUDY.yaml OUT                          arms of one rank
    deepspeed --num_gpus 2 tools/study.py speed STUDY.yaml OUT          arms of two

All arms are loaded into one process per rank and take turns of a few steps each, so that whatever else the
machine does slows all of them alike. The seconds cover the steps and the answers to unlabelled questions
(`training.pseudo_labels`). They are the process's own for one rank on a CPU, and the clock's otherwise,
waiting for other ranks included. Loading, evaluation and the text that a teacher writes once are left out.
The models must be trained already.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from study.arms import Run, Study

ROUNDS, STEPS = 12, 10


def measure(study: Study, out: Path) -> str:
    """A table on rank 0, empty text on others: for each arm seconds per step and per run, their ratio to the
    baseline's, and the steps that the baseline takes in the time of one run. Collective.

    Where the baseline has another number of ranks, the first arm with this number takes its place. Raises
    ValueError if there is none.
    """
    import torch

    from ibdistill import train
    from ibdistill.runtime import distributed
    from ibdistill.training import pseudo_labels
    from ibdistill.training.prepare import prepare
    from study.arms import resolved

    torch.set_num_threads(1)
    world = distributed.init()
    alone = world.size == 1 and world.device.type == "cpu"
    clock = time.process_time if alone else time.perf_counter

    def timed(work) -> float:
        start = clock()
        work()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    chosen: dict[str, Run] = {}
    for run in study.runs:
        if run.ranks == world.size:
            chosen.setdefault(run.arm, run)
    if not chosen:
        raise ValueError(f"{study.path} has no arm of {world.size} ranks; start as many as an arm has")
    baseline = study.baseline if study.baseline in chosen else next(iter(chosen))
    folder = Path(distributed.run_on_rank_0(tempfile.mkdtemp))
    try:
        jobs = {}
        for arm, run in chosen.items():
            jobs[arm] = prepare(resolved(run, out, folder / arm), world)
        steps: dict[str, list[float]] = {arm: [] for arm in jobs}
        for _ in range(ROUNDS):
            for arm, job in jobs.items():
                seconds = timed(lambda job=job: [train.train_step(job) for _ in range(STEPS)])
                steps[arm].append(seconds / STEPS)
        whole = {}
        for arm, job in jobs.items():
            whole[arm] = job.config.optim.max_steps * median(steps[arm][1:])
            if refreshes := len(pseudo_labels.due_steps(job.config)):
                whole[arm] += refreshes * timed(lambda job=job: train.refresh(job))
            job.board.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if world.rank:
        return ""
    lines = [f"{'arm':24} {'ms/step':>9} {'s/run':>8} {'ratio':>6}  steps of {baseline} in that time"]
    base = whole[baseline]
    base_step = median(steps[baseline][1:])
    for arm, seconds in whole.items():
        lines.append(
            f"{arm:24} {1000 * median(steps[arm][1:]):9.1f} {seconds:8.1f} {seconds / base:6.2f}"
            f"  {round(seconds / base_step)}"
        )
    return "\n".join(lines)
