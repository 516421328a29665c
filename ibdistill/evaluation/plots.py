"""Figures, drawn without pyplot: they need no display and share no state. Each function returns one Figure.

matplotlib is imported with the first figure, since its import is a tenth of a rank's start and only
one rank draws.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ibdistill.evaluation import calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[str, Sequence[float], Sequence[float]]
"""Name, x, y."""
LONGEST_LABEL, LONGEST_TITLE = 40, 100
"""Characters of a label and of a title that are drawn."""


def one_line(text: str, longest: int) -> str:
    """The text cut to `longest` characters, with spaces for what cannot be shown, line ends among it."""
    kept = text if len(text) <= longest else f"{text[: longest - 1]}…"
    return "".join(c if c.isprintable() else " " for c in kept)


def plain(text: str, longest: int = LONGEST_LABEL) -> str:
    """The text as every figure shows it: on one line, cut to `longest` characters, and never typeset.

    Texts come from data, models and folder names. matplotlib would read `$5 and $3` as mathematics and raise
    at `$\\frac{$`, cannot draw a lone surrogate, needs minutes for 100,000 characters, and leaves names that
    begin with an underscore out of legends.
    """
    kept = one_line(text, longest).replace("$", r"\$")
    return f" {kept}" if kept.startswith("_") else kept


def reliability(confidence: ArrayLike, correct: ArrayLike, title: str) -> Figure:
    """Accuracy against confidence in `calibration.BINS` bins of equal width; the dots' area is the count."""
    bins = calibration.equal_width(confidence, correct)
    n = int(bins.count.sum())
    figures = f"ECE {bins.error:.3f}, {calibration.BINS} bins, n = {n}"
    figure, axes = _axes(title, "confidence", "accuracy", figures)
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="calibrated")
    low, high = bins.edges.T
    axes.bar(low, bins.accuracy, width=high - low, align="edge", alpha=0.35, edgecolor="C0")
    axes.scatter(bins.confidence, bins.accuracy, s=4 + 200 * bins.count / n, color="C0")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="upper left")
    return figure


def risk_coverage(confidence: ArrayLike, correct: ArrayLike, title: str) -> Figure:
    """Share of wrong answers among the most confident ones, against how many are answered."""
    coverage, risk = calibration.risk_coverage(confidence, correct)
    figure, axes = _axes(title, "coverage", "risk", f"AURC {risk.mean():.3f}")
    axes.plot(coverage, risk)
    axes.set(xlim=(0, 1), ylim=(0, None))
    return figure


def confusion(gold: Sequence[str], predicted: Sequence[str], title: str) -> Figure:
    """Counts of the predictions for each gold label; a prediction that no record has as its gold label counts
    as `(other)`."""
    labels = sorted(set(gold))
    columns = labels + ["(other)"] * any(label not in labels for label in predicted)
    counts = np.zeros((len(labels), len(columns)), dtype=int)
    for truth, label in zip(gold, predicted, strict=True):
        counts[labels.index(truth), columns.index(label if label in labels else "(other)")] += 1
    figure, axes = _axes(title, "predicted", "gold")
    axes.imshow(counts / counts.sum(axis=1, keepdims=True), vmin=0, vmax=1, cmap="Blues")
    for (row, column), count in np.ndenumerate(counts):
        dark = count > counts[row].sum() / 2
        axes.text(column, row, str(count), ha="center", va="center", color="w" if dark else "k")
    axes.set_xticks(range(len(columns)), [*map(plain, columns)], rotation=30, ha="right")
    axes.set_yticks(range(len(labels)), [*map(plain, labels)])
    axes.grid(False)
    return figure


def accuracy_by(groups: Sequence[int], correct: Sequence[float], title: str, xlabel: str) -> Figure:
    """The accuracy in each group of records with its 95 % Wilson interval, and the group's size above it."""
    figure, axes = _axes(title, xlabel, "accuracy")
    values, member = np.unique(groups, return_inverse=True)
    count = np.bincount(member)
    right = np.bincount(member, np.asarray(correct, dtype=float))
    low, high = wilson(right, count)
    accuracy = right / count
    axes.bar(range(len(values)), accuracy, alpha=0.6)
    axes.errorbar(
        range(len(values)), accuracy, yerr=[accuracy - low, high - accuracy], fmt="none", color="k", capsize=3
    )
    for x, (top, n) in enumerate(zip(high, count, strict=True)):
        axes.text(x, top + 0.01, f"n={n}", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(values)), [str(value) for value in values])
    axes.set_ylim(0, 1.08)
    return figure


def lines(panels: Mapping[str, Sequence[Curve]], title: str, xlabel: str = "step") -> Figure:
    """One panel for each entry of `panels`; curves of the same name have the same colour in all panels."""
    names = list(dict.fromkeys(name for curves in panels.values() for name, _, _ in curves))
    figure = _figure(4.2 * len(panels), 3.6)
    for axes, (ylabel, curves) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        labelled = set()
        for name, x, y in curves:
            label = plain(name) if name not in labelled else None
            axes.plot(
                x, y, color=f"C{names.index(name) % 10}", label=label, marker="." if len(x) < 20 else ""
            )
            labelled.add(name)
        axes.set(xlabel=plain(xlabel), title=plain(ylabel))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(plain(title, LONGEST_TITLE))
    return figure


def intervals(panels: Mapping[str, Mapping[str, tuple[float, float]]], title: str) -> Figure:
    """One panel for each metric. It maps names to the mean and the half width of its interval (NaN: none)."""
    figure = _figure(4.2 * len(panels), 3.6)
    for axes, (metric, rows) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for x, (mean, half) in enumerate(rows.values()):
            axes.errorbar(
                x, mean, yerr=None if math.isnan(half) else half, fmt="o", color=f"C{x % 10}", capsize=4
            )
        axes.set_xticks(range(len(rows)), [*map(plain, rows)], rotation=20, ha="right", fontsize=8)
        axes.set(title=plain(metric), xlim=(-0.5, len(rows) - 0.5))
        axes.grid(alpha=0.3, axis="y")
    figure.suptitle(plain(title, LONGEST_TITLE))
    return figure


def wilson(right: ArrayLike, n: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the 95 % interval of a share (Wilson, 1927), which stays within 0..1."""
    z, n = 1.959964, np.asarray(n, dtype=float)
    p = np.asarray(right) / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return np.minimum(centre - half, p).clip(0), np.maximum(centre + half, p).clip(max=1)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _axes(title: str, xlabel: str, ylabel: str, second_line: str = "") -> tuple[Figure, Axes]:
    figure = _figure(4.8, 4.2)
    axes = figure.subplots()
    lines = [plain(title, LONGEST_TITLE), *[second_line] * bool(second_line)]
    axes.set(title="\n".join(lines), xlabel=plain(xlabel, LONGEST_TITLE), ylabel=plain(ylabel))
    axes.grid(alpha=0.3)
    return figure, axes
