"""Print the results of finished runs side by side, and draw them: python tools/compare_runs.py RUN...

Runs that differ in nothing but the seed (and where and how often they write) form a group, and so do the runs
of one arm and one number of labels of a study. Two figures go to `--out` (default: the folder that holds the
runs): `comparison_curves.png`, the curves of all runs, and `comparison_scores.png`, each group's mean test
scores with the 95 % interval over its seeds (Student's t; none for a single run). A group has one look in all
panels of both. Files and folders that are no run are named and skipped, so that `runs/*` can be given.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finished_runs import groups, number, read_result, runs_among

from ibdistill.evaluation.intervals import interval
from ibdistill.evaluation.plots import LONGEST_TITLE, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[str, list[int], list[float]]
"""The group's name, steps, values."""

COLUMNS = ("run", "method", "task", "accuracy %", "rationale BLEU", "steps", "tokens", "train s")
CURVES = ("loss/total", "loss/predict", "loss/explain", "loss/answer", "loss/rationale")
CURVES += ("eval/valid_.*_accuracy", "eval/valid_.*_faithful")
SCORES = ("accuracy", "ece", "rationale_rouge_l", "faithful")


def rows(folder: Path) -> list[tuple[str, ...]]:
    """The table's rows for a run, one per task that it was tested on, or one without scores.

    Raises ValueError if the run has no result.
    """

    def shown(value: float | None, factor: int) -> str:
        return "-" if value is None else f"{factor * value:.1f}"

    result = read_result(folder)
    return [
        (
            folder.name,
            result["method"],
            task,
            shown(number(scores, "accuracy"), 100),
            shown(number(scores, "rationale_bleu"), 1),
            str(result["steps"]),
            str(result["tokens"]),
            f"{result['seconds']:.0f}",
        )
        for task, scores in (result["test"] or {"-": {}}).items()
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


def look(index: int) -> dict[str, Any]:
    """Colour, marker and line of the group with this number: different for the first 60."""
    from matplotlib import colormaps

    order = [*range(0, 20, 2), *range(1, 20, 2)]  # the full colours first, then their light companions
    color = colormaps["tab20"](order[index % 20])
    return {
        "color": color,
        "marker": "osD^vPX<>*"[index % 10],
        "linestyle": ("-", "--", ":")[index // 20 % 3],
    }


def score_panels(grouped: dict[str, list[Path]]) -> dict[str, dict[str, list[float]]]:
    """The values of each group's runs, by task and score, then by group."""
    panels: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for name, folders in grouped.items():
        for folder in folders:
            for task, scores in read_result(folder)["test"].items():
                for score in SCORES:
                    if (value := number(scores, score)) is not None:
                        panels[f"{task} {score}"].setdefault(name, []).append(value)
    return panels


def draw_scores(grouped: dict[str, list[Path]]) -> Figure:
    """One panel for each task and score, one row for each group; the groups' names stand at the left."""
    from matplotlib.figure import Figure

    panels, names = score_panels(grouped), list(grouped)
    shown = [f"{plain(name, LONGEST_TITLE)} ({len(grouped[name])})" for name in names]
    widest = max(map(len, shown))
    figure = Figure((2 + 0.07 * widest + 2.8 * len(panels), 1.6 + 0.32 * len(names)), layout="constrained")
    for axes, (title, rows) in zip(_row(figure, len(panels), sharey=True), panels.items(), strict=True):
        for name, values in rows.items():
            y, style = names.index(name), look(names.index(name)) | {"linestyle": "-"}
            center, half = interval(values)
            axes.errorbar(center, y, xerr=None if math.isnan(half) else half, capsize=3, **style)
            axes.plot(values, [y] * len(values), "|", color=style["color"], alpha=0.6)
        axes.set(title=plain(title), xlim=limits([v for values in rows.values() for v in values]))
        axes.grid(alpha=0.3)
    figure.axes[0].set_yticks(range(len(names)), shown, fontsize=8)
    figure.axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle("test scores: mean, 95 % interval over (n) seeds, each run", fontsize=10)
    return figure


def limits(values: list[float]) -> tuple[float, float]:
    """Ends of an axis, by the values of single runs.

    The interval of a few seeds may be many times as wide, and is cut at the edge.
    """
    low, high = min(values), max(values)
    margin = max(0.6 * (high - low), 0.02 * abs(high), 1e-3)
    return low - margin, high + margin


def curve_panels(grouped: dict[str, list[Path]]) -> tuple[dict[str, list[Curve]], list[Path]]:
    """(the curves of all runs by tag, the runs without events)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    panels: dict[str, list[Curve]] = {}
    without = []
    for name, folders in grouped.items():
        for folder in folders:
            if not list((folder / "tensorboard").glob("events.*")):
                without.append(folder)
                continue
            events = EventAccumulator(str(folder / "tensorboard"))
            events.Reload()
            for pattern in CURVES:
                for tag in filter(re.compile(pattern).fullmatch, sorted(events.Tags()["scalars"])):
                    points = events.Scalars(tag)
                    curve = (name, [p.step for p in points], [p.value for p in points])
                    panels.setdefault(tag, []).append(curve)
    return panels, without


def draw_curves(grouped: dict[str, list[Path]], panels: dict[str, list[Curve]]) -> Figure:
    """One panel for each curve that any run has, and one legend for all of them."""
    from matplotlib.figure import Figure

    names = list(grouped)
    figure = Figure(
        (4.2 * len(panels), 3.6 + 0.2 * math.ceil(len(names) / len(panels))), layout="constrained"
    )
    handles = {}
    for axes, (tag, curves) in zip(_row(figure, len(panels)), panels.items(), strict=True):
        for name, steps, values in curves:
            style = look(names.index(name))
            marker = style["marker"] if len(steps) < 20 else ""
            (handles[name],) = axes.plot(steps, values, **style | {"marker": marker}, markersize=3, alpha=0.8)
        axes.set(xlabel="step", title=plain(tag))
        axes.grid(alpha=0.3)
    labels = [plain(name, LONGEST_TITLE) for name in handles]
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=max(1, len(panels)), fontsize=8)
    return figure


def _row(figure: Figure, panels: int, **kwargs: Any) -> list[Axes]:
    """So many axes side by side."""
    return list(figure.subplots(1, panels, squeeze=False, **kwargs)[0])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, help="folder for the figures")
    options = parser.parse_args(arguments)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # what a purged event is
    try:
        folders = runs_among(options.runs)
        print(table([row for folder in folders for row in rows(folder)]))
        out = options.out or Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
        out.mkdir(parents=True, exist_ok=True)
        grouped = groups(folders)
    except ValueError as error:
        sys.exit(f"error: {error}")
    figures = {}
    panels, without = curve_panels(grouped)
    if panels:
        figures[out / "comparison_curves.png"] = draw_curves(grouped, panels)
    if score_panels(grouped):
        figures[out / "comparison_scores.png"] = draw_scores(grouped)
    for path, figure in figures.items():
        figure.savefig(path, dpi=110)
    for folder in without:
        print(f"no curves of {folder}: {folder / 'tensorboard'} has no events", file=sys.stderr)
    print("\nfigures:", *(figures or ["none, as no run has curves or scores"]))


if __name__ == "__main__":
    main(sys.argv[1:])
