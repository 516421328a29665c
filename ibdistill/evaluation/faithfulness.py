"""How good a student's rationales are: near the reference's text, and faithful to the student's own label.

Near (`text_scores`): BLEU and chrF (sacrebleu, 0..100), ROUGE-L and, on request, the cosine of
sentence embeddings. They compare wording; a rationale may be right and far from the reference.

Faithful (`faithfulness`): a rationale that leads to another answer than the one the student
gives explains nothing. Each task has a rule for the labels that a rationale *implies*:

- demo: the equation that its clauses spell out (`demo.implied_label`);
- word problems: the value of the last computation in it (`computations`);
- multiple choice and NLI: every option that it names, word for word.

Labels are compared by the task's own rule for answers, so `( 8 - 3 )` and `5` agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from sacrebleu.metrics import BLEU, CHRF

from ibdistill.data import answer_rules as answers
from ibdistill.data.arithmetic import evaluate
from ibdistill.data.tasks.demo import implied_label
from ibdistill.data.json_rows import NLI_LABELS
from ibdistill.data.records import Record
from ibdistill.data.loading import TASKS

_NUMBER = r"(?<![\d.])(?<![^\W\d_xX])\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_END = r"(?![.,]?\d)(?![^\WxX])(?![xX](?!\s*[$(\d]))"  # no further digit or letter, but `2x3` is a product
_PIECE = re.compile(
    rf"(?P<operand>{_NUMBER}{_END}|\bn\d+\b)"
    r"|(?P<sign>[-+*/()\u00d7\u00b7\u2217\u00f7\u2013\u2212]|(?<![^\W\d_])[xX](?=\s*[$(\d]))"
    r"|(?P<equals>=)|(?P<unreadable>%|of\b)|(?P<word>[^\W\d_]+)|(?P<other>\n|\S)"
)
_LONE_NUMBER = re.compile(r"[\s$(]*[-+]?[\s$]*[\d.,]+[\s)]*")
_MAX_UNIT_WORDS = 3


@dataclass(frozen=True)
class Computation:
    """`3 + 4 = 7` in a text, or an expression without a result."""

    text: str
    value: Fraction | None
    """Of its last side; None where that cannot be read."""
    holds: bool | None
    """Whether all sides are equal; None where there is nothing to check or a side cannot be read."""


def computations(text: str, names: Mapping[str, Fraction]) -> list[Computation]:
    """The arithmetic that a text does, in its order. `names` are the mapped numbers (`n0`, ...).

    Up to three words after a number are its unit: `5 red apples + 3 = 8 apples` is `5 + 3 = 8`.
    An expression without `=` counts if its operators stand between spaces, so that `3-4 days` is none. What
    `%` and `of` do is not read: the result still counts as a value, the step is not checked.
    """
    found = []
    for run, is_spaced in _runs(text):
        sides = [_balanced(side) for side in run.split("=")]
        if len(sides) == 1 and not is_spaced:
            continue
        values = [evaluate(side, names) for side in sides]
        computes = len(sides) > 1 and not _LONE_NUMBER.fullmatch(sides[0])
        readable = all(value is not None for value in values)
        holds = len(set(values)) == 1 if computes and readable else None
        found.append(Computation(run, values[-1], holds))
    return found


def _runs(text: str) -> Iterator[tuple[str, bool]]:
    """Maximal stretches of operands, signs and `=`, without the units, with at least two operands; and
    whether a sign stands between spaces.

    What is missing an operand that stands in the text in another form (a variable, `1 1/2`) begins with
    `%`, which nothing can evaluate.
    """
    run: list[str] = []
    kinds: list[str] = []
    words, previous, is_spaced = 0, "other", False

    def finished() -> Iterator[tuple[str, bool]]:
        while run and kinds[-1] in ("sign", "equals") and run[-1] != ")":
            run.pop(), kinds.pop()
        if kinds.count("operand") > 1:
            yield " ".join(run).removeprefix("= "), is_spaced
        run.clear(), kinds.clear()

    for match in _PIECE.finditer(text):
        kind, piece = match.lastgroup, match[0]
        if kind == "word" and len(piece) > 1 and run[-1:] == ["/"]:  # 12 inches/foot, $5/week
            run.pop(), kinds.pop()
        follows_value = bool(run) and (kinds[-1] in ("operand", "unreadable") or run[-1] == ")")
        if kind == "unreadable" and not (follows_value and words == 0):
            kind = "word"
        if kind == "word" and follows_value and words < _MAX_UNIT_WORDS and len(piece) > 1:
            words, previous = words + 1, kind
            continue
        if kind in ("word", "other"):
            yield from finished()
        elif kind == "operand" and follows_value and kinds[-1] != "unreadable":
            yield from finished()
            if words == 0:
                run.append("%"), kinds.append("unreadable")
        elif kind == "sign" and not run and previous == "word" and piece != "(":
            run.append("%"), kinds.append("unreadable")
        if not run:
            is_spaced = False
        if kind not in ("word", "other"):
            run.append(piece), kinds.append(kind)
            is_spaced |= kind == "sign" and text[match.start() - 1 : match.end() + 1] == f" {piece} "
        words, previous = 0, kind
    yield from finished()


def _balanced(side: str) -> str:
    """Without the parentheses around a whole equation, of which a side has one."""
    side = side.strip()
    while side.startswith("(") and side.count("(") > side.count(")"):
        side = side[1:].strip()
    while side.endswith(")") and side.count(")") > side.count("("):
        side = side[:-1].strip()
    return side


def _last_value(rationale: str, record: Record) -> list[str]:
    done = computations(rationale, _names(record))
    return [str(done[-1].value)] if done and done[-1].value is not None else []


def _spelled_equation(rationale: str, record: Record) -> list[str]:
    label = implied_label(rationale)
    return [] if label is None else [label]


def _named_options(rationale: str, record: Record) -> list[str]:
    return named(rationale, answers.options(record))


def _named_relations(rationale: str, record: Record) -> list[str]:
    return named(rationale, NLI_LABELS)


IMPLIED: dict[str, Callable[[str, Record], list[str]]] = {
    "demo": _spelled_equation,
    "demo_pretrain": _spelled_equation,
    "svamp": _last_value,
    "asdiv": _last_value,
    "gsm8k": _last_value,
    "cqa": _named_options,
    "esnli": _named_relations,
    "anli1": _named_relations,
    "anli2": _named_relations,
    "anli3": _named_relations,
}
"""Task -> the labels that a rationale implies. Tasks without an entry have no such rule."""


def named(text: str, options: Sequence[str]) -> list[str]:
    """The options that a text names word for word, whatever the case; not one within another (`bank` in
    `river bank`)."""
    found = [option for option in options if _contains(text, option)]
    return [o for o in found if not any(o != other and _contains(other, o) for other in found)]


def _contains(text: str, part: str) -> bool:
    words, wanted = ([w.strip(".,;:!?\"'") or w for w in t.casefold().split()] for t in (text, part))
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words)))


def _names(record: Record) -> dict[str, Fraction]:
    values = {f"n{i}": evaluate(text) for i, text in enumerate(record.quantities)}
    return {name: value for name, value in values.items() if value is not None}










def faithfulness(
    labels: Sequence[str], rationales: Sequence[str], records: Sequence[Record]
) -> dict[str, float]:
    """Of answers to one task, as shares (0..1) of all answers unless said otherwise.

    - `implies`: the rationale implies some label;
    - `faithful`: it implies the label that the predict stream gave;
    - `agreement` of the streams: the same, as a share of those that imply a label;
    - `rationale_accuracy`: it implies exactly one label, and that one is right;
    - `steps_right`: share of the checkable arithmetic steps that hold; `sound`: share of the
      rationales with such steps in which every one holds (both only where there are any);
    - `leakage`: the predicted label stands in the rationale word for word; `reference_leakage`: the
      same of the ground truth in the reference rationale, as a share of those that there are.

    The first four only for tasks in `IMPLIED`.
    """
    n, task = len(records), TASKS[records[0].task]
    scores: dict[str, float] = {}
    if task.name in IMPLIED:
        implied = [IMPLIED[task.name](text, record) for text, record in zip(rationales, records, strict=True)]
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
        [c.holds for c in computations(text, _names(record)) if c.holds is not None]
        for text, record in zip(rationales, records, strict=True)
    ]
    if task.arithmetic and any(steps):
        checked = [own for own in steps if own]
        scores["steps_right"] = sum(map(sum, checked)) / sum(map(len, checked))
        scores["sound"] = sum(map(all, checked)) / len(checked)
    scores["leakage"] = sum(map(_contains, rationales, labels)) / n
    explained = [r for r in records if r.rationale]
    if explained:
        scores["reference_leakage"] = sum(_contains(r.rationale, r.gold) for r in explained) / len(explained)
    return scores


def agrees(label: str, implied: Sequence[str], record: Record) -> bool:
    """Whether a label is among the implied ones, by the task's rule for answers."""
    is_correct = TASKS[record.task].is_correct
    return any(is_correct(label, replace(record, gold=other)) for other in implied)


def count_steps(rationale: str, record: Record) -> int:
    """Reasoning steps of a rationale: its computations with a result, or else its clauses (between ` . ` or
    sentence ends)."""
    done = [c for c in computations(rationale, _names(record)) if "=" in c.text]
    return len(done) or len([part for part in re.split(r"[.!?](?:\s|$)", rationale) if part.strip()])
