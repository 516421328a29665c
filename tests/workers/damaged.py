"""`python damaged.py FOLDER`: on two forked ranks, in ZeRO-2 and ZeRO-3, rank 1's shard of the newest
checkpoint is zeroed; with all three checkpoints damaged, the run starts afresh. Before that, a
fourth one has its checksums and does not load.

Run by test_distributed.

What happened goes to FOLDER/facts.json: for each stage a list with one dict per rank.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import ranks
import torch
from harness import remark, same, steps, tiny, weights

from ibdistill.config.load import load_settings
from ibdistill.runtime import distributed
from ibdistill.training.prepare import prepare
from ibdistill.training.train_state import TrainState


def let_it_not_load(shard: Path) -> None:
    """The file has its checksum, and a part of it is missing."""
    content = torch.load(shard, weights_only=False)
    content["optimizer_state_dict"] = {}
    torch.save(content, shard)
    remark(shard)


def zeroed(shard: Path) -> None:
    shard.write_bytes(bytes(shard.stat().st_size))


def removed(shard: Path) -> None:
    shutil.rmtree(shard.parent)


def damage(job, step: int, action: Callable[[Path], None]) -> None:
    """Do something to rank 1's shard of a checkpoint. Collective."""
    distributed.gather_objects(None)  # both have read what they restore
    if job.world.rank == 0:
        (shard,) = (job.checkpoints.folder / f"step-{step:08d}").glob("*zero_pp_rank_1_*optim_states.pt")
        action(shard)
    distributed.gather_objects(None)  # it is damaged by now


def main(folder: Path) -> None:
    world = distributed.init()
    facts = []
    for stage in (2, 3):
        settings = {"deepspeed.config": f"zero{stage}", "run.report_to": [], "run.keep_last": 4}
        job = prepare(load_settings(None, tiny(folder / str(stage), **settings)), world)
        for _ in range(3):
            steps(job, 1)
            assert job.checkpoints.save(job.engine, job.state)
        expected = weights(job)
        steps(job, 1)
        assert job.checkpoints.save(job.engine, job.state)
        damage(job, 4, let_it_not_load)
        found = [job.checkpoints.restore(job.engine).step, same(weights(job), expected)]
        damage(job, 4, removed)
        for step in (3, 2, 1):
            damage(job, step, zeroed)
            found.append((job.checkpoints.restore(job.engine) or TrainState(step=0)).step)
        facts.append(distributed.gather_objects(found))
    if world.rank == 0:
        (folder / "facts.json").write_text(json.dumps(facts))
    distributed.gather_objects(None)


if __name__ == "__main__":
    ranks.run(main, Path(sys.argv[1]), ranks=(2,))
