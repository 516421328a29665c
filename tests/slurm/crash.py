"""Crash the node of a job's batch script within a phase of tools/kills, and see what becomes of the job.

    python tests/slurm/crash.py [PHASE ...]          # as root, with what the tests of this folder need

A job of 2 nodes with one rank each runs on the private cluster. Once the phase has begun, the node loses all
its processes, slurmd among them, and comes back when the job is pending. Nothing is submitted again. The
table has what was seen; losses and weights are compared with those of a run on this machine that nobody
disturbs, to the last bit, or in `sharing`, where a job in ZeRO-2 goes on in ZeRO-3, up to rounding.
"""

# ruff: noqa: E402
from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

for folder in ("tests", "tools"):
    sys.path.append(str(Path(__file__).parents[2] / folder))

from kills import killing
from kills.phases import PHASES, Start
from slurm_cluster import Cluster, wait_for

NODES = ("--nodes=2", "--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1")


def row(cluster: Cluster, out: Path, name: str) -> str:
    """The line of the table for a phase."""
    phase, whole, folder = PHASES[name], out / f"{name}-whole", out / name
    assert killing.Killer(out, 0, False)._start(whole, phase, 0)[1].code(killing.LIMIT) == 0, whole
    zeros = ["zero2", "zero3"] if name == "sharing" else ["zero2"]
    for i, zero in enumerate(zeros):
        job = cluster.submit(*NODES, "slurm/distill.sh", *killing.words_of(phase, folder, zero))
        start = Start(folder / "run", job.path, time.time())
        wait_for("the phase has begun", lambda start=start: phase.begun(start), killing.LIMIT, job.path)
        if i + 1 < len(zeros):
            cluster.run("scancel", job.id)
            job.wait_for_state("CANCELLED")
    cluster.machine("crash", "node1")
    within = "yes" if phase.caught(start) else "no"
    seconds = job.wait_for_state("PENDING")
    cluster.machine("boot", "node1")
    job.wait_for_state("COMPLETED", timeout=2 * killing.LIMIT)
    differs = killing.difference(whole, folder, killing.RELATIVE if len(zeros) > 1 else 0.0)
    then = differs or f"same losses and weights, {'up to rounding' if len(zeros) > 1 else 'to the last bit'}"
    return f"| `{name}` | {within} | {seconds:.1f} s | {job.shows()['Restarts']} | {then} |"


def main(names: list[str]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = ["| phase | crashed within it | job pending again after | restarts | then |", "|---" * 5 + "|"]
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as made,
        tempfile.TemporaryDirectory() as out,
    ):
        cluster = Cluster(Path(made))
        try:
            for name in names:
                rows.append(row(cluster, Path(out), name))
                print(rows[-1], flush=True)
        finally:
            cluster.machine("stop")
    print("\n" + "\n".join(rows))


if __name__ == "__main__":
    main(sys.argv[1:] or list(PHASES))
