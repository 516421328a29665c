"""The benchmark of the teacher's placements: 2 ranks, its table adds up; what a cache's forms keep."""

from __future__ import annotations

import re

from harness import ROOT, launch, output_of

BENCH = str(ROOT / "tools/bench/teacher.py")


def test_the_table_adds_up(tmp_path):
    log = tmp_path / "log"
    options = (
        "--student demo-student --teacher demo-teacher --method ib+kd --batch_size 4 --steps 2 --rounds 1"
    )
    assert launch([BENCH, *options.split()], ranks=2, log=log) == 0, log.read_text()[-4000:]
    text = log.read_text()
    rows = dict(re.findall(r"^(none|replica|zero3|cache) +([\d. -]+)$", text, re.M))
    assert list(rows) == ["none", "replica", "zero3", "cache"]
    table = {name: row.split() for name, row in rows.items()}
    floor = float(re.search(r"^floor (\S+) ms", text, re.M)[1])
    for ms, of_none, of_floor, _, peak in table.values():
        assert abs(float(of_none) - float(ms) / float(table["none"][0])) < 0.02
        assert abs(float(of_floor) - float(ms) / floor) < 0.02
        assert float(peak) > 100
    assert floor > float(table["none"][0])
    held = {name: float(row[3]) for name, row in table.items() if row[3] != "-"}
    assert held.keys() == {"replica", "zero3", "cache"}
    assert 0.5 <= held["zero3"] / held["replica"] <= 0.55 and held["cache"] == held["zero3"]


def test_more_of_the_teacher_is_kept_with_more_bytes(tmp_path):
    printed = output_of(BENCH, *"fidelity --student demo-student --teacher demo-teacher".split())
    rows = re.findall(r"^(states bf16|top \d+) +(\d+) +(\S+) +(\S+)$", printed, re.M)
    assert [(name, int(size)) for name, size, *_ in rows] == [
        ("states bf16", 2 * 96),
        *((f"top {k}", 6 * k) for k in (8, 16, 32, 64, 128)),
    ]
    drawn = re.findall(r"^sampled (12|50) +(\d+) +- +(\S+) +\(the mean's: (\S+)\)$", printed, re.M)
    (few, few_bytes, few_moved, few_mean), (many, many_bytes, many_moved, many_mean) = drawn
    assert (few, many) == ("12", "50") and 6 < int(few_bytes) <= 1 + 5 * 12 < int(many_bytes) <= 1 + 5 * 50
    assert float(many_moved) < float(few_moved) and float(many_mean) < float(few_mean) < float(few_moved) / 2
    moved = [float(gradient) for _, _, _, gradient in rows]
    assert moved[0] < 0.02 and moved[1:] == sorted(moved[1:], reverse=True) and moved[1] > 3 * moved[-1]
