"""The training benchmark: its two losses are one, and it prints what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_losses_agree_and_the_ratios_are_printed():
    command = [sys.executable, str(ROOT / "tools" / "bench_train.py"), "--preset", "demo-student"]
    command += "--batch_size 2 --steps 8 --rounds 1 --memory False".split()
    # another test's process group must not become the command's
    env = {name: v for name, v in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    run = subprocess.run(command, capture_output=True, text=True, env=env | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(re.search(r"relative difference (\S+)", run.stdout)[1]) < 1e-4
    ratios = dict(re.findall(r"^(\S+) / plain: (\S+) times the tokens/s$", run.stdout, re.M))
    assert ratios.keys() == {"ours", "ours-bf16"} and all(float(ratio) > 0 for ratio in ratios.values())
    rows = dict(re.findall(r"^(\S+) +[\d.]+ +\d+ +([\d.]+)%", run.stdout, re.M))
    assert rows.keys() == {"plain", "ours", "ours-bf16"}
    # the same questions, in buckets of similar lengths
    assert float(rows["ours"]) == float(rows["ours-bf16"]) < float(rows["plain"])
