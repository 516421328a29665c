"""Jobs on two machines: cancelled, signalled, preempted, killed, crashed, and as good as undisturbed."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import psutil
import pytest
from harness import FORKED, as_arguments, launch
from slurm_cluster import Job, run_settings, wait_for

# one thread a rank, as the launcher's runs have: another number of threads sums in another order
RANKS_2_AND_2 = ("--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1")
RANK_1 = ("--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1")
RANKS_1_AND_1 = ("--nodes=2", *RANK_1)


def curve(run: Path) -> list[tuple[int, float]]:
    """(step, total loss) of every step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss/total")]


def check_same(run: Path, reference: Path) -> None:
    """The same loss at every step, the same final weights to the last bit, the same result."""
    found = curve(run)
    assert [step for step, _ in found] == list(range(1, len(found) + 1)) and len(found) in (20, 60)
    assert found == curve(reference)
    weights = "student/model.safetensors"
    assert (run / weights).read_bytes() == (reference / weights).read_bytes()
    results = [json.loads((folder / "result.json").read_text()) for folder in (run, reference)]
    for result in results:
        del result["seconds"], result["test_seconds"]
    assert results[0] == results[1]


def newest_checkpoint(run: Path) -> str:
    return max((path.parent.name for path in run.glob("checkpoints/step-*/complete.json")), default="")


def holds_usr1(rank: psutil.Process) -> bool:
    """Whether SIGUSR1 is blocked, as it is from a rank's first line to the end of its imports."""
    status = Path(f"/proc/{rank.pid}/status")
    blocked = re.search(r"SigBlk:\s*(\w+)", status.read_text()) if status.exists() else None
    return bool(blocked and int(blocked[1], 16) >> (signal.SIGUSR1 - 1) & 1)


def is_gone(job: Job) -> bool:
    still = job.cluster.run("squeue", "-h", "-j", job.id).stdout.strip()
    return job.shows()["JobState"] == "CANCELLED" and not still


def test_a_rank_cancelled_then_signalled_at_the_start_and_in_the_middle(cluster, tmp_path, uninterrupted):
    run = tmp_path / "run"
    job = cluster.distill(*RANK_1, settings=run_settings(run))
    job.wait_for_step(12)
    cluster.run("scancel", job.id)
    wait_for("cancelled", lambda: is_gone(job), 60, job.path)
    saved = newest_checkpoint(run)
    assert saved > "step-00000010", "SIGTERM saves"

    cancelled = job
    job = cluster.distill(*RANK_1, settings=run_settings(run))
    wait_for("the rank is importing", lambda: any(map(holds_usr1, job.ranks().values())), 60, job.path)
    cluster.run("scancel", "-s", "USR1", job.id)
    job.wait_for_text(", restart 1:")
    assert "stopped by SIGUSR1" in job.log()
    job.wait_for_step(30)
    cluster.run("scancel", "-s", "USR1", job.id)
    job.wait_for_text(", restart 2:")
    assert newest_checkpoint(run) > "step-00000030"
    job.wait_for_state("COMPLETED")
    # long after the 6 s that a requeued job waits for
    assert is_gone(cancelled) and "restart 1" not in cancelled.log()
    assert (run / "logs" / f"{job.id}.log").resolve() == job.path.resolve()
    check_same(run, uninterrupted(1, 2))


def test_two_machines_student_and_teacher_in_zero3_a_rank_killed_then_a_machine_crashed(
    cluster, tmp_path, uninterrupted
):
    """A job with two ranks per machine ends with the rank that is killed, and until then has the losses of
    two ranks. A job with one rank per machine goes on after a crash."""
    four, run = tmp_path / "four", tmp_path / "run"
    job = cluster.distill(*RANKS_2_AND_2, settings=run_settings(four, stage=3))
    job.wait_for_step(6)
    job.ranks()[3].kill()
    seconds = job.wait_for_state("FAILED")
    print(f"kill -9 of rank 3: failed after {seconds:.1f} s")
    assert seconds < 10
    assert "srun: error: node2: task 3: Killed" in job.log()
    assert not job.ranks() and job.shows()["Restarts"] == "0"

    job = cluster.distill(*RANKS_1_AND_1, settings=run_settings(run, stage=3))
    job.wait_for_step(8)  # the checkpoint of step 5 is whole by then
    # The machine with the batch script. When the other one crashes, srun cancels the step because of rank 0's
    # failure, and Slurm 22.05 delivers that to node2 a minute later: by then to the restarted job.
    cluster.machine("crash", "node1")
    seconds = job.wait_for_state("PENDING")
    print(f"crash of node1: requeued after {seconds:.1f} s")
    cluster.machine("boot", "node1")
    job.wait_for_state("COMPLETED")
    assert job.shows()["Restarts"] == "1" and job.log().count("resumed from") == 1
    check_same(run, whole := uninterrupted(2, 3))
    first, expected = dict(curve(four)[:3]), dict(curve(whole)[:3])
    assert list(first) == [1, 2, 3] and first == pytest.approx(expected, rel=1e-5)


