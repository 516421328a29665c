"""Each task's rule for a right answer, and what hostile text does to rules and parsers."""

import time
from dataclasses import replace

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
        ("jsonl", "8.0", "8", True),
        ("jsonl", "$1,200", "1200", True),
        ("jsonl", "\u22125", "-5.00", True),
        ("jsonl", "8 - 3", "5", False),
        ("jsonl", "1.2.3", "1.2", False),
        ("jsonl", "v2", "2", False),
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


def strict_and_lenient(task, prediction, rec):
    task = TASKS[task]
    return (task.is_strict or task.is_correct)(prediction, rec), task.is_lenient(prediction, rec)


@pytest.mark.parametrize(
    ("task", "prediction", "gold", "strict", "lenient"),
    [
        ("gsm8k", "1,200", "1200", True, True),
        ("gsm8k", "1200.0", "1200", False, True),
        ("gsm8k", "$1,200", "1200", False, True),
        ("gsm8k", "2 * 600", "1200", False, True),  # no official scorer takes an expression
        ("gsm8k", "8 apples", "8", True, True),
        ("gsm8k", "8.", "8", False, True),
        ("gsm8k", "#### 8", "8", False, True),
        ("gsm8k", "#### 4 #### 5", "5", False, False),
        ("gsm8k", "#### 4\n#### 5", "5", False, False),
        ("gsm8k", "#### 4\n#### 5", "4", False, False),
        ("gsm8k", "So the answer is: $8.", "8", False, True),
        ("gsm8k", "Answer: 8", "8", False, True),
        ("gsm8k", "8 or 9", "8", True, False),  # the official rule looks no further than the first number
        ("gsm8k", "-8", "8", False, False),
        ("gsm8k", "eight", "8", False, False),
        ("svamp", "( 8 - 3 )", "( 8.0 - 3.0 )", True, True),
        ("svamp", "5.0", "( 8.0 - 3.0 )", True, True),
        ("svamp", "8 - 3 = 5", "( 8.0 - 3.0 )", False, True),
        ("svamp", "5 apples", "( 8.0 - 3.0 )", False, True),
        ("svamp", "$5", "( 8.0 - 3.0 )", False, True),
        ("svamp", "3 - 8", "( 8.0 - 3.0 )", False, False),
        ("asdiv", "2 x 3", "6", False, True),
        ("asdiv", "1,200", "1200", False, True),
        ("esnli", "entailment", "entailment", True, True),
        ("esnli", "Entailment.", "entailment", False, True),
        ("esnli", "Answer: entailment", "entailment", False, True),
        ("anli1", "The answer is 'neutral'.", "neutral", False, True),
        ("anli1", "Answer: neutral. Answer: entailment", "neutral", False, False),
        ("anli1", "not entailment", "entailment", False, False),
        ("jsonl", "New York", "New York", True, True),
        ("jsonl", "new york", "New York", False, True),
        ("jsonl", "The answer is New York.", "New York", False, True),
        ("jsonl", "8 apples", "8", False, True),
        ("jsonl", "8 apples", "8 pears", False, False),
        ("esnli", "**entailment**.", "entailment", False, True),
        ("esnli", "**Answer:** neutral", "neutral", False, True),
        ("esnli", "**Answer: neutral**", "neutral", False, True),
        ("esnli", "**neutral** or **entailment**", "neutral", False, False),
        ("jsonl", r"The answer is $\boxed{New York}$.", "New York", False, True),
        ("jsonl", r"\boxed{8} or \boxed{9}", "8", False, False),
        ("jsonl", "**New York**", "**New York**", True, True),  # a label may be written like this
        ("jsonl", "Answer: x", "Answer: x", True, True),
        ("jsonl", "2**3", "23", False, False),
    ],
)
def test_strict_and_lenient_rules(task, prediction, gold, strict, lenient):
    assert strict_and_lenient(task, prediction, record(gold)) == (strict, lenient)


@pytest.mark.parametrize(
    ("prediction", "strict", "lenient"),
    [("dog", True, True), ("(b)", True, True), ("Dog.", False, True), ("(b) dog", False, True),
     ("b)", False, True), ("[b]", False, True), ("option b", False, True), ("Answer: B", False, True),
     ("The answer is (b) dog", False, True), ("b: dog", False, True), ("B. dog", False, True),
     ("Choice (b).", False, True), ("[b] dog.", False, True), ("**b**", False, True),
     ("letter b", False, True), ("b)dog", False, True), ("b - dog", False, True), (r"\boxed{b}", False, True),
     ("b)cat", False, False), ("a - dog", False, False), ("**a** or **b**", False, False),
     ("(b) cat", False, False), ("a)", False, False), ("option a", False, False), ("z)", False, False),
     ("b or a", False, False), ("Answer: b. Answer: a", False, False), ("dog cat", False, False),
     ("(a) dog", False, False), ("", False, False)],
)  # fmt: skip
def test_strict_and_lenient_rules_of_a_choice(prediction, strict, lenient):
    rec = record("dog", "Which?\nAnswer Choices:\n(a) cat\n(b) dog\n(c) a dog's bone")
    assert strict_and_lenient("cqa", prediction, rec) == (strict, lenient)


def test_the_user_s_own_check_of_answers():
    question = "Which?\n(a) 1/2\n(b) two"
    answers = ["0.5", "1/2", "(a)", "a)", "2 / 4", "half", "two"]

    def accepted(check, gold, rule):
        rec = replace(record(gold, question), answer_check=check)
        return [answer for answer in answers if getattr(TASKS["jsonl"], rule)(answer, rec)]

    assert accepted("text", "1/2", "is_correct") == ["1/2"]
    assert accepted("value", "1/2", "is_correct") == ["0.5", "1/2", "2 / 4"]
    assert accepted("choice", "1/2", "is_correct") == ["1/2", "(a)"]
    assert accepted("choice", "a", "is_correct") == ["1/2", "(a)"]
    assert accepted("choice", "1/2", "is_lenient") == ["1/2", "(a)", "a)"]
    assert accepted("choice", "half", "is_correct") == accepted("choice", "half", "is_lenient") == []
    assert accepted("value", "half", "is_correct") == []


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "text",
    ["__import__('os').system('x')", "9**9**9", "9" * 10**6, "(" * 100_000, "\x00", "\U0001f600", "", "a\nb"],
    ids=["import", "power", "digits", "parentheses", "nul", "emoji", "empty", "lines"],
)
def test_hostile_text_is_only_wrong(task, text):
    start = time.process_time()
    assert not TASKS[task].is_correct(text, record("5"))
    assert not TASKS[task].is_correct("5", record(text))
    if TASKS[task].parse_llm:
        assert TASKS[task].parse_llm(text) is None
    for rule in (TASKS[task].is_strict, TASKS[task].is_lenient):
        assert rule is None or not (rule(text, record("5")) or rule("5", record(text)))
    assert time.process_time() - start < 1


def test_a_text_names_answers_word_for_word():
    assert named("In a Bank, of course.", ["bank", "river bank", "ATM machine"]) == ["bank"]
    assert named("by the river bank", ["bank", "river bank"]) == ["river bank"]
    assert named("bankers do", ["bank"]) == []
    assert named("Money (in a \u201cbank\u201d) is safe", ["bank", "safe"]) == ["bank", "safe"]
