"""Two ranks whose device group is a fake one, which does nothing: what has to be agreed on goes over gloo.

`python device_group.py FOLDER` starts them; each rank writes what it found to FOLDER/RANK.json. They are
given a GPU as far as `distributed.init` looks, and a timeout of collectives of 2 s.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401, registers the backend "fake"

from ibdistill.runtime import distributed

TIMEOUT_S, LOADING_S = 8, 10


def main(folder: Path) -> None:
    start, names = dist.init_process_group, []

    def with_fake(backend: str, **rest) -> None:
        names.append(backend)
        start(backend.replace("nccl", "fake"), **rest)

    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "device_count", lambda: 2),
        mock.patch.object(torch.cuda, "set_device", lambda device: None),
        mock.patch.object(dist, "init_process_group", with_fake),
    ):
        world = distributed.init(timeout_minutes=TIMEOUT_S / 60)
        pair = torch.tensor([1.0 + world.rank])
        found = {
            "backends": names,
            "device": str(world.device),
            "objects": distributed.gather_objects({"rank": world.rank}),
            "sum": distributed.sum_over_ranks(pair).tolist(),
            "max": distributed.max_over_ranks(5 - world.rank),
            "from rank 0": distributed.run_on_rank_0(lambda: f"rank {world.rank}"),
        }
        time.sleep(world.rank)  # rank 1 comes late
        entered = time.monotonic()
        dist.barrier()
        found["barrier"] = entered, time.monotonic()  # a clock that all processes share
        began = time.monotonic()
        found["loaded"] = distributed.run_on_rank_0(load)
        found["loading"] = time.monotonic() - began
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def load() -> str:
    """Takes longer than a collective may."""
    assert timedelta(seconds=LOADING_S) > timedelta(seconds=TIMEOUT_S)
    time.sleep(LOADING_S)
    return "a model"


if __name__ == "__main__":
    import ranks  # beside this script; a test that imports this module has tests/ on its path instead

    ranks.run(main, Path(sys.argv[1]), ranks=[2])