def test_a_job_of_one_to_two_machines_preempted_goes_on_with_as_many_as_there_are(cluster, tmp_path):
    """2, 1 and 2 machines with a rank each, because an urgent job takes one of them for a time: the losses of
    an undisturbed run, up to rounding."""
    run = tmp_path / "run"
    # the pooled maxima of the term `mi` would let rounding grow
    settings = run_settings(run, **{"objective.method": "dss", "student.dropout": 0.0})
    # with --ntasks-per-node Slurm would give it one machine
    job = cluster.distill("--nodes=1-2", "--gpus-per-node=1", "--cpus-per-task=1", settings=settings)
    job.wait_for_step(6)
    assert len(job.ranks()) == 2
    urgent = cluster.submit("--partition=urgent", "--nodelist=node2", "--gpus-per-node=2", "--wrap=sleep 600")
    job.wait_for_text(", restart 1:")
    assert "stopped by SIGUSR1 (exit code 85); requeueing" in job.log()
    job.wait_for_step(20)
    assert len(job.ranks()) == 1 and urgent.shows()["JobState"] == "RUNNING"
    cluster.run("scancel", urgent.id)
    wait_for("node2 is free", lambda: is_gone(urgent), 60, job.path)
    cluster.run("scancel", "-s", "USR1", job.id)
    job.wait_for_text(", restart 2:")
    job.wait_for_state("COMPLETED")
    assert job.shows()["Restarts"] == "2"
    said = [int(n) for n in re.findall(r"0: .* anew among (\d) with", job.log())]
    assert said == [1, 2] and job.log().count("2 nodes x 1 ranks") == 2
    other = tmp_path / "whole"
    log = tmp_path / "log"
    settings |= {"run.dir": str(other), "run.test_limit": 1}
    assert launch([FORKED, "1", "demo", *as_arguments(settings)], log=log) == 0, log.read_text()[-4000:]
    for (step, found), (also, expected) in zip(curve(run), curve(other), strict=True):
        assert step == also and found == pytest.approx(expected, rel=1e-6)


def test_a_job_that_restarts_without_a_new_checkpoint_stops_itself(cluster, tmp_path):
    job = cluster.distill("--gpus-per-node=0", settings=run_settings(tmp_path / "run"), MAX_RESTARTS="1")
    for restart in (0, 1):
        job.wait_for_text(f", restart {restart}:")
        cluster.run("scontrol", "requeue", job.id)
    job.wait_for_state("FAILED", timeout=60)
    assert job.shows()["ExitCode"] == "4:0"
    assert "2 restarts in a row without progress (newest checkpoint: none), so this job stops" in job.log()


def check_fails_quickly(job: Job, message: str) -> None:
    job.wait_for_state("FAILED", timeout=60)
    shown = job.shows()
    assert shown["ExitCode"] == "2:0" and shown["RunTime"] < "00:00:15"
    assert message in job.log() and "Traceback" not in job.log() and "0: " not in job.log()


def test_mistakes_are_told_before_ranks_start(cluster, tmp_path):
    settings = run_settings(tmp_path / "run")
    cpu = "--gpus-per-node=0"
    job = cluster.distill(cpu, settings=settings, recipe="demoo")
    check_fails_quickly(job, "error: no recipe 'demoo'")
    job = cluster.distill(cpu, settings=settings | {"optim.lrr": 1})
    check_fails_quickly(job, "error: unknown setting 'optim.lrr'")
    job = cluster.distill(cpu, settings=settings, IBDISTILL_VENV=str(tmp_path))
    check_fails_quickly(job, f"error: no virtual environment in {tmp_path}")
    job = cluster.distill("--gpus-per-node=2", settings=settings)
    check_fails_quickly(
        job, "error: 2 GPUs, 2 tasks and 4 CPUs on a node; one task drives one GPU and has --cpus-per-task=4"
    )
    job = cluster.distill(cpu, f"--chdir={tmp_path}", settings=settings)
    check_fails_quickly(job, "is not the repository's root")
    assert not (tmp_path / "run").exists()
    refused = cluster.run("sbatch", "--gpus-per-node=3", "--ntasks-per-node=3", "slurm/distill.sh", "demo")
    assert refused.returncode == 1 and "Requested node configuration is not available" in refused.stderr
