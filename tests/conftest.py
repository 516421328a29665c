"""Fixtures: a one-rank process group, and jobs on it."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from harness import tiny


@pytest.fixture(scope="session")
def world() -> Iterator:
    """A process group of one rank, for code that talks to its peers."""
    import torch.distributed as dist

    from ibdistill import distributed

    yield distributed.init()
    dist.destroy_process_group()


@pytest.fixture
def make_job(world, tmp_path):
    """A one-rank job in a folder; asked again, it resumes."""
    import torch

    from ibdistill import config
    from ibdistill.job import prepare

    jobs, linear = [], torch.nn.functional.linear

    def make(folder=tmp_path / "run", **overrides):
        jobs.append(prepare(config.load(None, tiny(folder, **overrides)), world))
        return jobs[-1]

    yield make
    for job in jobs:
        job.board.close()
        job.engine.destroy()
    torch.nn.functional.linear = linear  # ZeRO-3 replaces it for good, and by one that costs other operations
