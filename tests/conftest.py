"""Fixtures: a one-rank process group, and jobs on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from harness import tiny


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several workers share the tests: what takes long comes first, so that no worker ends alone with
    it, and may go to any worker if it is the function that says so. Else the tests of a file stay together,
    because they share what is made once for it, and so do those of the one Slurm cluster."""
    slurm = Path(__file__).parent / "slurm"

    def group(item: pytest.Item) -> str:
        if item.path.is_relative_to(slurm):
            return slurm.name
        is_alone = any(mark.name == "long" for mark in item.own_markers)
        return item.nodeid if is_alone else item.path.name

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=lambda item: (not item.path.is_relative_to(slurm), not item.get_closest_marker("long")))


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
