"""The arithmetic that a text does: `She sold 48/2 = 24 clips` computes 24, and the step holds.

The text may be a person's, an LLM's or a student's, so a computation is found by its form: operands, signs
and `=` that follow each other, perhaps with units between them. `arithmetic` evaluates its sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from ibdistill.data.arithmetic import evaluate, values_of
from ibdistill.data.records import Record

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
    """The value of its last side; None where that cannot be read."""
    holds: bool | None
    """Whether all sides are equal; None where there is nothing to check or a side cannot be read."""


def computations(text: str, names: Mapping[str, Fraction]) -> list[Computation]:
    """The arithmetic that a text does, in its order. `names` are the mapped numbers (`n0`, ...).

    Up to three words after a number are its unit: `5 red apples + 3 = 8 apples` is `5 + 3 = 8`.
    An expression without `=` counts if its operators stand between spaces, so that `3-4 days` is none.
    `%` and `of` are not computed with: the result still counts as a value, but the step is not checked.
    """
    found = []
    for run, is_spaced in _runs(text):
        sides = [balanced(side) for side in run.split("=")]
        if len(sides) == 1 and not is_spaced:
            continue
        values = [evaluate(side, names) for side in sides]
        computes = len(sides) > 1 and not _LONE_NUMBER.fullmatch(sides[0])
        readable = all(value is not None for value in values)
        holds = len(set(values)) == 1 if computes and readable else None
        found.append(Computation(run, values[-1], holds))
    return found


def last_value(rationale: str, record: Record) -> list[str]:
    """What a word problem's rationale implies: the value of its last computation; empty if that cannot be
    read or there is none."""
    done = computations(rationale, values_of(record.quantities))
    return [str(done[-1].value)] if done and done[-1].value is not None else []


def _runs(text: str) -> Iterator[tuple[str, bool]]:
    """Longest stretches of operands, signs and `=` with at least two operands, without the units; each with
    whether one of its signs stands between spaces.

    A stretch begins with `%`, which nothing can evaluate, where one of its operands stands in the text in a
    form that is not read (a variable, `1 1/2`).
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


def balanced(side: str) -> str:
    """The side without a parenthesis that its other half, on another side, would close: `(3 + 4 = 7)`."""
    side = side.strip()
    while side.startswith("(") and side.count("(") > side.count(")"):
        side = side[1:].strip()
    while side.endswith(")") and side.count(")") > side.count("("):
        side = side[:-1].strip()
    return side
