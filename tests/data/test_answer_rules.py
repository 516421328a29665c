"""LLM text to rationale and label, and each task's rule for a right answer."""

import time

import pytest

from ibdistill.data.loading import TASKS
from ibdistill.data.records import Record, map_numbers

NEXT = "\n\nQ: Tom has 2 dogs. How many?\nA: He has 2. The answer is (2)."
REASON = "He had 8 and gave 3 away."


def record(gold, question="q", quantities=()):
    return Record("t/test/0", "t", question, gold, "", gold=gold, quantities=quantities)


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("svamp", f" {REASON} The answer is (8 - 3).", (REASON, "(8 - 3)")),
        ("svamp", f"{REASON} The answer is (8 - 3).{NEXT}", (REASON, "(8 - 3)")),
        ("svamp", f"{REASON}\nThe answer is ((8 - 3) * 2) = 10 dollars.", (REASON, "((8 - 3) * 2)")),
        ("svamp", f"{REASON} The answer is (8 - 3) * (2).", (REASON, "(8 - 3) * (2)")),
        ("svamp", "\u00e9 \U0001f600 The answer is (8 \u2212 3).", ("\u00e9 \U0001f600", "(8 \u2212 3)")),
        ("asdiv", f"{REASON} The answer is (8 - 3).", (REASON, "(8 - 3)")),
        ("svamp", REASON, None),  # no marker
        ("svamp", f"{REASON} The answer is 5.", None),  # no equation
        ("svamp", f"{REASON} The answer is (8 - x).", None),
        ("svamp", f"{REASON} The answer is (8) apples (red).", None),
        ("svamp", f"{REASON} The answer is (5). The answer is (6).", None),
        ("svamp", "The answer is (8 - 3).", None),  # no rationale
        ("svamp", f"{REASON} The answer is", None),
        ("svamp", "Q: again The answer is (1).", None),
        ("svamp", "", None),
        ("svamp", "\x00", None),
        ("svamp", f"{REASON} The answer is (__import__('os').system('x')).", None),
        ("svamp", f"{REASON} The answer is {'(' * 100_000}", None),
        ("cqa", "Money is kept there. So the answer is (b) bank.", ("Money is kept there.", "bank")),
        ("cqa", "Money. So the answer is (b) bank.\n\nQ: Why?\nSo the answer is (a) x.", ("Money.", "bank")),
        ("cqa", "Money. So the answer is (b) bank, or (c) safe.", ("Money.", "bank, or")),  # as the release
        ("cqa", "Money. So the answer is (b) bank.\nThat is all.", ("Money.", "bank")),
        ("cqa", "Money. So the answer is bank.", None),
        ("cqa", "Money. So the answer is (b).", None),
        ("cqa", "Money. So the answer is (b) x. So the answer is (c) y.", None),
        ("cqa", "Money. The answer is (b) bank.", None),
        ("cqa", "", None),
        ("esnli", "A dog is an animal. Answer: entailment", ("A dog is an animal.", "entailment")),
        ("esnli", "A dog.\nAnswer: Neutral.\nPremise: x\nAnswer: entailment", ("A dog.", "neutral")),
        ("esnli", "A dog. Answer: contradiction because", ("A dog.", "contradiction")),
        ("esnli", "A dog. Answer: it is not possible to tell", None),
        ("esnli", "A dog. Answer: entailments", None),
        ("esnli", "Answer: entailment", None),
        ("esnli", "A dog.", None),
        ("anli1", "No year. So the answer is neutral.", ("No year.", "neutral")),
        ("anli2", "No year. The answer is Neutral", ("No year.", "neutral")),
        ("anli3", "The answer is odd. So the answer is neutral. Premise:", ("The answer is odd.", "neutral")),
        ("anli1", "No year. So the answer is yes.", None),
        ("anli1", "Premise: x So the answer is neutral.", None),
        ("gsm8k", "24 + 48 = 72. The answer is $1,200.", ("24 + 48 = 72.", "1,200")),
        ("gsm8k", "24 + 48 = 72.\n#### 72", ("24 + 48 = 72.", "72")),
        ("gsm8k", "Cold. So the answer is -3.5 degrees.", ("Cold.", "-3.5")),
        ("gsm8k", "Cold. The answer is nothing.", None),
    ],
)  # fmt: skip
def test_parse_llm(task, text, expected):
    assert TASKS[task].parse_llm(text) == expected


