"""The scripts where there is no cluster: lint, dry run, TensorBoard."""

from __future__ import annotations

import os
import shutil
import subprocess
import urllib.request

import psutil
import pytest
from harness import ROOT
from slurm_cluster import clean_env, lacking, wait_for

from ibdistill.runtime.distributed import free_port

SRUN = "srun --ntasks=1 --ntasks-per-node=1 --kill-on-bad-exit=1 --label bash slurm/rank.sh"


def bash(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT, env=clean_env() | env
    )


@pytest.mark.parametrize(
    ("own", "merged"),
    [
        ("--run.dir x", "demo --a.b=1 --run.export --c.d 2 3 --run.dir x"),
        ("--a.b 7 --c.d=8", "demo --run.export --a.b 7 --c.d=8"),
        ("--run.export False --a.bc 1", "demo --a.b=1 --c.d 2 3 --run.export False --a.bc 1"),
    ],
)
def test_a_runs_own_settings_win_over_the_sweeps(own, merged):
    script = 'source slurm/merge.sh; merge demo --a.b=1 --run.export --c.d 2 3 -- "$@"; echo "${merged[*]}"'
    assert bash("-euc", script, "bash", *own.split()).stdout.strip() == merged


def test_shellcheck_has_no_complaint():
    if not shutil.which("shellcheck"):
        lacking("shellcheck is not installed")
    scripts = sorted(path.relative_to(ROOT) for path in ROOT.glob("**/slurm/*.sh"))
    assert len(scripts) == 9
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("data.path", "no/such", "error: data.path is 'no/such', which does not exist or cannot be read"),
        ("deepspeed.config", "zero9", "error: deepspeed.config is 'zero9', but "),
        ("student.model", "/no/such", "error: student.model is '/no/such', a folder that does not exist"),
    ],
)
def test_a_dry_run_checks_what_the_run_would_read(setting, value, message):
    done = bash("slurm/distill.sh", "cqa", f"--{setting}", value, DRY_RUN="1")
    assert done.returncode == 2 and message in done.stderr and "would run" not in done.stdout


def test_a_dry_run_refuses_a_table_and_a_model_that_cannot_write(tmp_path):
    table, encoder = tmp_path / "data.csv", tmp_path / "encoder"
    table.write_text("question,label\n")
    encoder.mkdir()
    (encoder / "config.json").write_text('{"model_type": "t5", "architectures": ["T5EncoderModel"]}')
    for settings, message in (
        (["--data.task", "jsonl", "--data.path", str(table)], f"error: {table} begins with 'question,"),
        (
            ["--student.model", str(encoder)],
            f"error: student.model is '{encoder}', by its config.json a T5Enc",
        ),
    ):
        done = bash("slurm/distill.sh", "demo", *settings, DRY_RUN="1")
        assert done.returncode == 2 and message in done.stderr and "would run" not in done.stdout


def test_a_dry_run_checks_the_settings_and_shows_the_command(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    shown = bash("slurm/distill.sh", "cqa", "--data.path", str(folder), DRY_RUN="1")
    assert shown.returncode == 0, shown.stderr
    assert "folder runs/cqa; 1 nodes x 1 ranks" in shown.stdout
    assert f"{SRUN} ibdistill/train.py cqa --data.path " in shown.stdout and "/a\\ folder" in shown.stdout
    wrong = bash("slurm/distill.sh", "cqa", "--optim.lr", "-1", DRY_RUN="1")
    assert wrong.returncode == 2 and "error: optim.lr is -1" in wrong.stderr
    outside = bash("slurm/distill.sh", "cqa")
    assert outside.returncode == 2 and "error: not in a job; use sbatch slurm/distill.sh" in outside.stderr


def test_a_dry_run_of_the_teachers_writing_shows_the_elements_share():
    settings = ["--teacher.rationales", "all", "--teacher.placement", "replica", "--teacher.model", "t5"]
    command = ["slurm/rationales.sh", "cqa", *settings]
    shown = bash(*command, DRY_RUN="1")
    assert shown.returncode == 0, shown.stderr
    assert "rationales.sh: folder runs/cqa/rationales; 1 nodes x 1 ranks" in shown.stdout
    python = f"{SRUN} ibdistill/write_rationales.py cqa"
    assert f"{python} {' '.join(settings)} --part 0/1" in shown.stdout
    array = {
        f"SLURM_ARRAY_TASK_{key}": n for key, n in (("MIN", "0"), ("MAX", "7"), ("COUNT", "8"), ("ID", "6"))
    }
    shown = bash(*command, "--teacher.rationale_cache", "texts", DRY_RUN="1", **array)
    assert "folder texts;" in shown.stdout and "texts --part 6/8\n" in shown.stdout
    odd = bash(*command, DRY_RUN="1", **array | {"SLURM_ARRAY_TASK_MIN": "1"})
    assert (
        odd.returncode == 2 and "error: the array's elements are numbered 1 to 7, but 8 share" in odd.stderr
    )
    silent = bash("slurm/rationales.sh", "cqa", DRY_RUN="1")
    assert silent.returncode == 2 and "error: teacher.rationales is 'none'; set it" in silent.stderr


def test_tensorboard_listens_on_loopback_only(tmp_path):
    port = free_port()
    output = tmp_path / "log"
    with output.open("w") as log:
        process = psutil.Popen(
            ["bash", "slurm/tensorboard.sh", str(tmp_path), str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=clean_env() | {"PYTHONUNBUFFERED": "1"},
        )
    try:

        def listens() -> list[str]:
            assert process.poll() is None, output.read_text()
            sockets = process.net_connections("tcp")
            return [s.laddr.ip for s in sockets if s.status == "LISTEN" and s.laddr.port == port]

        wait_for("TensorBoard listens", listens, 120, output)
        assert listens() == ["127.0.0.1"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/environment", timeout=60) as answer:
            assert answer.status == 200
        assert f"ssh -N -L {port}:localhost:{port} " in output.read_text()
        assert os.path.basename(process.exe()).startswith("python")  # no shell stays in between
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("nodes", "given", "expected"),
    [
        ("1", "", ""),
        ("2", "", f"/tmp/ibdistill-triton-{os.getuid()}"),
        ("2", "/scratch/mine", "/scratch/mine"),
    ],
)
def test_several_nodes_have_a_cache_of_tritons_each(tmp_path, nodes, given, expected):
    (tmp_path / "python").write_text('#!/bin/sh\necho "cache ${TRITON_CACHE_DIR:-}"\n')
    (tmp_path / "python").chmod(0o755)
    env = {
        "SLURM_JOB_NUM_NODES": nodes,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TRITON_CACHE_DIR": given,
    }
    done = bash("slurm/rank.sh", "train.py", **env)
    assert done.stdout.strip() == f"cache {expected}".strip()
    if expected.startswith("/tmp/"):
        assert os.stat(expected).st_mode & 0o077 == 0
