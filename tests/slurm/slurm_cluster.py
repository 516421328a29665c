"""A Slurm cluster of two machines on this one (cluster.sh) and its jobs.

Skipped, with the reason, where root, namespaces or Slurm are missing; with IBDISTILL_REQUIRE_SLURM
set, as in CI, that is a failure.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from experts import one_layer
from harness import ROOT, as_arguments, tiny

CLUSTER = Path(__file__).parent / "cluster.sh"


def lacking(reason: str) -> None:
    """Skip, or fail where the tests must run."""
    if os.environ.get("IBDISTILL_REQUIRE_SLURM"):
        pytest.fail(f"IBDISTILL_REQUIRE_SLURM is set, but {reason}")
    pytest.skip(reason)


def clean_env() -> dict[str, str]:
    """The environment without what another launcher or job has left, and with this Python for the jobs."""
    foreign = re.compile(r"(SLURM_|SBATCH_|MASTER_|RANK$|WORLD_SIZE$|LOCAL_RANK$)")
    env = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    return env | {"IBDISTILL_VENV": sys.prefix}


def wait_for(
    what: str, happened: Callable[[], object], timeout: float, log: Path | None = None, every: float = 0.1
) -> float:
    """Ask `every` so many seconds until it happened; the seconds that took."""
    start = time.monotonic()
    while not happened():
        if time.monotonic() - start > timeout:
            tail = log.read_text()[-6000:] if log is not None and log.is_file() else "(no log)"
            raise AssertionError(f"not within {timeout} s: {what}\n{tail}")
        time.sleep(every)
    return time.monotonic() - start


@dataclass
class Job:
    """A job of the cluster."""

    cluster: Cluster
    id: str
    path: Path

    def log(self) -> str:
        return self.path.read_text() if self.path.is_file() else ""

    def shows(self) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, ..."""
        text = self.cluster.run("scontrol", "show", "job", self.id).stdout
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def wait_for_state(self, state: str, timeout: float = 300) -> float:
        def is_there() -> bool:
            return self.shows()["JobState"] == state

        return wait_for(f"job {self.id} is {state}", is_there, timeout, self.path, every=0.5)

    def wait_for_log(self, what: str, says: Callable[[str], object], timeout: float = 300) -> None:
        asked = time.monotonic()

        def does() -> object:
            nonlocal asked
            if (found := says(self.log())) or time.monotonic() < asked + 2:
                return found
            asked = time.monotonic()
            state = self.shows()["JobState"]  # before the log: what a job says, it says before it ends
            found = says(self.log())
            assert found or state not in ("FAILED", "TIMEOUT", "COMPLETED"), self.log()[-6000:]
            return found

        wait_for(f"{what} in the log of job {self.id}", does, timeout, self.path)

    def wait_for_text(self, text: str) -> None:
        self.wait_for_log(repr(text), lambda log: text in log)

    def wait_for_step(self, step: int) -> None:
        """Wait until the newest start has logged this step or a later one."""

        def reached(log: str) -> bool:
            steps = re.findall(r"step (\d+)/", log.split(", restart ")[-1])
            return bool(steps) and int(steps[-1]) >= step

        self.wait_for_log(f"step {step}", reached)

    def ranks(self) -> dict[int, psutil.Process]:
        """The running ranks, on whichever machine: all of them are namespaces of this one."""
        found, job = {}, self.shows()["JobId"]
        for process in psutil.process_iter():
            try:
                # not srun, whose arguments and environment say the same, and which comes before they do
                if process.name().startswith("python") and "ibdistill/" in " ".join(process.cmdline()):
                    env = process.environ()
                    if env.get("SLURM_JOB_ID") == job:
                        found[int(env["SLURM_PROCID"])] = process
            except psutil.Error:
                continue
        return found


class Cluster:
    """Two machines with 2 fake GPUs each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = clean_env()
        started = subprocess.run(
            ["bash", CLUSTER, "start", folder, "2", "2"], capture_output=True, text=True, env=self.env
        )
        if started.returncode:
            lacking(f"no Slurm cluster: {started.stderr.strip()}")
        name, value = started.stdout.strip().split("=")
        self.env[name] = value

    def machine(self, action: str, *arguments: str) -> None:
        subprocess.run(["bash", CLUSTER, action, self.folder, *arguments], check=True, timeout=60)

    def run(self, *command: str, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
        """A command on the login node, in the repository's root."""
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=self.env | env
        )

    def submit(self, *options_and_script: str, **env: str) -> Job:
        """sbatch; relative to the repository's root."""
        pattern = self.folder / "job-%j.log"
        done = self.run("sbatch", "--parsable", f"--output={pattern}", *options_and_script, **env)
        assert done.returncode == 0, done.stderr
        number = done.stdout.strip()
        return Job(self, number, self.folder / f"job-{number}.log")

    def distill(self, *options: str, settings: dict[str, object], recipe: str = "demo", **env: str) -> Job:
        return self.submit(*options, "slurm/distill.sh", recipe, *as_arguments(settings), **env)


def run_settings(folder: Path, stage: int = 2, **overrides: object) -> dict[str, object]:
    """A run of 60 short steps with a checkpoint every 10; in ZeRO-3, where steps are slow, of 20 with one
    every 5, without dropout, and with a teacher that is sharded too. Models of ZeRO-3 have one layer."""
    settings = tiny(folder) | {"objective.method": "ib", "run.test_limit": 4}
    settings |= {"optim.max_steps": 60, "run.save_every": 10, "deepspeed.config": f"zero{stage}"}
    if stage == 3:
        settings |= {"optim.max_steps": 20, "optim.warmup_steps": 10, "run.save_every": 5}
        settings |= {"objective.method": "ib+kd", "teacher.placement": "zero3", "student.dropout": 0.0}
        settings |= {"student.model": one_layer(folder.parent / "student")}
        settings |= {"teacher.model": one_layer(folder.parent / "teacher", "demo-teacher")}
    return settings | overrides
