"""The measurement of what a checkpoint costs the steps."""

from __future__ import annotations

import re

from harness import ROOT, as_arguments, launch, tiny


def test_all_ways_are_measured_and_nothing_is_left(tmp_path):
    log = tmp_path / "log"
    settings = tiny(tmp_path / "run", **{"run.report_to": [], "run.local_dir": "/dev/shm"})
    command = [str(ROOT / "tools/bench/checkpoint.py"), "demo", *as_arguments(settings)]
    assert launch(command, log=log) == 0, log.read_text()[-4000:]
    figures = r"least (\d+\.\d\d) s, median (\d+\.\d\d) s"
    line = rf"^(.*): the step waits {figures}; whole after {figures}$"
    rows = re.findall(line, log.read_text(), re.MULTILINE)
    assert [name for name, *_ in rows] == [
        "before the next step",
        "beside the steps",
        "through run.local_dir",
        "the same, no copy in memory",
    ]
    for row in rows:
        waits, waits_median, whole, whole_median = map(float, row[1:])
        assert waits <= waits_median <= whole_median >= whole >= waits
    assert "model_states.pt is written to /dev/shm before the next step" in log.read_text()
    assert not (tmp_path / "run/checkpoints").exists()
