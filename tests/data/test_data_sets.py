"""Rows of every data set, their original files in miniature, and the real files where they are at hand."""

import json

import numpy as np
import pytest
from miniatures import DATA, array, lines, read, read_refused, real_data

from ibdistill.data.arithmetic import evaluate
from ibdistill.data.tasks.registry import TASKS
from ibdistill.data.tasks.svamp import derived_rationale


def release(root, name, rows):
    lines(root / name / f"{name}_train.json", rows)
    lines(root / name / f"{name}_test.json", rows)
    return root


def said(split, n):
    return [f"{split} reason {i}. The answer is ({i} - 1)." for i in range(n)]


def test_release_rows_of_each_task(tmp_path):
    rows = {
        "asdiv": {"Body": "3 and 6.", "Question": "All?", "Formula": "3+6=9", "Answer": "9 (apples)"},
        "cqa": {"id": "x", "question": "Where?", "choices": ["safe", "bank", "c", "d", "e"], "answer": "bank",
                "abstractive_explanation": "Banks keep money.", "extractive_explanation": ""},
        "esnli": {"premise": "A dog.", "hypothesis": "A pet.", "label": 1, "explanation_1": "May be wild."},
        "anli1": {"uid": "u", "premise": "A dog.", "hypothesis": "A pet.", "label": 2, "reason": ""},
        "gsm8k": {"question": "How many?", "answer": "2*3=<<2*3=6>>6 hats.\n#### 1,206"},
    }  # fmt: skip
    for name, row in rows.items():
        release(tmp_path, name, [row])
    found = {name: read(name, tmp_path)["train"][0].record for name in rows}
    assert {name: (r.question, r.label, r.rationale) for name, r in found.items()} == {
        "asdiv": ("3 and 6.\nAll?", "9", ""),
        "cqa": (
            "Where?\nAnswer Choices:\n(a) safe\n(b) bank\n(c) c\n(d) d\n(e) e",
            "bank",
            "Banks keep money.",
        ),
        "esnli": ("A dog.</s>A pet.", "neutral", "May be wild."),
        "anli1": ("A dog.</s>A pet.", "contradiction", ""),
        "gsm8k": ("How many?", "1,206", "2*3=6 hats."),
    }


def test_bad_rows_of_other_tasks(tmp_path):
    def bad(name, row, message):
        release(tmp_path, name, [row])
        read_refused(f"{name}_train.json:1: {message}", name, tmp_path)

    bad(
        "esnli",
        {"premise": "p", "hypothesis": "h", "label": -1},
        "the label is -1; it must be 0, 1, 2 or one",
    )
    bad("anli3", {"premise": "p", "hypothesis": "h", "label": True}, "the label is True")
    bad("gsm8k", {"question": "q", "answer": "72"}, "the answer has no '####'")
    bad("gsm8k", {"question": "q", "answer": "So.\n#### 4\n#### 5"}, "the answer has '####' 2 times; which")
    bad(
        "cqa",
        {"question": "q", "choices": ["a", "b"], "answer": "c"},
        "the answer 'c' is none of the choices",
    )
    bad(
        "cqa", {"question": "q", "choices": None, "answer": "c"}, "field 'choices' is None; it must be a list"
    )
    bad(
        "cqa", {"question": "q", "choices": [None], "answer": "c"}, "field 'text' is None; it must be text or"
    )


@pytest.mark.parametrize(
    ("answer", "label", "value"),
    [("9 (apples)", "9", 9), ("1 1/2 (hours)", "1 + 1/2", 1.5), ("3/4 (cup)", "3/4", 0.75), (2.5, "2.5", 2.5),
     ("10:45", "10:45", None)],
)  # fmt: skip
def test_the_number_of_an_asdiv_answer(tmp_path, answer, label, value):
    release(tmp_path, "asdiv", [{"Body": "b", "Question": "q", "Answer": answer}])
    record = read("asdiv", tmp_path)["train"][0].record
    assert record.label == label and evaluate(label) == value
    release(tmp_path, "asdiv", [{"Body": "b", "Question": "q", "Answer": " (apples)"}])
    read_refused("asdiv_train.json:1: the label is empty", "asdiv", tmp_path)


