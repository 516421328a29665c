"""The teacher writes, as a job array and on two machines: killed, preempted, and nothing is asked twice."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from experts import by_heart, demo_records, taught
from harness import as_arguments, steps, tiny
from slurm_cluster import Cluster, Job, wait_for

SCRIPT = ("--gpus-per-node=0", "--cpus-per-task=1", "slurm/rationales.sh", "demo")
N, KNOWN = 60, 10


def elements(cluster: Cluster, array: Job, n: int) -> list[Job]:
    """The elements of an array that run at the same time."""
    running: list[list[str]] = []

    def all_run() -> bool:
        shown = cluster.run("squeue", "-h", "-r", "-t", "RUNNING", "-j", array.id, "-o", "%K %A").stdout
        running[:] = sorted(line.split() for line in shown.splitlines())
        return len(running) == n

    wait_for(f"{n} elements of job {array.id} run", all_run, 60)
    return [Job(cluster, f"{array.id}_{i}", cluster.folder / f"job-{number}.log") for i, number in running]


def written(folder: Path) -> Counter[str]:
    """How often each key is in a cache; without the line that a kill cut off."""
    found: Counter[str] = Counter()
    for path in folder.glob("rank-*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                found[json.loads(line)["key"]] += 1
    return found


def test_an_array_of_two_one_killed_one_preempted_then_two_machines_do_the_rest(cluster, tmp_path, make_job):
    folder = tmp_path / "texts"
    known = taught(demo_records(KNOWN))
    settings = tiny(tmp_path / "run") | {
        "data.subsample": N,
        "data.max_label_tokens": 32,
        "data.max_rationale_tokens": 64,
        "data.label_source": "teacher",
        "teacher.model": str(by_heart(tmp_path / "expert", known)),
        "teacher.precision": "fp32",
        "teacher.placement": "replica",
        "teacher.rationales": "all",
        "teacher.rationale_cache": str(folder),
        "teacher.write_batch_size": 1,
        "optim.warmup_steps": 0,
        "teacher.max_unparsed": 1.0,  # it knows a few of the answers only
    }
    array = cluster.submit("--array=0-1", *SCRIPT, *as_arguments(settings))
    killed, preempted = elements(cluster, array, 2)
    killed.wait_for_text("teacher's text: 3 of")
    killed.ranks()[0].kill()
    preempted.wait_for_text("teacher's text: 3 of")
    before = written(folder)
    cluster.run("scancel", "-s", "USR1", preempted.id)  # at once: all 30 texts take about a second
    killed.wait_for_state("FAILED", timeout=10)
    preempted.wait_for_text(", restart 1:")
    assert "stopped by SIGUSR1 (exit code 85); requeueing" in preempted.log()
    preempted.wait_for_state("COMPLETED")
    # the last element of an array has the array's own number, by which all of it would be requeued
    assert killed.shows()["JobState"] == "FAILED" and killed.shows()["Restarts"] == "0"
    halfway = written(folder)
    share = {i: sum(int(key, 16) % 2 == i for key in halfway) for i in (0, 1)}
    assert set(halfway.values()) == {1} and before.keys() < halfway.keys()
    assert 3 <= share[0] < 20 < share[1] < 40 and sum(share.values()) < N

    settings |= {"teacher.placement": "zero3", "teacher.write_batch_size": 16}
    rest = cluster.submit("--nodes=2", *SCRIPT, *as_arguments(settings))
    rest.wait_for_state("COMPLETED")
    missing = N - sum(share.values())
    assert f"teacher's text: {missing} of {missing}," in rest.log()
    assert (folder / "logs" / f"{rest.id}.log").resolve() == rest.path.resolve()
    everything = written(folder)
    assert set(everything.values()) == {1} and len(everything) == N

    del settings["run.dir"]
    job = make_job(**settings | {"teacher.placement": "cache"})
    read = {record.id: (record.rationale, record.label) for record in job.records.train}
    readable = [record for record in known if record.label != "n0 + *"]
    assert all(read[record.id] == (record.rationale, record.label) for record in readable)
    steps(job, 1)
    assert job.state.step == 1
