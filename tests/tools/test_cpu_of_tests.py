"""tools/cpu_of_tests.py: processes count, waiting does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from harness import ROOT, alone

TESTS = """
import subprocess, sys, time

def test_waits():
    time.sleep(0.5)

def test_works():
    subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.5: pass"], check=True)
"""


def run(folder):
    (folder / "test_two.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "cpu_of_tests", "--rootdir", str(folder)]
    command += ["--cpu-of-tests", str(folder / "seconds"), str(folder / "test_two.py")]
    env = alone() | {"PYTHONPATH": str(ROOT / "tools"), "PYTEST_ADDOPTS": ""}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="control groups need root")
def test_children_count_and_waiting_does_not(tmp_path):
    done = run(tmp_path)
    if "cannot make a control group" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("\t") for line in (tmp_path / "seconds").read_text().splitlines()]
    (waited, long, first), (worked, _, second) = rows
    assert first.endswith("::test_waits") and second.endswith("::test_works")
    assert float(waited) < 0.4 and float(long) >= 0.5 and float(worked) >= 0.5
