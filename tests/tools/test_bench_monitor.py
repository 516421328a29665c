"""The benchmark of monitoring runs both variants and prints what it promises."""

from __future__ import annotations

import re

from harness import ROOT, output_of


def test_it_prints_both_times_and_their_ratio():
    printed = output_of(str(ROOT / "tools/bench/monitor.py"), "--rounds", "1", "--steps", "10")
    off, on = map(float, re.search(r"off (\S+) ms/step, on (\S+) ms/step", printed).groups())
    cost = float(re.search(r"monitoring costs (\S+)% of the step time", printed)[1])
    # the times are printed to 0.01 ms
    assert off > 0 and abs(cost - 100 * (on / off - 1)) < 0.1
