"""Exact value of an arithmetic expression: how the labels of word problems are compared.

Predictions are text from a model and data files are text from anywhere, so this is a
tokeniser and a recursive descent over five operators, not Python's `eval` (which the public
code of this field uses): nothing but arithmetic can run, `9**9**9` does not exist, and
length and nesting are bounded. Values are fractions, so `1 / 3 * 3` equals `1` and
`0.1 + 0.2` equals `0.3`, which floats deny.

    sum      = product { ("+" | "-") product }
    product  = factor { ("*" | "/") factor }
    factor   = { "+" | "-" } ( number | name | "(" sum ")" )
    equation = sum { "=" sum }

Spellings read as well: the multiplication sign, the middle dot, the asterisk operator and the
letter x for `*`, the division sign for `/`, the en dash and the minus sign for `-`, thousands
commas, and `$` in front of a number or of its sign. An equation, `8 - 3 = 5`, has the value of its sides
if they agree, and none if they do not. `%` is refused: `20 %` is 20 in one data set and
1/5 in another. So is `0x10`, which is 16 to some readers and 0 to others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType

MAX_LENGTH = 1000
MAX_DEPTH = 50  # each level takes three Python frames: far from the interpreter's limit

SPELLINGS = str.maketrans(
    {"\u00d7": "*", "\u00b7": "*", "\u2217": "*", "\u00f7": "/", "\u2013": "-", "\u2212": "-"}
)
_TOKEN = re.compile(
    r"\s*(?:\$\s?(?=[0-9.]))?(?:"
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    r"|(?P<times>[xX](?![A-Za-z_]))"
    r"|(?P<name>[A-Za-z_][A-Za-z_0-9]*)"
    r"|(?P<sign>[-+*/()=])"
    r")"
)
HEXADECIMAL = re.compile(r"(?<![\w.,])0[xX][0-9a-fA-F]")
_DOLLAR_SIGN = re.compile(r"(?:^|(?<=[-+*/(=]))(\s*)\$(?=[-+][0-9.])")
_NO_NAMES: Mapping[str, Fraction] = MappingProxyType({})


class _Refused(Exception):
    """The text is no expression of this grammar."""


def evaluate(text: str, names: Mapping[str, Fraction] = _NO_NAMES) -> Fraction | None:
    """The value of `text`, with `names` (such as `n0`) standing for numbers.

    None for everything else: other characters or names, trailing text, nothing at all, a
    division by zero, sides of an equation that differ, more than `MAX_LENGTH` characters
    or `MAX_DEPTH` nested parentheses. Never raises.
    """
    if len(text) > MAX_LENGTH or HEXADECIMAL.search(text):
        return None
    try:
        parser = _Parser(_tokens(_DOLLAR_SIGN.sub(r"\1", text.translate(SPELLINGS))), names)
        value = parser.sum(0)
        while parser.take("="):
            if parser.sum(0) != value:
                return None
        return value if parser.at_end() else None
    except (_Refused, ZeroDivisionError):
        return None


def values_of(quantities: Sequence[str]) -> dict[str, Fraction]:
    """The names `n0`, `n1`, ... of a record's quantities and their values; what has no value has no name."""
    values = {f"n{i}": evaluate(text) for i, text in enumerate(quantities)}
    return {name: value for name, value in values.items() if value is not None}


def _tokens(text: str) -> list[str | Fraction]:
    """Numbers as fractions, names and signs as text."""
    text = text.rstrip()
    tokens: list[str | Fraction] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _Refused
        if match["number"]:
            number = match["number"].replace(",", "")
            tokens.append(Fraction(number if "." in number else int(number)))  # reading text is slow
        else:
            tokens.append("*" if match["times"] else match["name"] or match["sign"])
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent over the tokens of one text; a method per rule of the grammar above."""

    def __init__(self, tokens: list[str | Fraction], names: Mapping[str, Fraction]):
        self.tokens = tokens
        self.names = names
        self.position = 0

    def at_end(self) -> bool:
        return self.position == len(self.tokens)

    def take(self, *signs: str) -> str:
        """The next token if it is one of `signs`, else an empty string."""
        token = None if self.at_end() else self.tokens[self.position]
        if not isinstance(token, str) or token not in signs:  # to compare a fraction with text is slow
            return ""
        self.position += 1
        return token

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while sign := self.take("+", "-"):
            term = self.product(depth)
            value = value + term if sign == "+" else value - term
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while sign := self.take("*", "/"):
            factor = self.factor(depth)
            value = value * factor if sign == "*" else value / factor
        return value

    def factor(self, depth: int) -> Fraction:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        value = self.atom(depth)
        return -value if negative else value

    def atom(self, depth: int) -> Fraction:
        if self.take("("):
            if depth == MAX_DEPTH:
                raise _Refused
            value = self.sum(depth + 1)
            if not self.take(")"):
                raise _Refused
            return value
        token = None if self.at_end() else self.tokens[self.position]
        self.position += 1
        if isinstance(token, Fraction):
            return token
        if token is None or token not in self.names:
            raise _Refused
        return self.names[token]
