"""A record: one question with its label and its rationale, the unit that every task yields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

STREAMS = ("predict", "explain")
"""The two streams of Distilling Step-by-Step."""
SEGMENTS = {"predict": ("predict",), "explain": ("explain",), "reason": ("rationale", "answer")}
"""Stream, a kind of row -> the segments of its target, in order. Each segment has losses of its own."""
# The lookahead keeps a number whole: without it `2.5kg` would match as `2`.
_NUMBER = re.compile(r"(?<![\w.])[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?!\w|\.[0-9]|,[0-9]{3}(?![0-9]))")


def segments_of(streams: Iterable[str]) -> list[str]:
    """The segments of these streams, in order."""
    return [segment for stream in streams for segment in SEGMENTS[stream]]


@dataclass(frozen=True, slots=True)
class Record:
    """One question and what the student should answer in each stream."""

    id: str
    """Unique within a run, for example `svamp/train/17`."""
    task: str
    """Name of the task that reads, and later scores, this record."""
    question: str
    """The text that follows the stream's prefix; both streams see the same question."""
    label: str
    """Target of the predict stream (ground truth or the LLM's, see `data.label_source`)."""
    rationale: str
    """Target of the explain stream; empty where the source has none."""
    gold: str
    """The ground-truth label. Predictions are scored against it, whatever `label` is."""
    quantities: tuple[str, ...] = ()
    """With mapped numbers: the i-th quantity of the question, written `n<i>` in every text."""
    answer_check: str = "text"
    """The rule for answers that `data.answer_check` names, for tasks that leave it to the user."""
    history: tuple[tuple[str, str, str], ...] = ()
    """The turns of a conversation before the question, in order: (role, text, rationale). Roles are system,
    which comes first, user and assistant; only the assistant's turns may have a rationale."""
    rationales: tuple[str, ...] = ()
    """All rationales of a record that has several, `rationale` among them."""
    sample_of: str = ""
    """The name of the question that this record is one sample of; empty for most, which are the only one."""


def map_numbers(record: Record) -> Record:
    """Replace the i-th distinct number of the question by `n<i>` in question, label, rationale and gold.

    Common practice for word problems (MAWPS, SVAMP): a small model need not spell numbers.
    Numbers are matched by value, so `76` finds `76.0` of SVAMP's equations. A number that
    the question does not contain stays as it is. The originals stay in `quantities`, with
    which an answer is evaluated (`answer_rules.same_value`).
    """
    slots: dict[str, str] = {}
    quantities: list[str] = []
    for match in _NUMBER.finditer(record.question):
        if _canonical(match[0]) not in slots:
            slots[_canonical(match[0])] = f"n{len(quantities)}"
            quantities.append(_canonical(match[0]))

    def mapped(text: str) -> str:
        return _NUMBER.sub(lambda match: slots.get(_canonical(match[0]), match[0]), text)

    return replace(
        record,
        question=mapped(record.question),
        label=mapped(record.label),
        rationale=mapped(record.rationale),
        gold=mapped(record.gold),
        quantities=tuple(quantities),
    )


def with_numbers(text: str, quantities: Sequence[str]) -> str:
    """The text with the question's numbers in the place of `n0`, `n1` and so on."""
    return re.sub(
        r"\bn([0-9]+)\b", lambda m: quantities[int(m[1])] if int(m[1]) < len(quantities) else m[0], text
    )


def _canonical(number: str) -> str:
    """`1,200.50` -> `1200.5`, `76.0` -> `76`, `007` -> `7`."""
    whole, _, decimals = number.replace(",", "").partition(".")
    return (whole.lstrip("0") or "0") + (f".{decimals.rstrip('0')}" if decimals.strip("0") else "")
