"""The arithmetic of texts: steps with known values, and hostile text."""

from __future__ import annotations

from fractions import Fraction

import pytest

from ibdistill.data.arithmetic_steps import computations


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She sold 48/2 = 24 clips. Altogether 48+24 = 72.", [(24, True), (72, True)]),
        ("5 red apples + 3 apples = 9 apples and 3 * 2 = 6", [(9, False), (6, True)]),
        ("12 inches/foot * 2 feet = 24 inches", [(24, True)]),
        ("($5 + $3) x 2 = $16, so 1,200 / 4 = 300.", [(16, True), (300, True)]),
        ("(3 + 4 = 7)", [(7, True)]),
        ("2x3=6 and .5 + 3.5 = 4.0", [(6, True), (4, True)]),
        ("-3 + 5 = 2. Then = 7", [(2, True)]),
        ("5 + 3 = 8 = 10 - 2", [(8, True)]),
        ("3 + 4 = 7 - 2 = 5", [(5, False)]),  # a run-on: its sides differ
        ("the remaining is 8 - 3", [(5, None)]),
        ("20% of 50 = 10, 1/2 of 8 = 4", [(10, None), (4, None)]),
        ("1 1/2 + 2 = 3", [(3, None)]),  # a mixed number
        ("x * 4 = 12, (7/2)x = 105, 5 = 5", [(12, None), (5, None)]),
        ("3-4 days in 2010/11", []),
        ("5 apples\n- 3 eaten", []),
        ("15th of 3 + ", []),
        ("n0 - n1 = 5", [(5, True)]),
        ("n0 - n9 = 5", [(5, None)]),
        ("4 / 0 = 0", [(0, None)]),
        ("", []),
    ],
)
def test_computations_of_a_text(text, expected):
    names = {"n0": Fraction(8), "n1": Fraction(3)}
    assert [(c.value, c.holds) for c in computations(text, names)] == expected


def test_computations_of_hostile_text_end():
    (unfinished,) = computations("1 + " * 5000, {})
    assert unfinished.value is None and unfinished.holds is None
    for text in ("(" * 5000, "=" * 5000, "1,111" * 3000, "$ " * 5000 + "x" * 5000):
        assert computations(text, {}) == []
