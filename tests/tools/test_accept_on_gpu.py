"""The checks of tools/accept.py as tests of a machine with GPUs: `pytest -m gpu` runs these and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from accept import lines  # noqa: E402
from accept.checks import CHECKS, Check  # noqa: E402


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """One folder for all checks, which share models and records."""
    return tmp_path_factory.mktemp("accept")


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a_check_on_gpus(out, check):
    """In a process of its own, as `tools/accept.py` runs it, so that a crash costs one test."""
    if check.ranks > torch.cuda.device_count():
        pytest.skip(f"it needs {check.ranks} GPUs")
    run_check(out, check)


@pytest.mark.parametrize("name", ["b. vid and layers"])
def test_the_way_to_run_a_check_on_a_cpu(out, name):
    """What the test above does, in the small form of one check."""
    run_check(out, next(check for check in CHECKS if check.name == name), "--dry-run-on-cpu")


def run_check(out: Path, check: Check, *more: str) -> None:
    command = [sys.executable, str(TOOLS / "accept.py"), str(out), "--check", check.name, *more]
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(out / "work" / "triton"),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    mine = [line for line in lines.read_lines(out) if line["check"] == check.name]
    wrong = [line for line in mine if line["status"] in (lines.FAILED, lines.NOT_RUN)]
    assert run.returncode == 0 and mine and not wrong, f"{wrong}\n{run.stdout[-3000:]}{run.stderr[-3000:]}"
