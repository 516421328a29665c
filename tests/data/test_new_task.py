"""A data set added from outside the package, as CONTRIBUTING shows it: one file and one entry."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import toy_task
from harness import ROOT, same, steps, weights
from miniatures import lines, loaded, read_refused

from ibdistill.data.records import STREAMS
from ibdistill.data.tasks.registry import TASKS
from ibdistill.evaluation.faithfulness import faithfulness
from ibdistill.evaluation.predictions import prediction
from ibdistill.models.decoding import Answer
from ibdistill.monitor.alarms import chance
from ibdistill.teacher import texts
from ibdistill.training import pseudo_labels


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setitem(TASKS, "yes_or_no", toy_task.YES_OR_NO)
    return toy_task.YES_OR_NO


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twenty questions to train on, of which two become the validation split, and four to test on."""
    for split, n in (("train", 20), ("test", 4)):
        rows = [
            {"question": f"Is {i} odd?", "label": answer, "rationale": f"Halves of {i} are whole: {answer}."}
            for i in range(n)
            for answer in ("yes" if i % 2 else "no",)
        ]
        lines(tmp_path / f"data/{split}.jsonl", rows)
    return tmp_path / "data"


def test_contributing_shows_the_code_that_these_tests_run():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert f"```python\n{Path(toy_task.__file__).read_text()}```\n" in text
    entry = '    "yes_or_no",'
    assert f"\n{entry}\n" in text and "ibdistill/data/tasks/yes_or_no.py" in text


def test_a_file_and_its_name_in_the_registry_are_enough(monkeypatch):
    """The registry with one more line, and the file of the tests in the package's place."""
    before = list(TASKS)
    assert before[:4] == ["demo", "demo_pretrain", "svamp", "asdiv"] and before[-1] == "jsonl"
    source = (ROOT / "ibdistill/data/tasks/registry.py").read_text()
    assert source.count('    "jsonl",\n') == 1
    monkeypatch.setitem(sys.modules, "ibdistill.data.tasks.yes_or_no", toy_task)
    names = {"__name__": "registry"}
    exec(source.replace('    "jsonl",\n', '    "jsonl",\n    "yes_or_no",\n'), names)
    assert list(names["TASKS"]) == [*before, "yes_or_no"]
    assert names["TASKS"]["yes_or_no"] is toy_task.YES_OR_NO


def test_its_records_are_read_under_its_own_name(task, folder):
    found = loaded("yes_or_no", folder)
    assert [len(found.train), len(found.valid["yes_or_no"]), len(found.test["yes_or_no"])] == [18, 2, 4]
    record = found.test["yes_or_no"][1]
    assert (record.id, record.task, record.question) == ("yes_or_no/test/1", "yes_or_no", "Is 1 odd?")
    assert (record.label, record.gold, record.rationale) == ("yes", "yes", "Halves of 1 are whole: yes.")
    read_refused("data.path is not set: the task 'yes_or_no' needs a file", "yes_or_no")
    (folder / "test.jsonl").unlink()
    read_refused("lacks test.jsonl: a folder for the task 'yes_or_no' has", "yes_or_no", folder)


def test_its_answers_are_parsed_scored_and_judged(task, folder):
    records = loaded("yes_or_no", folder).test["yes_or_no"]  # no, yes, no, yes
    assert texts.parse({"answer": "One is left over. The answer is yes.\nQ: more"}, records[1]) == (
        "One is left over.",
        "yes",
    )
    assert texts.parse({"predict": "perhaps", "explain": "x"}, records[1]) is None  # it is no choice
    assert texts.prompts_of(records[1], "") == {s: f"{s}: Is 1 odd?" for s in STREAMS}
    labels = ["No.", "yes", "yes", "yes"]
    rationales = ["No half.", "Yes or no.", "It is odd: yes.", "It is odd."]
    assert faithfulness(labels, rationales, records) == {
        "implies": 0.75,
        "faithful": 0.75,
        "agreement": 1.0,
        "rationale_accuracy": 0.25,
        "leakage": 0.75,
        "reference_leakage": 1.0,
    }
    made = [
        prediction(record, Answer(label, 1.0, 1.0), Answer(rationale, 1.0, 1.0))
        for record, label, rationale in zip(records, labels, rationales, strict=True)
    ]
    assert [p.correct for p in made] == [True, True, False, True]
    assert [p.implied for p in made] == [["no"], ["yes", "no"], ["yes"], []]
    # One implied label, and the predict stream gave it: these two may be learned from.
    assert [record.id for record in pseudo_labels.agreed(made)] == ["yes_or_no/test/0", "yes_or_no/test/2"]
    assert chance(records * 10) == 0.5


def test_a_student_trains_on_it(task, folder, make_job):
    job = make_job(
        **{
            "data.task": "yes_or_no",
            "data.path": str(folder),
            "data.subsample": 1.0,
            "student.tokenizer": "train",
            "student.vocab_size": 60,
        }
    )
    assert len(job.records.train) == 18
    before = weights(job)
    steps(job, 2)
    assert not same(before, weights(job))


def test_outside_the_registry_it_is_unknown(folder):
    with pytest.raises(ValueError, match="data.task 'yes_or_no' is unknown: choose from demo, "):
        loaded("yes_or_no", folder)


def test_each_public_data_set_is_named_in_its_own_file_and_the_registry_only():
    """That is what makes one file and one entry enough."""
    files = {"esnli": "nli", "anli1": "nli", "anli2": "nli", "anli3": "nli"}
    for name in (name for name in TASKS if not name.startswith("demo") and name != "jsonl"):
        where = {path.stem for path in (ROOT / "ibdistill").rglob("*.py") if f'"{name}"' in path.read_text()}
        assert where <= {files.get(name, name), "registry"}, name
