"""`python full_disk.py FOLDER`: on two forked ranks, in ZeRO-2 and ZeRO-3, rank 1's disk is full at a save.

Run by test_distributed.

What happened goes to FOLDER/facts.json: for each stage a list with one dict per rank.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import ranks
from harness import full_disk, same, steps, tiny

from ibdistill.config.load import load_settings
from ibdistill.runtime import distributed
from ibdistill.training import checkpoint
from ibdistill.training.job import Job
from ibdistill.training.prepare import prepare


def main(folder: Path) -> None:
    world = distributed.init()

    def make(name: str, stage: int) -> Job:
        settings = {"deepspeed.config": f"zero{stage}", "student.dropout": 0.0, "run.report_to": []}
        return prepare(load_settings(None, tiny(folder / f"{name}{stage}", **settings)), world)

    def whole(job: Job) -> dict:
        with job.whole() as model:
            return {name: p.detach().clone() for name, p in model.named_parameters()}

    facts = []
    for stage in (2, 3):
        undisturbed = make("undisturbed", stage)
        steps(undisturbed, 4)
        job = make("disturbed", stage)
        steps(job, 2)
        first = job.checkpoints.save(job.engine, job.state)
        steps(job, 1)
        with full_disk(20_000) if world.rank == 1 else nullcontext():
            second = job.checkpoints.save(job.engine, job.state)
        distributed.gather_objects(None)  # rank 0 has cleared up
        left = sorted(path.name for path in job.checkpoints.folder.iterdir())
        problem = checkpoint.problem_with(job.checkpoints.folder / left[0])
        steps(job, 1)
        lost = not same(whole(job), whole(undisturbed))
        third = job.checkpoints.save(job.engine, job.state)
        resumed = make("disturbed", stage)
        fact = {"saved": [first, second, third], "left": left, "problem": problem, "lost": lost}
        fact |= {"resumed_at": resumed.state.step, "resumed_same": same(whole(resumed), whole(job))}
        facts.append(distributed.gather_objects(fact))
    if world.rank == 0:
        (folder / "facts.json").write_text(json.dumps(facts))
    distributed.gather_objects(None)


if __name__ == "__main__":
    ranks.run(main, Path(sys.argv[1]), ranks=(2,))
