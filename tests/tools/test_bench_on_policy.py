"""The benchmark of on-policy text: its table adds up, and text is sampled where it says so."""

from __future__ import annotations

import re

from harness import ROOT, output_of


def test_the_table_adds_up():
    options = (
        "--student demo-student --teacher demo-teacher --steps 2 --rounds 1 --max_tokens 4 --batch_size 4"
    )
    printed = output_of(str(ROOT / "tools/bench/on_policy.py"), *options.split())
    names = re.search(r"^seconds +per step(.*)$", printed, re.M)[1].split()
    assert names == ["sampling", "teacher", "forward", "backward", "optimizer", "data", "rest"]
    rows = re.findall(r"^(off|offline|online) +([\d. -]+)$", printed, re.M)
    assert [name for name, _ in rows] == ["off", "offline", "online"]
    for name, row in rows:
        whole, *parts = map(float, row.split())
        assert abs(whole - sum(parts)) < 0.005 and len(parts) == len(names)  # each is rounded to 0.001
        sampling, teacher, forward, *_ = parts
        assert (sampling > 0) == (name != "off") and teacher > 0 and forward > 0
