"""What an evaluation shows: scores to watch, figures, and samples to read.

A run is never ended by what is only shown: a figure that cannot be drawn is a warning and left out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ibdistill.config.fields import shown
from ibdistill.data.tasks.registry import TASKS
from ibdistill.evaluation import plots
from ibdistill.evaluation.faithfulness import count_steps
from ibdistill.evaluation.predictions import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger("ibdistill")

MAX_CLASSES = 12
"""A confusion matrix is drawn up to this many different gold labels."""
LONGEST_SAMPLE = 2000
"""Characters of a text that the samples show."""
_MAX_GROUPS = 8


def curves(scores: Mapping[str, float]) -> dict[str, float]:
    """The scores that are drawn over a run's steps.

    Those of the first token's confidence, a third form of the calibration error and the accuracies by other
    rules stand in `result.json` alone, as does `reference_leakage`, which is the same at every step.
    """
    left_out = "ece_mass", "reason_ece_mass", "accuracy_strict", "accuracy_lenient", "reference_leakage"
    return {
        name: value
        for name, value in scores.items()
        if name not in left_out and not name.startswith("first_token_")
    }


def figures(predictions: Sequence[Prediction], title: str) -> dict[str, Figure]:
    """Figures by name, those that can be drawn.

    `reliability`, `first_token_reliability` and `risk_coverage` are there for every task, `confusion` for
    tasks with few labels, and `accuracy_by_steps` where there are reference rationales, whose steps are
    counted.
    """
    correct = [p.correct for p in predictions]
    confidence = [p.confidence for p in predictions]
    first = [p.first_confidence for p in predictions]
    wanted = {
        "reliability": partial(plots.reliability, confidence, correct, title),
        "first_token_reliability": partial(plots.reliability, first, correct, f"{title}, first token"),
        "risk_coverage": partial(plots.risk_coverage, confidence, correct, title),
    }
    gold = [p.record.gold for p in predictions]
    if 2 <= len(set(gold)) <= MAX_CLASSES and not TASKS[predictions[0].record.task].arithmetic:
        # a prediction that the task's rule accepts counts as the gold label itself
        labels = [p.record.gold if p.correct else p.label for p in predictions]
        wanted["confusion"] = partial(plots.confusion, gold, labels, title)
    explained = [p for p in predictions if p.record.rationale]
    if explained:
        steps = [min(count_steps(p.record.rationale, p.record), _MAX_GROUPS) for p in explained]
        label = f"steps of the reference rationale ({_MAX_GROUPS}: or more)"
        right = [p.correct for p in explained]
        wanted["accuracy_by_steps"] = partial(plots.accuracy_by, steps, right, title, label)
    drawn = {name: _drawn(name, draw) for name, draw in wanted.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _drawn(name: str, draw: Callable[[], Figure | None]) -> Figure | None:
    """A figure whose texts and layout have been drawn once, since most errors come only then; None, with a
    warning, if that failed."""
    try:
        figure = draw()
        if figure is not None:
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # the layout stands, and need not be found again
    except Exception as error:
        logger.warning("the figure %s is left out: %s: %s", name, type(error).__name__, shown(str(error)))
        return None
    return figure


def samples(predictions: Sequence[Prediction], count: int = 5) -> str:
    """`count` answers, evenly spread over the records, as Markdown: question, labels, rationales."""
    chosen = [predictions[i * len(predictions) // count] for i in range(min(count, len(predictions)))]
    rows = []
    for p in chosen:
        rows += [
            f"**{p.record.id}: {'right' if p.correct else 'wrong'}**, confidence {p.confidence:.2f}\n",
            "| | |\n|---|---|",
            f"| question | {_cell(p.record.question)} |",
            f"| gold label | {_cell(p.record.gold)} |",
            f"| predicted label | {_cell(p.label)} |",
            f"| gold rationale | {_cell(p.record.rationale or '(none)')} |",
            f"| generated rationale | {_cell('(not decoded)' if p.rationale is None else p.rationale)} |\n",
        ]
    return "\n".join(rows)


def _cell(text: str) -> str:
    """The text as a cell of a Markdown table, verbatim on one line, and cut to LONGEST_SAMPLE characters."""
    line = " ".join(plots.one_line(text, LONGEST_SAMPLE).split()).replace("`", "'").replace("|", "\\|")
    line += " " if line.endswith("\\") else ""  # a backslash would escape the mark that ends the code
    return f"`{line}`" if line else "(empty)"


def learning_curve(predictions: Path, name: str, last_step: int) -> Figure | None:
    """Accuracy by length of the reference rationale over a run's evaluations, from its predictions' folder
    (`step-*/NAME`), up to `last_step`.

    None if there are no reference rationales, before the second evaluation, which makes a curve of points,
    and, with a warning, if an earlier file cannot be read.
    """
    return _drawn("accuracy_by_length", partial(_learning_curve, predictions, name, last_step))


def _learning_curve(predictions: Path, name: str, last_step: int) -> Figure | None:
    points = []
    for path in sorted(predictions.glob(f"step-*/{name}")):
        step = int(path.parent.name.removeprefix("step-"))
        if step <= last_step:
            # the newest file was just written, maybe over one of an interrupted start
            points.append((step, (_by_length.__wrapped__ if step == last_step else _by_length)(path)))
    lines = []
    for group in dict.fromkeys(group for _, groups in points for group in groups):
        found = [(step, groups[group]) for step, groups in points if group in groups]
        lines.append((group, *zip(*found, strict=True)))
    if len(points) < 2 or not lines:
        return None
    return plots.lines({f"accuracy, {name.removesuffix('.jsonl')}": lines}, "by rationale length")


@cache
def _by_length(path: Path) -> dict[str, float]:
    """Accuracy of the third of a file's records with the shortest, middle and longest rationales."""
    rows = [json.loads(line) for line in path.open()]
    pairs = [(len(row["gold_rationale"].split()), row["correct"]) for row in rows if row["gold_rationale"]]
    if not pairs:
        return {}
    words, correct = (np.array(part) for part in zip(*pairs, strict=True))
    low, high = np.quantile(words, [1 / 3, 2 / 3])
    thirds = {"short": words <= low, "middle": (words > low) & (words <= high), "long": words > high}
    return {f"{name} rationales": float(correct[part].mean()) for name, part in thirds.items() if part.any()}