def test_numbers_of_relations_may_be_floats(tmp_path):
    row = {"premise": "p", "hypothesis": "h", "label": 2.0}
    assert read("esnli", release(tmp_path, "esnli", [row]))["train"][0].record.label == "contradiction"
    release(tmp_path, "esnli", [row | {"label": 0.5}])
    read_refused("esnli_train.json:1: the label is 0.5; it must be 0, 1, 2", "esnli", tmp_path)


CHOICES = {"label": ["A", "B"], "text": ["safe", "bank"]}
PAIRS = [{"label": "A", "text": "safe"}, {"label": "B", "text": "bank"}]


def test_commonsense_qa_as_the_hub_has_it(tmp_path):
    row = {"id": "x", "question": "Where?", "question_concept": "money", "choices": CHOICES, "answerKey": "B"}
    record = read("cqa", release(tmp_path, "cqa", [row]))["train"][0].record
    assert (record.question, record.label) == ("Where?\nAnswer Choices:\n(a) safe\n(b) bank", "bank")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": None}, "field 'choices' is None; beside 'answerKey' it must be {\"label\": [...]"),
        ({"choices": ["safe", "bank"]}, "field 'choices' is ['safe', 'bank']; beside 'answerKey'"),
        ({"choices": {"label": ["A"], "text": ["safe", "bank"]}}, "the choices have 1 labels and 2 texts"),
        ({"choices": {"label": None, "text": []}}, "field 'label' is None; it must be a list"),
        ({"choices": {"label": ["A", "A"], "text": ["x", "y"]}}, "two choices have one label: ['A', 'A']"),
        ({"choices": {"label": ["A", "B"], "text": ["x", None]}}, "field 'text' is None; it must be text or"),
        ({"choices": {"label": ["A", "B"], "text": ["x", " "]}}, "field 'text' is ' '; it must not be blank"),
        ({"answerKey": None}, "field 'answerKey' is None"),
        (
            {"answerKey": ""},
            "field 'answerKey' is ''; it must be one of the choices' labels A, B (the labels",
        ),
        ({"answerKey": ["B"]}, "field 'answerKey' is ['B']; it must be text"),
        ({"question": {"stem": "Where?", "choices": None}}, "field 'choices' is None; it must be a list"),
        ({"question": {"stem": None, "choices": PAIRS}}, "field 'stem' is None; it must be text"),
        ({"question": {"stem": "Where?", "choices": [None]}}, "a choice is None; it must be an object with"),
        ({"question": {"stem": "Where?", "choices": [{"label": "A"}]}}, "no 'text' for task 'cqa'"),
        ({"question": None}, "field 'question' is None; it must be text"),
    ],
)
def test_a_bad_choice_is_named_with_its_place(tmp_path, row, message):
    good = {"question": "Where?", "choices": CHOICES, "answerKey": "B"}
    release(tmp_path, "cqa", [good, good | row])
    read_refused(f"cqa_train.json:2: {message}", "cqa", tmp_path)


@pytest.mark.parametrize("kind", ["", "-", " ", "Common-", "?", "3"])
def test_a_kind_of_problem_that_names_no_operation(tmp_path, kind):
    row = {"Body": "b", "Question": "q", "Equation": "( 1.0 + 2.0 )", "Type": kind}
    array(tmp_path / "SVAMP.json", [row] * 10)
    read_refused(f"item 2: field 'Type' is {kind!r}; a rationale", "svamp", tmp_path, derive_rationales=True)
    assert read("svamp", tmp_path)["train"][0].record.label == "( 1.0 + 2.0 )"


