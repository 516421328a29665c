"""Warnings, once each, for what makes a run pointless and would otherwise be seen in a plot alone.

Every alarm names the number, the bound and what to try.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from ibdistill.data.lettered_options import options
from ibdistill.data.records import Record
from ibdistill.data.tasks.registry import TASKS

logger = logging.getLogger("ibdistill")

LEAST_SHARE, LARGEST_SHARE = 0.001, 0.9
"""The share of one term in the sum of all terms' gradient norms lies between these bounds."""
LARGEST_CONSTANT = 0.99
"""The largest share of the mutual-information term that is the same whatever the student does."""
LARGEST_WAIT = 0.5
"""The largest share of a step that is spent on waiting for data."""
LARGEST_UNFINISHED = 0.8
"""The largest share of a sampling's own texts that reach their limit, or are empty."""
PATIENCE = 3
"""Number of measurements in a row beyond a bound that give an alarm."""


class Alarms:
    """Counts what is beyond its bound, and warns of each thing once."""

    def __init__(self, records: Sequence[Record] = ()) -> None:
        """`records`: those to train on, which tell how often guessing is right."""
        parts = _by_task(records).values()
        right = sum(len(part) * chance(part) for part in parts)
        self._chance = right / max(1, sum(map(len, parts)))
        self._in_row: Counter[str] = Counter()
        self._warned: set[str] = set()

    def check(self, scalars: Mapping[str, float], step: int) -> None:
        """Look at the scalars of a logging step, by TensorBoard tag."""
        for tag, share in scalars.items():
            if tag.startswith("grad/share_"):
                self._check_share(tag.removeprefix("grad/share_"), share, step)
        constant = scalars.get("mi/constant_share")
        if constant is not None:
            self._count(
                "constant",
                constant > LARGEST_CONSTANT,
                step,
                f"{constant:.2%} of the mutual-information term is constant (bound {LARGEST_CONSTANT:.0%}): "
                "it hardly trains the student. Try --objective.estimator normalized",
            )
        if scalars.get("speed/step_s"):
            wait = scalars["speed/data_wait_s"] / scalars["speed/step_s"]
            self._count(
                "wait",
                wait > LARGEST_WAIT,
                step,
                f"{wait:.0%} of the step time is spent on waiting for data (bound {LARGEST_WAIT:.0%}). Give "
                "each process more CPU cores, check the file system, or enlarge optim.batch_size",
            )
        if "on_policy/unfinished_share" in scalars:
            self._check_unfinished(scalars["on_policy/unfinished_share"], step)
        if "teacher/accuracy" in scalars:
            self.check_teacher(scalars["teacher/accuracy"], self._chance)

    def check_teacher(self, accuracy: float, chance: float, task: str = "") -> None:
        """Compare the share of a teacher's labels that are right with that of guesses."""
        if accuracy < chance:
            self._warn(
                f"teacher {task}",
                f"the teacher{f' of {task}' if task else ''} agrees with {accuracy:.1%} of the gold labels, "
                f"guessing with {chance:.1%}. Check that its data, prompt and answer format belong to this "
                "task, or learn the gold labels with --data.label_source gt",
            )

    def check_labels(self, records: Sequence[Record]) -> None:
        """Compare the labels to train on, perhaps an LLM's (`data.label_source`), with the gold labels."""
        for task, own in _by_task(records).items():
            accuracy = sum(TASKS[task].is_correct(record.label, record) for record in own) / len(own)
            self.check_teacher(accuracy, chance(own), task)

    def check_written(self, counts: Mapping[str, int], records: Sequence[Record]) -> None:
        """Look at what the teacher answered before training, as `teacher.writing.Written` counts it."""
        for task, own in _by_task(records).items():
            parsed = counts.get(f"{task}/train/teacher_parsed", 0)
            if parsed:
                self.check_teacher(counts.get(f"{task}/train/teacher_agrees", 0) / parsed, chance(own), task)

    def _check_share(self, term: str, share: float, step: int) -> None:
        weights = "objective.beta for mi, objective.gamma for kd, objective.alpha for the streams"
        self._count(
            f"small {term}",
            share < LEAST_SHARE,
            step,
            f"the {term} term makes {share:.3%} of the gradient (bound {LEAST_SHARE:.1%}): it has no effect. "
            f"Raise its weight ({weights}), or leave it out",
        )
        self._count(
            f"large {term}",
            share > LARGEST_SHARE,
            step,
            f"the {term} term makes {share:.1%} of the gradient (bound {LARGEST_SHARE:.0%}): the others have "
            f"hardly any effect. Lower its weight ({weights})",
        )

    def _check_unfinished(self, share: float, step: int) -> None:
        if share == 1:  # there is nothing to wait for
            self._in_row["unfinished"] = PATIENCE
        self._count(
            "unfinished",
            share > LARGEST_UNFINISHED,
            step,
            f"{share:.0%} of the student's own texts have no end or no words (bound "
            f"{LARGEST_UNFINISHED:.0%}). With on_policy.unfinished keep the teacher scores them as they are; "
            "with replace the data's text is learned in their place. Raise on_policy.max_tokens, lower "
            "on_policy.temperature or on_policy.top_p, or start later (on_policy.start), when the student "
            "has learned to end",
        )

    def _count(self, name: str, is_beyond: bool, step: int, message: str) -> None:
        self._in_row[name] = self._in_row[name] + 1 if is_beyond else 0
        if self._in_row[name] >= PATIENCE:
            self._warn(name, f"step {step}: {message}")

    def _warn(self, name: str, message: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning("%s", message)


def _by_task(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records whose ground truth is known, by task."""
    tasks = dict.fromkeys(record.task for record in records if record.gold)
    return {task: [record for record in records if record.task == task and record.gold] for task in tasks}


def chance(records: Sequence[Record]) -> float:
    """The share of guesses that are right.

    A guess is one of the question's options, or one of all gold labels where these are few (up to a tenth of
    the records). For free answers the share is 0.
    """
    listed = [len(options(record)) for record in records]
    if records and all(listed):
        return sum(1 / n for n in listed) / len(records)
    labels = {record.gold for record in records}
    return 1 / len(labels) if labels and len(labels) <= len(records) / 10 else 0.0
