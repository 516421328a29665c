"""Whether a student's rationales lead to the labels that it gives, and whether their arithmetic holds.

A rationale that leads to another answer than the one the student gives explains nothing. Each task has a
rule for the labels that a rationale *implies* (`tasks.base.Task.implied`):

- demo: the equation that its clauses spell out (`demo.implied_label`);
- word problems: the value of its last computation (`arithmetic_steps.last_value`);
- multiple choice and NLI: every option that it names, word for word (`answer_rules.named`).

Labels are compared by the task's own rule for answers, so `( 8 - 3 )` and `5` agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ibdistill.data.answer_rules import contains_answer
from ibdistill.data.arithmetic import values_of
from ibdistill.data.arithmetic_steps import computations
from ibdistill.data.lettered_options import option_of, options
from ibdistill.data.records import Record
from ibdistill.data.tasks.registry import TASKS


def faithfulness(
    labels: Sequence[str], rationales: Sequence[str], records: Sequence[Record]
) -> dict[str, float]:
    """Scores of the answers to one task's records, as shares (0..1) of all answers unless said otherwise.

    - `implies`: the rationale implies some label;
    - `faithful`: it implies the label that the predict stream gave;
    - `agreement` of the streams: the same, as a share of the rationales that imply a label;
    - `rationale_accuracy`: it implies exactly one label, and that one is right;
    - `steps_right`: share of the checkable arithmetic steps that hold; `sound`: share of the
      rationales with such steps in which every one holds (both only where there are any);
    - `leakage`: the predicted label stands in the rationale, so that whoever reads the rationale need not
      infer it: a number by its value, wherever it stands (`= $18`, `2+1=3`), an option by its text though
      the label be a letter, any other label word for word; `reference_leakage`: the same of the ground
      truth and the reference rationale, as a share of the records that have one.

    The first four are there only for tasks with a rule for what a rationale implies.
    """
    n, task = len(records), TASKS[records[0].task]
    scores: dict[str, float] = {}
    if task.implied is not None:
        implied = [task.implied(text, record) for text, record in zip(rationales, records, strict=True)]
        faithful = sum(map(agrees, labels, implied, records))
        single = sum(
            len(own) == 1 and task.is_correct(own[0], r) for own, r in zip(implied, records, strict=True)
        )
        scores = {
            "implies": sum(map(bool, implied)) / n,
            "faithful": faithful / n,
            "agreement": faithful / max(1, sum(map(bool, implied))),
            "rationale_accuracy": single / n,
        }
    steps = [
        [c.holds for c in computations(text, values_of(record.quantities)) if c.holds is not None]
        for text, record in zip(rationales, records, strict=True)
    ]
    if task.arithmetic and any(steps):
        checked = [own for own in steps if own]
        scores["steps_right"] = sum(map(sum, checked)) / sum(map(len, checked))
        scores["sound"] = sum(map(all, checked)) / len(checked)
    scores["leakage"] = sum(map(leaks, rationales, labels, records)) / n
    explained = [leaks(r.rationale, r.gold, r) for r in records if r.rationale]
    if explained:
        scores["reference_leakage"] = sum(explained) / len(explained)
    return scores


def leaks(rationale: str, label: str, record: Record) -> bool:
    """Whether the rationale states the label."""
    return contains_answer(rationale, option_of(label, record) if options(record) else label)


def agrees(label: str, implied: Sequence[str], record: Record) -> bool:
    """Whether a label is among the implied ones, by the task's rule for answers."""
    is_correct = TASKS[record.task].is_correct
    return any(is_correct(label, replace(record, gold=other)) for other in implied)


def count_steps(rationale: str, record: Record) -> int:
    """The number of reasoning steps of a rationale: its computations with a result, or, where it has none,
    its clauses (what stands between ` . ` or sentence ends)."""
    done = [c for c in computations(rationale, values_of(record.quantities)) if "=" in c.text]
    return len(done) or len([part for part in re.split(r"[.!?](?:\s|$)", rationale) if part.strip()])