@pytest.mark.parametrize(
    ("task", "prediction", "gold", "right"),
    [
        ("svamp", "( 8 - 3 )", "( 8.0 - 3.0 )", True),
        ("svamp", "5", "( 8.0 - 3.0 )", True),
        ("svamp", "( 3 - 8 )", "( 8.0 - 3.0 )", False),
        ("svamp", "( 8 - 3", "( 8.0 - 3.0 )", False),
        ("svamp", "?", "?", False),  # equal, but neither has a value
        ("svamp", "", "", False),
        ("svamp", "1 / 0", "1 / 0", False),
        ("asdiv", "(7 + 2)", "9", True),
        ("gsm8k", "$1,200", "1200", True),
        ("gsm8k", "1200.0", "1,200", True),
        ("gsm8k", "1,200 dollars", "1200", False),
        ("demo_pretrain", "<extra_id_0> two  hats", "<extra_id_0> two hats", True),
        ("demo_pretrain", "<extra_id_0> three hats", "<extra_id_0> two hats", False),
        ("demo_pretrain", "2 + 1", "3", True),
        ("demo_pretrain", "2 + 2", "3", False),
        ("esnli", " Entailment. ", "entailment", True),
        ("esnli", "neutral", "entailment", False),
        ("anli1", "'neutral'", "neutral", True),
        ("jsonl", "\u201cNew  York\u201d!", "new york", True),
        ("jsonl", "-5", "5", False),
        ("jsonl", "?", "!", False),
        ("jsonl", "", "x", False),
        ("jsonl", "C", "C++", False),
    ],
)
def test_is_correct(task, prediction, gold, right):
    assert TASKS[task].is_correct(prediction, record(gold)) is right


@pytest.mark.parametrize("task", ["svamp", "demo", "demo_pretrain"])
def test_is_correct_with_mapped_numbers(task):
    is_correct = TASKS[task].is_correct
    mapped = map_numbers(record("( 76.0 - 25.0 )", "It costs 76, 25 off"))
    assert mapped.gold == "( n0 - n1 )"
    assert is_correct("n0 - n1", mapped) and is_correct("51", mapped) and is_correct("n0-25", mapped)
    assert not is_correct("n1 - n0", mapped)
    assert not is_correct("n0 - n2", mapped)


def test_a_quantity_too_long_to_read_is_left_out():
    rec = record("n1", quantities=("9" * 10_000, "2"))
    assert TASKS["svamp"].is_correct("2", rec)
    assert not TASKS["svamp"].is_correct("n0", rec)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [("bank", True), ("Bank.", True), ("(b) bank", True), ("(b)", True), ("b", True), ("B.", True),
     ("(a) bank", False), ("(a)", False), ("safe", False), ("a", False), ("(c)", False), ("", False)],
)  # fmt: skip
def test_is_correct_of_a_choice(prediction, right):
    question = "Where?\nAnswer Choices:\n(a) safe\n(b) bank"
    assert TASKS["cqa"].is_correct(prediction, record("bank", question)) is right


def test_an_option_that_is_a_letter_means_itself():
    question = "First letter?\nAnswer Choices:\n(a) b\n(b) a"
    assert TASKS["cqa"].is_correct("a", record("a", question))
    assert not TASKS["cqa"].is_correct("b", record("a", question))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "text",
    ["__import__('os').system('x')", "9**9**9", "9" * 10**6, "(" * 100_000, "\x00", "\U0001f600", "", "a\nb"],
    ids=["import", "power", "digits", "parentheses", "nul", "emoji", "empty", "lines"],
)
def test_hostile_text_is_only_wrong(task, text):
    start = time.perf_counter()
    assert not TASKS[task].is_correct(text, record("5"))
    assert not TASKS[task].is_correct("5", record(text))
    if TASKS[task].parse_llm:
        assert TASKS[task].parse_llm(text) is None
    assert time.perf_counter() - start < 1
