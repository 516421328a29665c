"""Rationale quality: texts with known answers, formulas written another way, GSM8K's own rationales."""

from __future__ import annotations

import sys
from fractions import Fraction
from types import SimpleNamespace

import pytest
from miniatures import DATA, loaded, real_data

from ibdistill.evaluation import faithfulness
from ibdistill.evaluation import text_scores
from ibdistill.data.records import Record


def record(task: str, gold: str, question: str = "?", quantities=(), rationale="") -> Record:
    return Record(f"{task}/test/0", task, question, gold, rationale, gold, quantities)


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
    assert [(c.value, c.holds) for c in faithfulness.computations(text, names)] == expected


def test_computations_of_hostile_text_end():
    (unfinished,) = faithfulness.computations("1 + " * 5000, {})
    assert unfinished.value is None and unfinished.holds is None
    for text in ("(" * 5000, "=" * 5000, "1,111" * 3000, "$ " * 5000 + "x" * 5000):
        assert faithfulness.computations(text, {}) == []


@real_data
def test_gsm8k_s_own_rationales_are_sound_and_faithful():
    """People wrote and checked them, so nearly all steps must hold and imply the label."""
    records = loaded("gsm8k", DATA / "gsm8k").test["gsm8k"]
    scores = faithfulness.faithfulness([r.gold for r in records], [r.rationale for r in records], records)
    assert scores["steps_right"] > 0.995 and scores["sound"] > 0.99
    assert scores["implies"] > 0.95 and scores["agreement"] > 0.95
    wrong = faithfulness.faithfulness([r.gold + "1" for r in records], [r.rationale for r in records], records)
    assert wrong["faithful"] < 0.02 and wrong["rationale_accuracy"] == scores["rationale_accuracy"]


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
    assert faithfulness.named("In a Bank, of course.", ["bank", "river bank", "ATM machine"]) == ["bank"]
    assert faithfulness.named("by the river bank", ["bank", "river bank"]) == ["river bank"]
    assert faithfulness.named("bankers do", ["bank"]) == []
    records = [record("cqa", "bank", question)] * 4
    rationales = ["A bank keeps money.", "Not an ATM machine but a bank.", "A safe place.", "A bank."]
    scores = faithfulness.faithfulness(["(a) bank", "bank", "bank", "ATM machine"], rationales, records)
    assert (scores["implies"], scores["faithful"], scores["rationale_accuracy"]) == (0.75, 0.5, 0.5)
    assert scores["leakage"] == 0.25  # `(a) bank` does not stand in its rationale word for word


def test_tasks_without_a_rule_only_report_leakage():
    records = [record("jsonl", "yes", rationale="so yes")]
    expected = {"leakage": 1.0, "reference_leakage": 1.0}
    assert faithfulness.faithfulness(["no"], ["clearly, No."], records) == expected


def test_rouge_l_equals_a_recursion_over_subsequences():
    def by_recursion(a: tuple, b: tuple) -> int:
        if not a or not b:
            return 0
        if a[-1] == b[-1]:
            return by_recursion(a[:-1], b[:-1]) + 1
        return max(by_recursion(a[:-1], b), by_recursion(a, b[:-1]))

    pairs = [
        ("a b c d", "b d"),
        ("the cat the mat", "mat the cat the"),
        ("A b", "a B"),
        ("x", "y"),
        ("a a a", "a a"),
    ]
    for ours, theirs in pairs:
        a, b = tuple(ours.lower().split()), tuple(theirs.lower().split())
        assert text_scores.rouge_l(ours, theirs) == pytest.approx(2 * by_recursion(a, b) / (len(a) + len(b)))
    assert text_scores.rouge_l("", "a") == text_scores.rouge_l("", "") == 0.0
    scores = text_scores.text_scores(["a b c d", "start n0 ."], ["a b c d", "start n0 ."])
    assert scores == pytest.approx({"bleu": 100, "chrf": 100, "rouge_l": 100, "words": 3.5})


def test_embedding_cosine_is_the_mean_over_pairs(monkeypatch, tmp_path):
    import numpy as np

    class Encoder:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path)

        def encode(self, texts, show_progress_bar):
            return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Encoder))
    encoder = text_scores.load_encoder(str(tmp_path))
    cosine = text_scores.embedding_cosine(encoder, ["aa", "b"], ["aa", "bbb"])
    assert cosine == pytest.approx((1 + 4 / (2**0.5 * 10**0.5)) / 2, abs=1e-6)
    with pytest.raises(ValueError, match="must be the folder of a downloaded model"):
        text_scores.load_encoder(str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="pip install sentence-transformers"):
        text_scores.load_encoder(str(tmp_path))


def test_reasoning_steps_are_computations_or_clauses():
    assert faithfulness.count_steps("3 + 4 = 7. Then 7 * 2 = 14.", record("gsm8k", "14")) == 2
    assert faithfulness.count_steps("start n0 . bred means * n1 .", record("demo", "n0")) == 2
    assert faithfulness.count_steps("A dog is an animal.", record("esnli", "entailment")) == 1
