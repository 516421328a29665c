"""The demo corpus: its values, its shares, and that it is the same everywhere."""

import ast
import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest

from ibdistill.data.answer_rules import same_value
from ibdistill.data.records import map_numbers
from ibdistill.data.tasks import demo, demo_words

_APPLY = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def value(label, quantities):
    """Exact value of a label, by Python's grammar rather than by ours."""

    def visit(node):
        if isinstance(node, ast.BinOp):
            return _APPLY[type(node.op)](visit(node.left), visit(node.right))
        return Fraction(node.value)

    return visit(ast.parse(unmapped(label, quantities), mode="eval").body)


def unmapped(text, quantities):
    return re.sub(r"\bn(\d)\b", lambda match: quantities[int(match[1])], text)


def digest():
    """One number for everything that the module generates."""
    records = [r for task in ("demo", "demo_pretrain") for s in demo.load_demo(task).values() for r in s]
    return hashlib.sha256(repr(records + demo.unlabelled(20000)).encode()).hexdigest()


@pytest.fixture(scope="module")
def splits():
    return demo.load_demo("demo")


@pytest.fixture(scope="module")
def pretraining():
    return demo.load_demo("demo_pretrain")["train"]


def test_first_records(splits, pretraining):
    record = splits["train"][4]
    assert record.id == "demo/train/4"
    assert record.question == (
        "leo began with n0 books . found n1 . boosted by n2 . portioned for n3 people . ran n4 laps . "
        "door code n5 . how many books left ?"
    )
    assert record.label == record.gold == "( ( n0 + n1 ) * n2 ) / n3"
    assert record.rationale == (
        "start n0 . found means + n1 . boosted means * n2 . portioned means / n3 . "
        "ran means ignore n4 . door means ignore n5 ."
    )
    assert record.quantities == ("22", "3", "4", "2", "23", "12")
    assert value(record.label, record.quantities) == 50
    assert (pretraining[0].question, pretraining[0].label, pretraining[0].rationale) == (
        "n0 unrelated . mia has n1 toys . times n2 . how many toys now ?",
        "n1 * n2",
        "start n1 . times means * n2 . unrelated means ignore n0 .",
    )
    restored = pretraining[-1]
    assert restored.label == "<extra_id_0> n0 <extra_id_1> coins"
    assert restored.question.startswith("mia began with <extra_id_0> coins . wizard multiplied by n1 .")
    assert restored.rationale == "with n0 . by n1 . with n2 ."


def test_nothing_depends_on_the_process(splits):
    """Neither on the hash seed nor on torch's or Python's global generators."""
    code = "import random; random.seed(5); import test_demo; print(test_demo.digest())"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join([root, os.path.join(root, "tests/data")])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "1234"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == digest(), run.stderr


def test_sizes_and_disjoint_splits(splits, pretraining):
    assert {split: len(records) for split, records in splits.items()} == {
        "train": 16000,
        "valid": 1000,
        "test": 2000,
    }
    groups = [*splits.values(), demo.unlabelled(20000), pretraining[:10000]]
    questions = [record.question for group in groups for record in group]
    assert len(set(questions)) == len(questions) == 49000
    ids = [record.id for group in groups for record in group]
    assert len(set(ids)) == len(ids)


def test_every_label_is_worth_a_small_positive_integer(splits, pretraining):
    for record in [*splits["train"], *splits["valid"], *splits["test"], *pretraining[:10000]]:
        number = value(record.label, record.quantities)
        assert number.denominator == 1 and 1 <= number <= 300, record


def test_every_rationale_implies_its_label(splits, pretraining):
    for record in [*splits["train"], *splits["valid"], *splits["test"], *pretraining[:10000]]:
        assert demo.implied_label(record.rationale) == record.label


@pytest.mark.parametrize(
    ("rationale", "label"),
    [
        ("start n0 .", "n0"),
        ("start n0 * n1 . bred means * n2", "( n0 * n1 ) * n2"),
        ("start 4 . lost means - 2 . tall means ignore 9 .", "4 - 2"),
        ("start n0 . start n1 . sold means - n2 . more than means - .", "n0 - ( n1 - n2 )"),
        ("", None),
        (" . . .", None),
        ("found means + n1 .", None),
        ("start n0 . found means + .", None),
        ("start n0 . found means + shells .", None),
        ("start n0 . found means ignore", None),
        ("start n0 . start n1 .", None),
        ("start n0 . together means + .", None),
        ("start n0 . start n1 . together means + . together means + .", None),
        ("start n0 n1 . means \x00 \N{PILE OF POO}", None),
    ],
)
def test_implied_label(rationale, label):
    assert demo.implied_label(rationale) == label


