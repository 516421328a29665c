"""Each task's rule for a right answer, and what hostile text does to rules and parsers."""

import time

import pytest

from ibdistill.data.answer_rules import named
from ibdistill.data.records import Record, map_numbers
from ibdistill.data.tasks.registry import TASKS


def record(gold, question="q", quantities=()):
    return Record("t/test/0", "t", question, gold, "", gold=gold, quantities=quantities)


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


def test_a_text_names_answers_word_for_word():
    assert named("In a Bank, of course.", ["bank", "river bank", "ATM machine"]) == ["bank"]
    assert named("by the river bank", ["bank", "river bank"]) == ["river bank"]
    assert named("bankers do", ["bank"]) == []
