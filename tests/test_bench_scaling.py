"""The scaling benchmark prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from harness import ROOT


def test_ratios_are_measured_and_predicted():
    command = [sys.executable, str(ROOT / "tools" / "bench_scaling.py"), "--model", "demo-student"]
    command += "--questions 2 --question 16 --steps 2 --rounds 1".split()
    env = {name: v for name, v in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    run = subprocess.run(command, capture_output=True, text=True, env=env | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [line.split() for line in run.stdout.splitlines() if re.match(r" +[124] ", line)]
    assert [line[0] for line in lines] == ["1", "2", "4"]
    one, *several = lines
    assert one[7:] == ["-", "1.00", "1.00", "+0%"]
    for line in several:
        collectives, imbalance, ratio, predicted = float(line[3][:-1]), *(float(line[i]) for i in (4, 8, 9))
        assert 0 < collectives < 100 and imbalance >= 1 and 0 < predicted < 1.5
        assert float(line[1]) / float(one[1]) / int(line[0]) == pytest.approx(ratio, abs=0.02)
