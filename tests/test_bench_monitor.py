"""The benchmark of monitoring runs both variants and prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from harness import ROOT


def test_it_prints_both_times_and_their_ratio():
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, str(ROOT / "tools/bench_monitor.py"), "--rounds", "1", "--steps", "10"]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    off, on = map(float, re.search(r"off (\S+) ms/step, on (\S+) ms/step", run.stdout).groups())
    cost = float(re.search(r"monitoring costs (\S+)% of the step time", run.stdout)[1])
    # the times are printed to 0.01 ms
    assert off > 0 and abs(cost - 100 * (on / off - 1)) < 0.1
