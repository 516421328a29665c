"""The one amount that an answer states, and the numbers that stand in a text.

`-$3.50`, `8 red apples`, `1.5 million` and `10 - 4 = 6 apples` state one amount each. A text with anything
number-like beside its amount (`3 or 4`, `3-4 days`, `5:30`, `2½`, `8 and a half`) states none: a part of an
answer is another answer. Nor does one whose number is a bound, a guess or denied (`less than 5`, `5 or more`,
`about 7`, `not 5`).
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from ibdistill.data.arithmetic import HEXADECIMAL, MAX_LENGTH, SPELLINGS, evaluate
from ibdistill.data.arithmetic_steps import balanced

_SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_NUMBER_WORDS = {
    *("zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen").split(),
    *("sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety").split(),
    *("half halves third thirds double twice triple thrice").split(),
    *("minus negative squared cubed root lakh crore").split(),
    *(word + ending for word in _SCALES for ending in ("", "s")),
}  # `one` is left out: it is a pronoun, too
_SHORT_SCALES = {"k", "K", "M", "B", "G", "bn", "mn", "mln", "mio", "x", "X", "e", "E"}
"""What makes another number of the number before it, or might."""
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_CURRENCY = re.compile(r"(?:([-+])\s?)?\\?[$\u20ac\u00a3\u00a5]\s?([-+]?)")
_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_TIMES = re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])")
_CORE = re.compile(r"[-+]?\s*(?:\(\s*)*[-+]?\s*\.?[0-9](?:.*[0-9])?(?:\s*\))*", re.DOTALL)
_LONE = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
_MIXED = re.compile(r"([-+]?)([0-9]+) ([0-9]+/[0-9]+)")
_RANGE_OR_DATE = re.compile(r"[0-9]\s*-[0-9]|[0-9]-\s*[0-9]|[0-9]/[0-9]+/[0-9]")
_INEXACT = re.compile(r"[<>~\u2248\u2264\u2265\u00b1^]")
_HEDGED = re.compile(
    r"\b(?:than(?: or equal to)?|at (?:the )?(?:least|most|minimum|maximum|best|worst)"
    r"|(?:minimum|maximum|upwards?|excess|order|range|vicinity) of|as (?:many|much|few|little) as"
    r"|up to|close to|next to|about|around|above|below|beyond|over|under|near|nearly|almost|some|circa|ca|est"
    r"|exceed(?:s|ing)?|estimated|not|isn['\u2019]t|within)\b[\s.:,(\"']*(?:(?:an?|the|just|only)\s+)?$",
    re.IGNORECASE,
)
"""How a text ends before a number that is a bound, a guess or denied: `less than 5` is no 5."""
_HEDGED_AFTER = re.compile(
    r"\b(?:or|and) (?:so|up|over|under|above|below|beyond)\b"
    r"|\b(?:or|and) (?:any )?(?:more|less|fewer|greater|higher|lower)\b"
    r"|\bat (?:the )?(?:least|most|minimum|maximum)\b|\bor thereabouts\b|\bgive or take\b|^-?ish\b",
    re.IGNORECASE,
)
_ROUGHLY = re.compile(r"\b(?:approx|approximate|approximately|roughly)\b", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?<![\d.])(?<![^\W\d_xX])(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def amount(text: str) -> Fraction | None:
    """The exact value of the amount that a text states; None where it states none or more than one.

    Words before and after a number are its unit, `%` and signs of currencies included. An equation counts if
    its sides agree. Never raises.
    """
    parts = _parts(text)
    if parts is None:
        return None
    core, scale = parts
    if mixed := _MIXED.fullmatch(core):
        core = f"{mixed[1]}({mixed[2]} + {mixed[3]})"
    value = evaluate(core)
    return None if value is None else value * scale


def amount_text(text: str) -> str | None:
    """The amount as a label: the number as it stands (`1,200`, `-3.5`), anything else as its value."""
    value = amount(text)
    if value is None:
        return None
    core, scale = _parts(text)
    return core.removeprefix("+") if scale == 1 and _LONE.fullmatch(core) else written(value)


def written(value: Fraction) -> str:
    """A value as text: `6`, `1.5`, and `1/3` where it has no end as a decimal."""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    places = 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest, count = rest // prime, count + 1
        places = max(places, count)
    if rest > 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' * (value < 0)}{digits[:-places]}.{digits[-places:]}"


def lone_number(text: str) -> Fraction | None:
    """The value of a text that is one number, perhaps with sign, `$` and thousands commas; else None."""
    text = text.strip().translate(SPELLINGS)
    return (
        evaluate(text) if re.fullmatch(r"[-+]?\s?\$?\s?[-+]?[0-9][0-9,.]*|[-+]?\$?\.[0-9]+", text) else None
    )


def numbers(text: str) -> list[Fraction]:
    """The values of all numbers in a text: `2+1=3` has 2, 1 and 3.

    A sign belongs to its number unless it stands behind an operand or a letter: `10-4` has 10 and 4, `= -4`
    has -4.
    """
    text = text.translate(SPELLINGS)
    found = []
    for match in _NUMBER.finditer(text):
        value = evaluate(match[0])
        if value is not None:
            before = text[max(0, match.start() - 20) : match.start()].removesuffix("$")
            is_negative = before.endswith("-") and not re.search(r"(?:[\d)%]\s*|[^\W\d_])-$", before)
            found.append(-value if is_negative else value)
    return found


def _parts(text: str) -> tuple[str, int] | None:
    """The arithmetic of a text without its units, and what its value is multiplied with (`million`); None
    where the text is no single amount."""
    if len(text) > MAX_LENGTH or re.search("[0-9]\\s*\u2013\\s*[0-9]", text):
        return None
    if _INEXACT.search(text) or HEXADECIMAL.search(text):
        return None
    text = _BOLD.sub(r" \1 ", text.translate(SPELLINGS))
    text = _TIMES.sub(" * ", _CURRENCY.sub(r" \1\2", text).strip())
    match = _CORE.search(text)  # from the first digit to the last, with signs and parentheses around them
    if match is None:
        return None
    core, after = match[0].strip(), text[match.end() :]
    before = text[: match.end() - len(match[0].lstrip())]
    behind, scale = _WORD.findall(after), 1
    while re.match(r"\s*[a-zA-Z]", after) and behind and behind[0].lower() in _SCALES:
        scale *= _SCALES[behind.pop(0).lower()]
    inside: list[str] = []
    if "=" in core:  # units may stand anywhere, as the sides have to agree without them
        inside = _WORD.findall(core)
        core = " = ".join(balanced(side) for side in _WORD.sub(" ", core).replace("%", " ").split("="))
    elif _RANGE_OR_DATE.search(core):
        return None
    core = balanced(core)
    if _HEDGED.search(before) or _HEDGED_AFTER.search(after) or _ROUGHLY.search(before + after):
        return None
    glued = bool(before) and (before[-1].isalnum() or before[-1] == "\u2014")
    dash = core[0] in "+-" and core[1] == " " and before.strip(" *(:=")  # `the sum - 5` is no -5
    goes_on = re.match(r"\s*[-+*/=:_]", after)
    if glued or dash or goes_on or (scale > 1 and not _LONE.fullmatch(core)):
        return None
    if _SHORT_SCALES & {*inside, *behind[:1]}:
        return None
    words = {part for word in behind + inside + _WORD.findall(before) for part in word.lower().split("-")}
    others = before + re.sub("(?<=[a-z])[\u00b2\u00b3]", "", after)  # the square of a unit is no number
    if words & _NUMBER_WORDS or any(unicodedata.numeric(sign, None) is not None for sign in others):
        return None
    return core, scale