def test_shares_are_those_of_the_design(splits):
    records = splits["train"]
    share = {key: count / len(records) for key, count in Counter(map(operations, records)).items()}
    assert share == pytest.approx({1: 0.27, 2: 0.55, 3: 0.18}, abs=0.02)
    pairs = [r for r in records if "together means" in r.rationale or "more than means" in r.rationale]
    assert len(pairs) / len(records) == pytest.approx(0.22, abs=0.015)
    chains = [r for r in records if r.rationale.count("start") == 1]
    assert len(chains) + len(pairs) == len(records)
    ignored = Counter(r.rationale.count("ignore") for r in chains)
    # Problems with more quantities repeat one more often and are dropped, hence the wide bound.
    assert {k: n / len(chains) for k, n in ignored.items()} == pytest.approx(
        {0: 0.4, 1: 0.4, 2: 0.2}, abs=0.05
    )
    # Drawn 3 : 3 : 2 : 2, but most values cannot be divided, and small ones not be reduced.
    used = Counter(word for r in records for word in r.label.split() if word in demo.OPERATORS)
    used = {operator: count / used.total() for operator, count in used.items()}
    assert used == pytest.approx({"+": 0.42, "-": 0.26, "*": 0.26, "/": 0.06}, abs=0.02)


def operations(record):
    return sum(word in demo.OPERATORS for word in record.label.split())


def test_ignore_clauses_come_last_and_in_text_order(splits):
    for record in splits["train"]:
        clauses = record.rationale.removesuffix(" .").split(" . ")
        ignored = [clause.split()[-1] for clause in clauses if "ignore" in clause]
        assert ignored == sorted(ignored)
        assert [clause.split()[-1] for clause in clauses[len(clauses) - len(ignored) :]] == ignored


def test_numbers_are_mapped_as_in_every_other_task(splits):
    """`map_numbers` on the text with its numbers put back gives the same record."""
    for record in splits["test"]:
        fields = ("question", "label", "rationale", "gold")
        plain = {name: unmapped(getattr(record, name), record.quantities) for name in fields}
        assert map_numbers(type(record)(id=record.id, task=record.task, **plain)) == record


def test_pretraining_explains_no_target_verb(pretraining):
    auxiliary, restored = pretraining[:10000], pretraining[10000:]
    assert len(restored) / len(pretraining) == pytest.approx(0.3, abs=0.001)
    words = demo_words.TARGET
    keys = {key for group in (words.times, words.divided, words.irrelevant) for _, key in group}
    keys |= {*words.plus, *words.minus}
    said = {word for r in auxiliary for word in f"{r.question} {r.rationale}".split()}
    assert not said & keys
    assert not any(word in demo.OPERATORS for r in restored for word in r.rationale.split())


def test_spans_restore_an_unlabelled_question(pretraining):
    for record, whole in zip(pretraining[10000:], demo.unlabelled(20000), strict=False):
        pieces = re.split(r"(<extra_id_\d+>)", record.label)[1:]
        text = record.question
        assert pieces[0::2] == [f"<extra_id_{i}>" for i in range(len(pieces) // 2)]
        for sentinel, span in zip(pieces[0::2], pieces[1::2], strict=True):
            assert 1 <= len(span.split()) <= 3
            text = text.replace(sentinel, span.strip())
        assert text == whole.question
        listed = record.rationale.removesuffix(" .").split(" . ")
        assert [pair.split()[1] for pair in listed] == [f"n{i}" for i in range(len(whole.quantities))]
        assert all(pair in text for pair in listed)


def test_unlabelled_questions_carry_no_answer():
    records = demo.unlabelled(50)
    assert len(records) == 50
    assert all(r.label == r.rationale == "" and r.gold and r.quantities for r in records)
    with pytest.raises(ValueError, match="20000 unlabelled questions, not 20001"):
        demo.unlabelled(20001)


def test_another_seed_gives_other_test_problems_and_nothing_else(splits):
    fresh = demo.load_demo("demo", test_seed=5)
    assert fresh["train"] == splits["train"] and fresh["valid"] == splits["valid"]
    assert len(fresh["test"]) == 2000 and fresh == demo.load_demo("demo", test_seed=5)
    questions = {r.question for r in fresh["test"]}
    others = [r for part in splits.values() for r in part] + demo.unlabelled(20000)
    assert len(questions) == 2000 and questions.isdisjoint(r.question for r in others)
    assert demo.load_demo("demo", test_seed=777001) == splits


def test_callers_get_their_own_lists(splits):
    demo.load_demo("demo")["train"].clear()
    assert len(demo.load_demo("demo")["train"]) == 16000


def test_unknown_task():
    with pytest.raises(ValueError, match="'svamp' is not a demo task; choose from demo, demo_pretrain"):
        demo.load_demo("svamp")


def test_vocabulary_is_what_the_corpus_says(splits, pretraining):
    texts = [
        t for s in (*splits.values(), pretraining) for r in s for t in (r.question, r.label, r.rationale)
    ]
    said = {word for text in texts for word in text.split()}
    assert said | {*demo.PREFIXES, "n6", "n7", "<extra_id_3>"} == set(demo.vocabulary())


def test_every_gold_label_has_a_value():
    """`loading` looks for answers that cannot be scored in data that are read, not in these."""
    for records in demo.load_demo("demo").values():
        assert all(same_value(record.gold, record) for record in records[:1000])