def test_original_svamp_is_split_as_the_release_splits_it(tmp_path):
    rows = [
        {
            "ID": str(i),
            "Body": f"Body {i}",
            "Question": "How many?",
            "Equation": f"( {i}.0 + 1.0 )",
            "Answer": i,
        }
        for i in range(10)
    ]
    array(tmp_path / "SVAMP.json", rows)
    splits = read("svamp", tmp_path)
    order = list(np.random.RandomState(0).permutation(10))
    assert order == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
    assert [e.record.label for e in splits["train"]] == [f"( {i}.0 + 1.0 )" for i in order[:8]]
    assert [e.record.question for e in splits["test"]] == [f"Body {i}\nHow many?" for i in order[8:]]
    array(tmp_path / "llm/train_CoT_0.json", said("train", 8))
    assert read("svamp", tmp_path)["train"][7].llm == said("train", 8)[7]


@pytest.mark.parametrize(
    ("equation", "kind", "rationale"),
    [
        ("( 8.0 - 3.0 )", "Subtraction", "This is a subtraction problem: 8.0 - 3.0."),
        (
            "( ( 3.0 - 2.0 ) + 26.0 )",
            "Addition",
            "This is an addition problem: 3.0 - 2.0, then that + 26.0.",
        ),
        (
            "( 13.0 - ( 3.0 - 13.0 ) )",
            "Subtraction",
            "This is a subtraction problem: 3.0 - 13.0, then 13.0 - that.",
        ),
        ("( 6.0 / 2.0 )", "Common-Divison", "This is a division problem: 6.0 / 2.0."),  # the file's own typo
        ("8.0", "Common-Division", "This is a division problem: 8.0."),
    ],
)
def test_a_rationale_derived_from_an_equation(equation, kind, rationale):
    assert derived_rationale({"Equation": equation, "Type": kind}) == rationale


@pytest.mark.parametrize(
    "equation", ["( ( 1.0 + 2.0 ) * ( 3.0 + 4.0 ) )", "8.0 - 3.0", "( 8.0 - 3.0", "( 8.0 ^ 3.0 )"]
)
def test_an_equation_that_is_no_chain_gets_no_rationale(tmp_path, equation):
    row = {"Body": "b", "Question": "q", "Equation": equation, "Type": "Addition"}
    array(tmp_path / "SVAMP.json", [row] * 10)
    read_refused("is no chain of operations in parentheses", "svamp", tmp_path, derive_rationales=True)
    assert read("svamp", tmp_path)["train"][0].record.rationale == ""


def test_derived_rationales_need_the_original_file(tmp_path):
    release(tmp_path, "svamp", [{"input": "q", "label": "( 1.0 + 2.0 )"}])
    read_refused("data.derive_rationales reads the original SVAMP", "svamp", tmp_path, derive_rationales=True)


def cose(root):
    for split in ("train", "dev"):
        choices = [{"label": "A", "text": "safe"}, {"label": "B", "text": "bank"}]
        question = {"stem": f"Where {split}?", "choices": choices}
        lines(
            root / f"{split}_rand_split.jsonl",
            [{"id": i, "answerKey": "B", "question": question} for i in "xy"],
        )
        said = {"open-ended": f"{split} reason", "selected": "w"}
        lines(root / f"cose_{split}_v1.0.jsonl", [{"id": "x", "explanation": said}])


def test_original_cose(tmp_path):
    cose(tmp_path / "cose")
    for path in (tmp_path, tmp_path / "cose"):
        splits = read("cqa", path, needs_rationale=True)
        assert [(e.record.question, e.record.label, e.record.rationale) for e in splits["train"]] == [
            ("Where train?\nAnswer Choices:\n(a) safe\n(b) bank", "bank", "train reason"),
            ("Where train?\nAnswer Choices:\n(a) safe\n(b) bank", "bank", ""),
        ]
        assert splits["test"][0].record.rationale == "dev reason"


