"""Paired differences from a recorded table, against textbook values of Student's t."""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness import ROOT

sys.path.append(str(ROOT / "tools"))
from study import paired

TABLE = """| arm | labels | steps | seeds | mean % | std | per seed | to a, 95 % | train s | CPU s |
|---|---|---|---|---|---|---|---|---|---|
| a | 300 | 6 | 3 | 2.0 | 1.0 | 1.0 2.0 3.0 |  | 1 | 2 |
| b+c | 300 | 6 | 4 | 4.0 | 1.0 | 3.0 4.5 4.5 9.0 | +2.0 [-0.2, +4.2] | 1 | 2 |

- b+c@300 against a@300: +2.0 [+0.8, +3.2]

From an earlier commit:

| a | 300 | 6 | 1 | 7.0 |  | 7.0 |  | 1 | 2 |
"""


@pytest.mark.parametrize(
    ("p", "degrees", "t"), [(0.05, 1, 12.7062), (0.05, 9, 2.26216), (0.01, 4, 4.60409), (0.002, 30, 3.38518)]
)
def test_quantiles_are_those_of_tables(p, degrees, t):
    assert paired.quantile(p, degrees) == pytest.approx(t, abs=1e-4)
    assert paired.tail(t, degrees) == pytest.approx(p, rel=1e-4)


def test_only_common_seeds_of_the_first_table_count(tmp_path):
    path = tmp_path / "table.md"
    path.write_text(TABLE)
    scores, pairs = paired.read(path)
    assert scores == {"a@300": [1.0, 2.0, 3.0], "b+c@300": [3.0, 4.5, 4.5, 9.0]}
    assert pairs == [("b+c@300", "a@300")]
    found = paired.difference(scores["b+c@300"], scores["a@300"])  # 2, 2.5, 1.5: mean 2, deviation 0.5
    assert found.mean == 2 and found.seeds == 3
    assert found.half == pytest.approx(4.30265 * 0.5 / 3**0.5, abs=1e-5)
    assert found.p == pytest.approx(1 - (48 / 50) ** 0.5, abs=1e-9)  # 2 degrees: 1 - t / sqrt(t^2 + 2)
    with pytest.raises(ValueError, match="1 common seeds; an interval needs at least 2"):
        paired.difference([1.0], [2.0, 3.0])


def test_holms_correction():
    """Against the example of R's p.adjust: 0.01, 0.02, 0.03 become 0.03, 0.04, 0.04."""
    assert paired.holm([0.02, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    assert paired.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert paired.holm([0.01, 0.04], 5) == pytest.approx([0.05, 0.16])  # three of five were not run
    assert paired.difference([2.0, 3.0], [1.0, 2.0]).p == 1  # no spread, so nothing that p could come from


def test_an_unknown_arm_is_named(tmp_path):
    path = tmp_path / "table.md"
    path.write_text(TABLE)
    command = [sys.executable, ROOT / "tools/study/paired.py", path, "a@300", "d@300"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: no arm d@300 in {path}; it has a@300, b+c@300\n"


@pytest.mark.parametrize(
    "text", [None, "", "| a |\n|---|\n| b |\n", "| a | b | c | d | e | f | g |\n|-|\n" + 7 * "| x " + "|"]
)
def test_a_file_that_is_no_table(tmp_path, text):
    if text is not None:
        (tmp_path / "table.md").write_text(text)
    with pytest.raises(SystemExit, match=r"error: .*table.md is no table that `study.py report` wrote"):
        paired.main([str(tmp_path / "table.md")])
