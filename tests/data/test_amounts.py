"""The one amount of an answer, exactly; texts that state none or several; the numbers of a text."""

from __future__ import annotations

import random
import time
from fractions import Fraction

import pytest

from ibdistill.data.amounts import amount, amount_text, lone_number, numbers, written


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("\u22123.", "-3"), ("-$3", "-3"), ("$-3", "-3"), ("- $3", "-3"), ("is -5", "-5"), ("- 5", "-5"),
        ("= -5 dollars", "-5"), ("\u20ac3", "3"), ("3 \u20ac", "3"), ("\u22122.5 \u00b0C", "-2.5"),
        ("+5", "5"),
        (".5", "0.5"), ("-.5", "-0.5"), ("3/4", "0.75"), ("1/3 of it", "1/3"), ("0.50", "0.50"),
        ("1 1/2 cups", "1.5"), ("-1 1/2", "-1.5"), ("5.", "5"), ("$1,200.", "1,200"),
        ("1,234,567.25", "1,234,567.25"),
        ("10 - 4 = 6", "6"), ("$10 - $4 = $6", "6"), ("10-4=6", "6"), ("10 - 4", "6"), ("(8 - 3)", "5"),
        ("5 red apples + 3 apples = 8 apples", "8"), ("x = 6", "6"), ("2 x 3 = 6", "6"), ("0.5 = 1/2", "0.5"),
        ("1.5 million", "1500000"), ("2 hundred thousand people", "200000"), ("5 dozen eggs", "60"),
        ("8 apples", "8"), ("5kg", "5"), ("20%", "20"), ("9 m\u00b2", "9"), ("**8**.", "8"),
        ("(5 apples)", "5"),
        ("5 for each one", "5"), ("the 3rd", "3"),
        # words of bounds that bound nothing here
        ("5 more apples", "5"), ("3 less than before", "3"), ("5 more", "5"), ("only 5", "5"),
        ("exactly 5", "5"),
        ("equal to 5", "5"), ("5 students about to leave", "5"), ("5 left over", "5"),
        ("the total of 5", "5"),
        ("what is left over is 5", "5"), ("5 apples under the tree", "5"), ("a notable 5", "5"),
    ],
)  # fmt: skip
def test_the_amount_of_a_whole_answer(text, label):
    assert amount_text(text) == label
    assert amount(text) == Fraction(label.replace(",", ""))


@pytest.mark.parametrize(
    "text",
    [
        "", "two", "nothing", "3 or 4", "3-4 days", "3\u20134", "3 \u2013 4", "-5 to 3", "5:30",
        "10/11/2020", "5'6",
        "2\u00bd", "8 and a half", "five 5", "5 (five)", "5 million and 3", "10 - 4 = 7", "20% * 50 = 10",
        "1,20",
        "1.2.3", "~5", "<5", "\u00b15", "5k", "$5M", "5bn", "1e5", "10^5", "2**3", "10\u00b2", "5x", "5+",
        "A5", "n0",
        "5 of 10", "sum is - 5", "\u0663", "$", "#### 4 #### 5", "2 hours and 20 minutes", "double 4",
        "5x = 5", "5, million",
        "1 / 0",
        "less than 5", "more than 3", "at least 2", "about 7", "fewer than 5 apples", "greater than $5",
        "less than or equal to 5", "at most 5", "no more than 5", "up to 5", "around 5", "approximately 5",
        "5 approximately", "approx. 5", "roughly 5", "nearly 5", "almost 5", "over 5", "under 5", "above 5",
        "It is about 7 km.", "a maximum of 5", "at least the 5", "as many as 5", "close to 5", "some 5",
        "About 7", "MORE THAN 3", "more than **3**", "more than (3)", "less than -5", "not 5", "other than 5",
        "5 or more", "5 apples or less", "5 or so", "5 and up", "5 at most", "5ish",
        "5-ish", "5 or thereabouts", "5, give or take", "more than 1.5 million", "at least 5 + 3 = 8",
        "minus 3", "negative 5", "-5 squared", "square root of 9", "5 lakh", "0x10", "It is 0X1f.", "$0x5",
    ],
)  # fmt: skip
def test_what_states_no_single_amount(text):
    assert amount(text) is None and amount_text(text) is None


def test_hostile_text_costs_nothing():
    rng = random.Random(0)
    start = time.process_time()
    texts = [
        "(" * 10**6,
        "5" * 10**6,
        "5 " * 499,
        "- " * 499 + "5",
        "$" * 999,
        "5" + " x" * 400,
        "**" * 400,
        "a-" * 499,
    ]
    for text in texts + [t[:1000] for t in texts]:
        amount(text), numbers(text), lone_number(text)
    for _ in range(5000):
        text = "".join(
            rng.choice("0123456789.,+-*/()= $xn%\u00bd\u2013ak\x00#") for _ in range(rng.randrange(14))
        )
        value = amount(text)
        assert value is None or amount(amount_text(text)) == value, text
    assert time.process_time() - start < 5


def test_values_as_text():
    values = [Fraction(6), Fraction(-3, 2), Fraction(1, 3), Fraction(-1, 8), Fraction(0), Fraction(7, 100)]
    assert [written(value) for value in values] == ["6", "-1.5", "1/3", "-0.125", "0", "0.07"]
    assert all(Fraction(written(value)) == value for value in values)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2+1=3", [2, 1, 3]),
        ("= $18.", [18]),
        ("10-4 is 6, 10 -4", [10, 4, 6, 10, 4]),
        ("= -4 or \u22122.5 or ($-3) or -$7", [-4, -2.5, -3, -7]),
        ("448,000 and 18.00 and .5", [448000, 18, 0.5]),
        ("5kg, 20%, 48/2", [5, 20, 48, 2]),
        ("(3,4)", [3, 4]),
        ("n0 v2 x", []),
    ],
)
def test_numbers_of_a_text(text, found):
    assert numbers(text) == found


@pytest.mark.parametrize(
    ("text", "value"),
    [("8", 8), (" -8.0 ", -8), ("$1,200", 1200), ("\u22128", -8), ("8 apples", None), ("2 * 4", None),
     ("", None), ("-", None), ("1.2.3", None), ("8.", 8), (".5", 0.5), ("1,20", None), ("x", None),
     ("n0", None)],
)  # fmt: skip
def test_a_text_that_is_one_number(text, value):
    assert lone_number(text) == value
