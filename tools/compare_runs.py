"""Print the results of finished runs side by side, and draw them: python tools/compare_runs.py RUN...

Runs that differ in nothing but the seed (and where and how often they write) form a group. Two
figures go to `--out` (default: the folder that holds the runs): `comparison_curves.png`, the
curves of all runs in their group's colour, and `comparison_scores.png`, each group's mean test
scores with the 95 % interval over its seeds (Student's t; none for a single run).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

COLUMNS = ("run", "method", "task", "accuracy %", "rationale BLEU", "steps", "tokens", "train s")
CURVES = ("loss/total", "loss/predict", "loss/explain", "eval/valid_.*_accuracy", "eval/valid_.*_faithful")
SCORES = ("accuracy", "ece", "rationale_rouge_l", "faithful")
# two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom
_T = "12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131".split()


def read_result(folder: Path) -> dict[str, Any]:
    """Raises ValueError if the run has no result, or a damaged one."""
    path = folder / "result.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no result.json: no run, or not finished")
    try:
        result = json.loads(path.read_text())
        result["method"], result["test"], result["steps"], result["tokens"], result["seconds"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of train.py ({type(error).__name__}: {error})") from None
    return result


def rows(folder: Path) -> list[tuple[str, ...]]:
    """One row a task of a run. Raises ValueError if the run has no result."""
    result = read_result(folder)
    return [
        (
            folder.name,
            result["method"],
            task,
            f"{100 * scores['accuracy']:.1f}",
            f"{scores['rationale_bleu']:.1f}" if "rationale_bleu" in scores else "-",
            str(result["steps"]),
            str(result["tokens"]),
            f"{result['seconds']:.0f}",
        )
        for task, scores in result["test"].items()
    ]


def table(lines: list[tuple[str, ...]]) -> str:
    """Columns of equal width; text to the left, numbers to the right."""
    lines = [COLUMNS, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def groups(folders: list[Path]) -> dict[str, list[Path]]:
    """Runs of one configuration, by a name: the method, and what else differs between the groups.

    Where no two runs share one, they go by their folders' names, which are shorter.
    """
    import yaml

    settings = {}
    for folder in folders:
        path = folder / "config.yaml"
        content = yaml.safe_load(path.read_text()) if path.is_file() else {}
        flat = {
            f"{section}.{key}": value for section, values in content.items() for key, value in values.items()
        }
        flat = {name: value for name, value in flat.items() if not name.startswith("run.")}
        settings[folder] = {"objective.method": read_result(folder)["method"]} | flat
    names = sorted({name for own in settings.values() for name in own})
    varied = [n for n in names if len({json.dumps(own.get(n)) for own in settings.values()}) > 1]
    grouped: dict[str, list[Path]] = defaultdict(list)
    for folder, own in settings.items():
        others = [f"{n.split('.')[1]} {own.get(n)}" for n in varied if n != "objective.method"]
        grouped[" ".join([own["objective.method"], *others])].append(folder)
    if len(grouped) == len({folder.name for folder in folders}) == len(folders):
        return {folder.name: [folder] for folder in folders}
    return dict(grouped)


def t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t; beyond the table by its expansion in 1 / degrees (Fisher
    and Cornish, 1960), which is within 0.001 there."""
    if degrees <= len(_T):
        return float(_T[degrees - 1])
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval; NaN for a single value."""
    n = len(values)
    if n == 1:
        return values[0], math.nan
    return mean(values), t_quantile(n - 1) * stdev(values) / math.sqrt(n)


def draw_scores(grouped: dict[str, list[Path]], path: Path) -> None:
    """One panel a task and score."""
    from ibdistill.evaluation import plots

    panels: dict[str, dict[str, tuple[float, float]]] = {}
    for name, folders in grouped.items():
        found = defaultdict(list)
        for folder in folders:
            for task, scores in read_result(folder)["test"].items():
                for score in SCORES:
                    if score in scores:
                        found[f"{task} {score}"].append(scores[score])
        for panel, values in found.items():
            label = f"{name}\n({len(values)} seed{'s' * (len(values) > 1)})"
            panels.setdefault(panel, {})[label] = interval(values)
    plots.intervals(panels, "test scores, mean and 95 % interval over seeds").savefig(path, dpi=110)


def draw_curves(grouped: dict[str, list[Path]], path: Path) -> list[Path]:
    """One panel a curve that any run has; the runs without events. Nothing is drawn if none has any."""
    import re

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ibdistill.evaluation import plots

    panels: dict[str, list] = {}
    without = []
    for name, folders in grouped.items():
        for folder in folders:
            events = EventAccumulator(str(folder / "tensorboard"))
            if not list((folder / "tensorboard").glob("events.*")):
                without.append(folder)
                continue
            events.Reload()
            for pattern in CURVES:
                for tag in filter(re.compile(pattern).fullmatch, sorted(events.Tags()["scalars"])):
                    points = events.Scalars(tag)
                    curve = (name, [p.step for p in points], [p.value for p in points])
                    panels.setdefault(tag, []).append(curve)
    if panels:
        plots.lines(panels, "runs").savefig(path, dpi=110)
    return without


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, help="folder for the figures")
    options = parser.parse_args(arguments)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # what a purged event is
    try:
        print(table([row for folder in options.runs for row in rows(folder)]))
        out = options.out or Path(os.path.commonpath([folder.resolve().parent for folder in options.runs]))
        out.mkdir(parents=True, exist_ok=True)
        grouped = groups(options.runs)
        draw_scores(grouped, out / "comparison_scores.png")
        without = draw_curves(grouped, out / "comparison_curves.png")
    except ValueError as error:
        sys.exit(f"error: {error}")
    for folder in without:
        print(f"no curves of {folder}: {folder / 'tensorboard'} has no events", file=sys.stderr)
    print("\nfigures:", *sorted(str(path) for path in out.glob("comparison_*.png")))


if __name__ == "__main__":
    main(sys.argv[1:])
