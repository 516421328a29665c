"""`python damaged.py FOLDER`: on two forked ranks, in ZeRO-2 and ZeRO-3, rank 1's shard of the newest
checkpoint is zeroed; with all three checkpoints damaged, the run starts afresh.

Run by test_distributed.

What happened goes to FOLDER/facts.json: for each stage a list with one dict per rank.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ranks
from harness import steps, tiny

from ibdistill.config.load import load_settings
from ibdistill.runtime import distributed
from ibdistill.training.checkpoint import TrainState
from ibdistill.training.prepare import prepare


def main(folder: Path) -> None:
    world = distributed.init()
    facts = []
    for stage in (2, 3):
        settings = {"deepspeed.config": f"zero{stage}", "run.tensorboard": False, "run.keep_last": 3}
        job = prepare(load_settings(None, tiny(folder / str(stage), **settings)), world)
        for _ in range(3):
            steps(job, 1)
            assert job.checkpoints.save(job.engine, job.state)
        found = []
        for damaged in ("step-00000003", "step-00000002", "step-00000001"):
            distributed.gather_objects(None)  # both have read what they restore
            if world.rank == 0:
                (shard,) = (job.checkpoints.folder / damaged).glob("*zero_pp_rank_1_*optim_states.pt")
                shard.write_bytes(bytes(shard.stat().st_size))
            distributed.gather_objects(None)  # it is damaged by now
            found.append((job.checkpoints.restore(job.engine) or TrainState(step=0)).step)
        facts.append(distributed.gather_objects(found))
    if world.rank == 0:
        (folder / "facts.json").write_text(json.dumps(facts))
    distributed.gather_objects(None)


if __name__ == "__main__":
    ranks.run(main, Path(sys.argv[1]), ranks=(2,))
