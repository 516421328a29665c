"""A sweep as a job array: one of two fails, the other finishes, the same command runs the missing one."""

from __future__ import annotations

import json

from harness import as_arguments
from slurm_cluster import Cluster, Job, run_settings, wait_for


def sweep(cluster: Cluster, *arguments: str, **env: str) -> str:
    """The id of the array job."""
    done = cluster.run("bash", "slurm/sweep.sh", *arguments, **env)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return done.stdout.split()[1].rstrip(":")


def test_a_sweep_of_two_with_one_failing_and_its_rerun(cluster, tmp_path):
    folder, problems = tmp_path / "sweep", tmp_path / "problems"
    grid = tmp_path / "grid.txt"
    grid.write_text(
        "# name  settings\n"
        "\n"
        "fine    --objective.method finetune --run.seed 1\n"
        f"own     --data.task jsonl --data.path {problems} --data.subsample 1.0\n"
    )
    settings = run_settings(folder, **{"optim.max_steps": 3, "optim.warmup_steps": 0, "run.export": False})
    del settings["run.dir"]
    command = ["--at-once=2", "--gpus-per-node=0", "--cpus-per-task=1", str(grid), "demo"]
    command += as_arguments(settings)
    first = sweep(cluster, *command, SWEEP_DIR=str(folder))
    shown = Job(cluster, first, folder / "none").shows()
    assert shown["ArrayTaskThrottle"] == "2" and cluster.run("squeue", "-h", "-r").stdout.count("\n") == 3
    again = cluster.run("bash", "slurm/sweep.sh", *command, SWEEP_DIR=str(folder))
    assert again.returncode == 2 and f"is being worked on by job {first}" in again.stderr

    table = folder / "table.txt"
    wait_for("a table", table.exists, 300)
    wait_for("the end of the table's job", lambda: not cluster.run("squeue", "-h").stdout, 60)
    results = {path.parent.name: path.stat().st_mtime for path in folder.glob("*/result.json")}
    assert results.keys() == {"fine"}
    assert "no result: own;" in table.read_text()
    assert "fine" in table.read_text()
    assert "error: " in (folder / f"logs/{first}_4.log").read_text()
    assert json.loads((folder / "fine/result.json").read_text())["method"] == "finetune"
    assert "seed: 1" in (folder / "fine/config.yaml").read_text()

    problems.mkdir()
    for split, n in (("train", 40), ("test", 4)):
        # labels that the demo's tokenizer can say: others are refused at the start
        rows = [{"question": f"{i} + 1 ?", "label": f"n{i % 3}", "rationale": f"after {i}"} for i in range(n)]
        (problems / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table.unlink()
    second = sweep(cluster, *command, SWEEP_DIR=str(folder))
    wait_for("a table", table.exists, 300)
    wait_for("the end of the table's job", lambda: not cluster.run("squeue", "-h").stdout, 60)
    assert [path.name for path in folder.glob(f"logs/{second}_*.log")] == [f"{second}_4.log"]
    now = {path.parent.name: path.stat().st_mtime for path in folder.glob("*/result.json")}
    assert now.keys() == {"fine", "own"} and results.items() <= now.items()
    assert "own" in table.read_text() and "no result" not in table.read_text()
    done = cluster.run("bash", "slurm/sweep.sh", *command, SWEEP_DIR=str(folder))
    assert f"all runs of {folder} are finished" in done.stdout


def test_a_wrong_grid_is_refused_at_submission(cluster, tmp_path):
    grid = tmp_path / "grid.txt"
    for text, message in (
        ("a --run.seed 0\na --run.seed 1\n", "more than one run with the name: a"),
        ("a --run.seed 0\nb --run.sed 1\n", f"{grid}:2: run b has wrong settings"),
        ("# nothing\n", "has no run"),
        ("--run.seed 0\n", f"{grid}:1: '--run.seed' is no name for a run"),
    ):
        grid.write_text(text)
        refused = cluster.run("bash", "slurm/sweep.sh", str(grid), "demo", SWEEP_DIR=str(tmp_path / "sweep"))
        assert refused.returncode == 2 and message in refused.stderr
    assert not cluster.run("squeue", "-h").stdout and not (tmp_path / "sweep").exists()
