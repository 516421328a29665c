"""The measurement of what a checkpoint costs the steps."""

from __future__ import annotations

import re

from harness import ROOT, as_arguments, launch, tiny


def test_both_ways_are_measured_and_nothing_is_left(tmp_path):
    log = tmp_path / "log"
    settings = tiny(tmp_path / "run", **{"run.report_to": []})
    command = [str(ROOT / "tools/bench/checkpoint.py"), "demo", *as_arguments(settings)]
    assert launch(command, log=log) == 0, log.read_text()[-4000:]
    rows = re.findall(r"^(.*): least (\d+\.\d\d) s, median (\d+\.\d\d) s$", log.read_text(), re.MULTILINE)
    assert [name for name, *_ in rows] == ["before the next step", "beside the steps"]
    assert all(float(least) <= float(median) for _, least, median in rows)
    assert not (tmp_path / "run/checkpoints").exists()
