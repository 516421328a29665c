"""Paired differences between the arms of a recorded table, with intervals and p-values:

    python tools/study/paired.py tools/study/demo_table.md            the comparisons that the table lists
    python tools/study/paired.py tools/study/demo_table.md A B ...    these pairs, such as vid@300 kd@300

Reads the column `per seed` of the first table in the file. Arms are paired by seed, which is the position in
that column; an arm with fewer seeds has the first ones. An interval is Student's t over the seeds, 95 %.
`holds` says whether p is below 0.05 after Holm's correction for all comparisons shown (Scandinavian Journal
of Statistics 6, 1979), which keeps the chance of any false one at 5 %. Recorded accuracies have one decimal,
so a limit may differ by 0.1 from one that was computed from the runs.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

Scores = dict[str, list[float]]
"""`arm@labels` -> accuracy in percent, one entry per seed."""


class Difference(NamedTuple):
    """Mean of a - b over the common seeds, half of its 95 % interval, two-sided p, number of seeds."""

    mean: float
    half: float
    p: float
    seeds: int


def read(path: Path) -> tuple[Scores, list[tuple[str, str]]]:
    """The scores of a table's arms, and the pairs that the lines below it compare."""
    first = path.read_text().split("\nFrom ")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines() if "|" in line]
    scores = {f"{row[0]}@{row[1]}": [float(v) for v in row[6].split()] for row in cells[2:]}
    if not scores:
        raise ValueError("it has no rows")
    return scores, re.findall(r"^- (\S+) against (\S+):", first, re.MULTILINE)


def difference(a: list[float], b: list[float]) -> Difference:
    """The paired difference of two arms' scores. Raises ValueError for fewer than two common seeds."""
    values = [x - y for x, y in zip(a, b, strict=False)]
    if len(values) < 2:
        raise ValueError(f"{len(values)} common seeds; an interval needs at least 2")
    center, error = mean(values), stdev(values) / math.sqrt(len(values))
    half = quantile(0.05, len(values) - 1) * error
    p = tail(abs(center) / error, len(values) - 1) if error else 1.0  # no spread: nothing to judge by
    return Difference(center, half, p, len(values))


def holm(p: list[float], tests: int | None = None) -> list[float]:
    """Holm's adjusted p-values, in the order given. `tests` counts those that are not there, too: the
    smallest is multiplied by it, the next by one less, and none is below a smaller p's."""
    adjusted, largest = [1.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, ((tests or len(p)) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def tail(t: float, degrees: int) -> float:
    """Two-sided tail probability of Student's t, by Simpson's rule on theta = atan(t / sqrt(degrees))."""
    end, n = math.atan(t / math.sqrt(degrees)), 2000
    values = [math.cos(end * i / n) ** (degrees - 1) for i in range(n + 1)]
    integral = (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2])) * end / n / 3
    scale = math.gamma((degrees + 1) / 2) / math.sqrt(math.pi) / math.gamma(degrees / 2)
    return 1 - 2 * scale * integral


def quantile(p: float, degrees: int) -> float:
    """The t whose two-sided tail probability is p, by bisection."""
    low, high = 0.0, 1000.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, degrees) > p else (low, middle)
    return high


def main(arguments: list[str]) -> None:
    if not arguments or len(arguments) % 2 == 0 or arguments[0] in ("-h", "--help"):
        sys.exit(__doc__)
    try:
        scores, pairs = read(Path(arguments[0]))
    except (OSError, ValueError, IndexError) as error:
        sys.exit(f"error: {arguments[0][:200]} is no table that `study.py report` wrote: {error}")
    pairs = list(zip(arguments[1::2], arguments[2::2], strict=True)) or pairs
    for a, b in pairs:
        if unknown := {a, b} - scores.keys():
            sys.exit(f"error: no arm {', '.join(unknown)} in {arguments[0]}; it has {', '.join(scores)}")
    found = [difference(scores[a], scores[b]) for a, b in pairs]
    for (a, b), d, p in zip(pairs, found, holm([d.p for d in found]), strict=True):
        interval = f"[{d.mean - d.half:+.1f}, {d.mean + d.half:+.1f}]"
        holds = "holds" if p < 0.05 else ""
        print(f"{a:20}  {b:20}  {d.mean:+5.1f} {interval:15}  {d.seeds:2} seeds  p {d.p:.1e}  {holds}")


if __name__ == "__main__":
    main(sys.argv[1:])
