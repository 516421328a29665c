"""Faithfulness: rationales with known answers, and GSM8K's own."""

from __future__ import annotations

import re

import pytest
from miniatures import DATA, loaded, real_data

from ibdistill.data.answer_rules import contains_words
from ibdistill.data.records import Record
from ibdistill.evaluation import faithfulness


def record(task: str, gold: str, question: str = "?", quantities=(), rationale="") -> Record:
    return Record(f"{task}/test/0", task, question, gold, rationale, gold, quantities)


@real_data
def test_gsm8k_s_own_rationales_are_sound_and_faithful():
    """People wrote and checked them, so nearly all steps must hold and imply the label."""
    records = loaded("gsm8k", DATA / "gsm8k").test["gsm8k"]
    scores = faithfulness.faithfulness([r.gold for r in records], [r.rationale for r in records], records)
    assert scores["steps_right"] > 0.995 and scores["sound"] > 0.99
    assert scores["implies"] > 0.95 and scores["agreement"] > 0.95
    wrong = faithfulness.faithfulness(
        [r.gold + "1" for r in records], [r.rationale for r in records], records
    )
    assert wrong["faithful"] < 0.02 and wrong["rationale_accuracy"] == scores["rationale_accuracy"]


@real_data
def test_nearly_all_of_gsm8k_s_rationales_state_the_answer():
    """The last line of a solution computes the answer; the few others have it in cents, in percent or with
    its thousands apart."""
    records = loaded("gsm8k", DATA / "gsm8k").test["gsm8k"]
    assert len(records) == 1319
    scores = faithfulness.faithfulness([r.gold for r in records], [r.rationale for r in records], records)
    stated = [r for r in records if faithfulness.leaks(r.rationale, r.gold, r)]
    assert len(stated) == 1314 and scores["reference_leakage"] == scores["leakage"] == 1314 / 1319
    # By whitespace words alone it would be 780; with the commas left out, 1282 have the label's very digits.
    assert sum(contains_words(r.rationale, r.gold) for r in records) == 780
    digits = [r"(?<![\d.])" + r.gold.replace(",", "") + r"(?!\d|\.\d)" for r in records]
    found = [re.search(d, r.rationale.replace(",", "")) for d, r in zip(digits, records, strict=True)]
    assert sum(map(bool, found)) == 1282
    assert sum(faithfulness.leaks(r.rationale, r.gold + "1", r) for r in records) < 30


@pytest.mark.parametrize(
    ("rationale", "label", "expected"),
    [
        ("She makes 9 * 2 = $18 a day.", "18", True),
        ("2+1=3", "3", True),
        ("That is 1,800.00 in all", "1800", True),
        ("It is -4.", "-4", True),
        ("10-4 remain", "-4", False),
        ("It is -4.", "4", False),
        ("It is 18.5 or 118 or 1,018", "18", False),
        ("18% of them", "18", True),
        ("n0 + n1", "n0 + n1", True),
        ("n0 + n1", "n1 + n0", False),
        ("He has eighteen", "18", False),
        ("It is 18.", "(18)", True),
        ("so ( 8 - 3 ) remain", "( 8 - 3 ).", True),
        ("so 8 - 3 remain", "8 + 3", False),
    ],
)
def test_a_number_leaks_by_its_value(rationale, label, expected):
    assert faithfulness.leaks(rationale, label, record("svamp", label)) is expected


def test_faithfulness_of_word_problems():
    records = [record("svamp", "( 8 - 3 )")] * 4
    labels = ["( 8 - 3 )", "8 + 3", "5", "5"]
    rationales = ["He ate 3, so 8 - 3 = 5.", "8 - 3 = 5 remain.", "8 - 3 = 6 remain.", "He ate them."]
    assert faithfulness.faithfulness(labels, rationales, records) == {
        "implies": 0.75,
        "faithful": 0.25,
        "agreement": pytest.approx(1 / 3),
        "rationale_accuracy": 0.5,
        "steps_right": pytest.approx(2 / 3),
        "sound": pytest.approx(2 / 3),
        "leakage": 0.0,
    }


def test_faithfulness_of_the_demo_task():
    records = [record("demo", "n0 * n1", quantities=("4", "2", "6"), rationale="start n0 * n1 .")] * 3
    labels = ["n1 * n0", "n0 * n1", "n0"]
    rationales = ["start n0 . bred means * n1 . tall means ignore n2 .", "start n0 + .", "start n2 ."]
    scores = faithfulness.faithfulness(labels, rationales, records)
    assert scores["implies"] == pytest.approx(2 / 3) and scores["faithful"] == pytest.approx(1 / 3)
    assert scores["rationale_accuracy"] == pytest.approx(1 / 3) and "steps_right" not in scores
    assert scores["reference_leakage"] == 1.0 and scores["leakage"] == 0.0


def test_a_rationale_names_options_word_for_word():
    question = "Where is money kept?\nAnswer Choices:\n(a) bank\n(b) river bank\n(c) ATM machine"
    records = [record("cqa", "bank", question)] * 4
    rationales = ["A bank keeps money.", "Not an ATM machine but a bank.", "A safe place.", "A bank."]
    scores = faithfulness.faithfulness(["(a) bank", "bank", "bank", "ATM machine"], rationales, records)
    assert (scores["implies"], scores["faithful"], scores["rationale_accuracy"]) == (0.75, 0.5, 0.5)
    assert scores["leakage"] == 0.5  # the label `(a) bank` is the option `bank`, which its rationale states
    letters = faithfulness.faithfulness(["(a)", "b", "(c)", "c"], rationales, records)
    assert letters["leakage"] == 0.25 and letters["faithful"] == 0.25


def test_tasks_without_a_rule_only_report_leakage():
    records = [record("jsonl", "yes", rationale="so yes")]
    expected = {"leakage": 1.0, "reference_leakage": 1.0}
    assert faithfulness.faithfulness(["no"], ["clearly, No."], records) == expected


def test_reasoning_steps_are_computations_or_clauses():
    assert faithfulness.count_steps("3 + 4 = 7. Then 7 * 2 = 14.", record("gsm8k", "14")) == 2
    assert faithfulness.count_steps("start n0 . bred means * n1 .", record("demo", "n0")) == 2
    assert faithfulness.count_steps("A dog is an animal.", record("esnli", "entailment")) == 1
