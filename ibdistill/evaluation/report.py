"""What an evaluation shows besides its scores: figures, and samples to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ibdistill.data.tasks.registry import TASKS
from ibdistill.evaluation import plots
from ibdistill.evaluation.faithfulness import count_steps
from ibdistill.evaluation.predictions import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_CLASSES = 12
"""A confusion matrix is drawn up to this many different gold labels."""
_MAX_GROUPS = 8


def figures(predictions: Sequence[Prediction], title: str) -> dict[str, Figure]:
    """Figures by name.

    `reliability`, `first_token_reliability` and `risk_coverage` are always there, `confusion` for tasks with
    few labels, and `accuracy_by_steps` where there are reference rationales, whose steps are counted.
    """
    correct = [p.correct for p in predictions]
    confidence = [p.confidence for p in predictions]
    first = [p.first_confidence for p in predictions]
    drawn = {
        "reliability": plots.reliability(confidence, correct, title),
        "first_token_reliability": plots.reliability(first, correct, f"{title}, first token"),
        "risk_coverage": plots.risk_coverage(confidence, correct, title),
    }
    gold = [p.record.gold for p in predictions]
    if 2 <= len(set(gold)) <= MAX_CLASSES and not TASKS[predictions[0].record.task].arithmetic:
        # a prediction that the task's rule accepts counts as the gold label itself
        labels = [p.record.gold if p.correct else p.label for p in predictions]
        drawn["confusion"] = plots.confusion(gold, labels, title)
    explained = [p for p in predictions if p.record.rationale]
    if explained:
        steps = [min(count_steps(p.record.rationale, p.record), _MAX_GROUPS) for p in explained]
        label = f"steps of the reference rationale ({_MAX_GROUPS}: or more)"
        drawn["accuracy_by_steps"] = plots.accuracy_by(steps, [p.correct for p in explained], title, label)
    return drawn


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
    """The text as a cell of a Markdown table, shown verbatim."""
    text = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{text}`" if text else "(empty)"


def learning_curve(predictions: Path, name: str, last_step: int) -> Figure | None:
    """Accuracy by length of the reference rationale over a run's evaluations, from its predictions' folder
    (`step-*/NAME`), up to `last_step`; None if there are no reference rationales."""
    points = []
    for path in sorted(predictions.glob(f"step-*/{name}")):
        step = int(path.parent.name.removeprefix("step-"))
        if step <= last_step:
            # the newest file was just written, maybe over one of an interrupted start
            points.append((step, (_by_length.__wrapped__ if step == last_step else _by_length)(path)))
    curves = []
    for group in dict.fromkeys(group for _, groups in points for group in groups):
        found = [(step, groups[group]) for step, groups in points if group in groups]
        curves.append((group, *zip(*found, strict=True)))
    return (
        plots.lines({f"accuracy, {name.removesuffix('.jsonl')}": curves}, "by rationale length")
        if curves
        else None
    )


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
