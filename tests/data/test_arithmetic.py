"""The evaluator: exact values, its small extras, and hostile text that must cost nothing."""

import random
import time
from fractions import Fraction

import pytest

from ibdistill.data.arithmetic import MAX_DEPTH, MAX_LENGTH, evaluate

NAMES = {"n0": Fraction(76), "n1": Fraction(51, 2)}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(8 - 3)", 5),
        ("( 76.0 - 25.0 )", 51),
        ("8 - 3 * 2", 2),
        ("( 8 - 3 ) * 2", 10),
        ("8 - 3 - 2", 3),
        ("16 / 4 / 2", 2),
        ("1 / 3 * 3", 1),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("-5", -5),
        ("3 - -2", 5),
        ("--+5", 5),
        ("2 * -(1 + 1)", -4),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("007", 7),
        ("1,200", 1200),
        ("1,234,567.25", Fraction(4938269, 4)),
        ("$1,200", 1200),
        ("$ 3 + $4", 7),
        ("$-5", -5),
        ("-$5", -5),
        ("8 - $-3", 11),
        ("($-.5)", Fraction(-1, 2)),
        ("2 \u00d7 3", 6),
        ("2 x 3", 6),
        ("2x3", 6),
        ("0 x 10", 0),
        ("10x10", 100),
        ("1.0x3", 3),
        ("6 \u00f7 4", Fraction(3, 2)),
        ("8 \u2212 3", 5),
        ("8 - 3 = 5", 5),
        ("2 + 2 = 4 = 8 / 2", 4),
        ("n0 - n1", Fraction(101, 2)),
        (" \n( n0 )\t", 76),
        ("n0 x n1", 1938),
    ],
)
def test_value(text, value):
    assert evaluate(text, NAMES) == value


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "()", "(", ")", "5 5", "5)", "(5", "5 +", "* 5", "1 / 0", "1 / (2 - 2)", "2 ** 3", "7 // 2",
        "9**9**9", "1,20", "1,2000", "1.2.3", "1e5", "5 apples", "n2", "N0", "20%", "2(3)", "= 5", "5 =",
        "8 - 3 = 6", "5,", "$", "5 $-3", "$--5", "$n0", "5 $", "nan", "inf", "1_000", "\u0663", "5\x00",
        "\U0001f600", "x", "0x10", "0X20", "2 + 0x1F", "(0x5)",
        "__import__('os').system('x')", "lambda: 1", "1 if 1 else 2", "[1]", "'5'", "1; 2", "5 # a", "5j",
    ],
)  # fmt: skip
def test_refused(text):
    assert evaluate(text, NAMES) is None


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000,
        "(" * 100_000 + "1" + ")" * 100_000,
        "9" * 10**6,
        "-" * 10**6 + "1",
        "9*" * 10**6 + "9",
        " " * 10**6,
        "(" * (MAX_LENGTH - 1),
        "9" * (MAX_LENGTH + 1),
    ],
)
def test_hostile_text_is_refused_at_once(text):
    start = time.process_time()
    assert evaluate(text) is None
    assert time.process_time() - start < 0.5


def test_bounds():
    assert evaluate("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH) == 1
    assert evaluate("(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1)) is None
    assert evaluate("-" * (MAX_LENGTH - 1) + "1") == -1
    assert evaluate("9" * MAX_LENGTH) == 10**MAX_LENGTH - 1


def test_random_expressions_agree_with_fractions():
    rng = random.Random(0)
    nones = 0
    for _ in range(3000):
        text, value = _expression(rng, rng.randrange(6))
        assert evaluate(text, NAMES) == value, text
        nones += value is None
    assert 0 < nones < 1500  # divisions by zero do occur, and are not all there is


def test_random_text_never_raises():
    rng = random.Random(1)
    for _ in range(20000):
        evaluate(
            "".join(rng.choice("0123456789.,+-*/()= $xn%\u00d7\x00") for _ in range(rng.randrange(12))), NAMES
        )


def _expression(rng: random.Random, depth: int) -> tuple[str, Fraction | None]:
    """A random expression, fully parenthesised, and its value by Fraction's own operators."""
    if depth == 0:
        if rng.random() < 0.2:
            name = rng.choice(list(NAMES))
            return name, NAMES[name]
        text = rng.choice([str(rng.randrange(4)), f"{rng.randrange(100)}.{rng.randrange(100):02}"])
        return text, Fraction(text)
    (left, a), (right, b) = _expression(rng, depth - 1), _expression(rng, rng.randrange(depth))
    operator = rng.choice("+-*/")
    text = f"({left}){operator} ({right})"
    if rng.random() < 0.2:
        text, negative = f"-({text})", -1
    else:
        negative = 1
    if a is None or b is None or (operator == "/" and b == 0):
        return text, None
    return text, negative * {"+": a + b, "-": a - b, "*": a * b, "/": a / (b or 1)}[operator]