def test_original_cose_problems(tmp_path):
    cose(tmp_path)
    lines(tmp_path / "cose_dev_v1.0.jsonl", [{"id": "x"}])
    read_refused("cose_dev_v1.0.jsonl:1: no fields 'id' and 'explanation'", "cqa", tmp_path)
    lines(tmp_path / "cose_dev_v1.0.jsonl", [{"id": "x", "explanation": {"open-ended": ["no", "text"]}}])
    read_refused("cose_dev_v1.0.jsonl:1: 'open-ended' is ['no', 'text']; it must be", "cqa", tmp_path)
    lines(tmp_path / "cose_dev_v1.0.jsonl", [{"id": "x", "explanation": {"open-ended": None}}])
    assert [e.record.rationale for e in read("cqa", tmp_path)["test"]] == ["", ""]
    lines(tmp_path / "train_rand_split.jsonl", [{"id": "x", "answerKey": "B", "question": {}}])
    lines(tmp_path / "cose_dev_v1.0.jsonl", [])
    read_refused("train_rand_split.jsonl:1: no 'choices' for task 'cqa'", "cqa", tmp_path)
    (tmp_path / "dev_rand_split.jsonl").unlink()
    read_refused("dev_rand_split.jsonl is missing: the task 'cqa' needs it", "cqa", tmp_path)
    lines(tmp_path / "cose_train_v1.11.jsonl", [])
    read_refused("several versions of CoS-E (cose_train_v1.0.jsonl, cose_train_v1.11.jsonl)", "cqa", tmp_path)


def test_original_gsm8k(tmp_path):
    row = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24.\n24+48=<<24+48=72>>72.\n#### 72"}
    for split in ("train", "test"):
        lines(tmp_path / f"{split}.jsonl", [row])
    record = read("gsm8k", tmp_path, needs_rationale=True)["test"][0].record
    assert (record.label, record.rationale) == ("72", "48/2 = 24.\n24+48=72.")


@real_data
def test_real_files():
    splits = read("svamp", DATA)
    assert {k: len(v) for k, v in splits.items()} == {"train": 800, "test": 200}
    rows = json.loads((DATA / "svamp/SVAMP.json").read_text())
    first = rows[np.random.RandomState(0).permutation(1000)[0]]
    assert splits["train"][0].record.question == f"{first['Body']}\n{first['Question']}"
    equations = [e.record for examples in splits.values() for e in examples]
    assert all(TASKS["svamp"].is_correct(record.gold, record) for record in equations)
    derived = read("svamp", DATA, derive_rationales=True)
    for record in (e.record for examples in derived.values() for e in examples):
        value = ""
        for step in record.rationale.removesuffix(".").partition(": ")[2].split(", then "):
            value = f"({step.replace('that', value)})"
        assert evaluate(value) == evaluate(record.gold)

    splits = read("cqa", DATA)
    assert {k: len(v) for k, v in splits.items()} == {"train": 7610, "test": 950}
    assert all(e.record.rationale for examples in splits.values() for e in examples)
    assert splits["train"][0].record.question == (
        "If a lantern is not for sale, where is it likely to be?\n"
        "Answer Choices:\n(a) antique shop\n(b) house\n(c) dark place"
    )
    assert (
        splits["train"][0].record.rationale == "A house is the only place that is not likely to sell things"
    )
    assert all(TASKS["cqa"].is_correct(e.record.gold, e.record) for e in splits["test"])

    splits = read("gsm8k", DATA)
    assert {k: len(v) for k, v in splits.items()} == {"train": 7473, "test": 1319}
    assert splits["train"][0].record.label == "72"
    assert splits["train"][0].record.rationale.startswith("Natalia sold 48/2 = 24 clips in May.\n")
    assert all(TASKS["gsm8k"].is_correct(e.record.gold, e.record) for e in splits["test"])
