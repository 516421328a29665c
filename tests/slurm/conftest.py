"""Fixtures: the cluster, and undisturbed runs to compare its jobs with."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import FORKED, as_arguments, launch
from slurm_cluster import Cluster, lacking, run_settings


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster, started once; the longest path of a socket in it forbids pytest's own folder."""
    if os.geteuid() != 0:
        lacking("a private Slurm cluster needs root")
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged", "ip") if not shutil.which(name)]
    if missing:
        lacking(f"a private Slurm cluster needs {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        cluster = Cluster(Path(folder))
        yield cluster
        cluster.machine("stop")


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Callable[[int, int], Path]:
    """(ranks, ZeRO stage) -> the folder of an undisturbed run on this machine alone."""
    done: dict[tuple[int, int], Path] = {}

    def run(ranks: int, stage: int) -> Path:
        if (ranks, stage) not in done:
            folder = tmp_path_factory.mktemp(f"zero{stage}_{ranks}ranks")
            arguments = [FORKED, str(ranks), "demo", *as_arguments(run_settings(folder / "run", stage))]
            log = folder / "log"
            assert launch(arguments, log=log, timeout=600) == 0, log.read_text()[-6000:]
            done[ranks, stage] = folder / "run"
        return done[ranks, stage]

    return run
