"""Alarms: each once, with its number and advice, and not before it is sure."""

from __future__ import annotations

import logging

import pytest

from ibdistill.data.records import Record
from ibdistill.monitor import alarms as monitor_alarms
from ibdistill.monitor.alarms import Alarms, chance

CALM = {
    "grad/share_predict": 0.5,
    "grad/share_mi": 0.5,
    "mi/constant_share": 0.2,
    "speed/step_s": 1.0,
    "speed/data_wait_s": 0.1,
    "on_policy/unfinished_share": 0.7,
}


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ibdistill"), "propagate", True)
    caplog.set_level(logging.WARNING, "ibdistill")
    return lambda: [record.getMessage() for record in caplog.records]


def check(alarms: Alarms, times: int, **changes: float) -> None:
    for step in range(times):
        alarms.check(CALM | {name.replace("__", "/"): value for name, value in changes.items()}, step)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"grad__share_mi": 0.0004},
            ["step 2", "the mi term makes 0.040% of the gradient", "objective.beta"],
        ),
        ({"grad__share_predict": 0.95}, ["the predict term makes 95.0% of the gradient", "Lower its weight"]),
        ({"mi__constant_share": 0.9997}, ["99.97% of the mutual-information term", "estimator normalized"]),
        ({"speed__data_wait_s": 0.7}, ["70% of the step time", "CPU cores"]),
        ({"on_policy__unfinished_share": 0.9}, ["90% of the student's own texts", "on_policy.max_tokens"]),
    ],
)
def test_an_alarm_comes_once_after_three_in_a_row(said, changes, words):
    alarms = Alarms()
    check(alarms, 2, **changes)
    check(alarms, 1)  # back within its bound: counting starts again
    check(alarms, 2, **changes)
    assert said() == []
    check(alarms, 30, **{name: value for name, value in changes.items()})
    assert len(said()) == 1 and all(word in said()[0] for word in words[1:])


def test_steps_without_a_measurement_do_not_break_the_row(said):
    alarms = Alarms()
    for step in range(3):
        alarms.check({"grad/share_mi": 0.0001}, 10 * step)
        alarms.check({"loss/total": 1.0}, 10 * step + 5)
    assert len(said()) == 1


def test_a_sampling_without_a_finished_text_is_told_at_once(said):
    alarms = Alarms()
    alarms.check({"on_policy/unfinished_share": 1.0}, 4)
    check(alarms, 5, on_policy__unfinished_share=0.9)
    assert len(said()) == 1 and said()[0].startswith("step 4: 100% of the student's own texts have no end")


def test_a_calm_run_says_nothing(said):
    check(Alarms(), 50)
    assert said() == []


def records(task: str, labels: list[str], golds: list[str], question: str = "?") -> list[Record]:
    return [
        Record(str(i), task, question, x, "", y) for i, (x, y) in enumerate(zip(labels, golds, strict=True))
    ]


def test_a_teacher_below_chance(said):
    relations = ["entailment", "neutral", "contradiction"] * 20
    rolled = relations[1:] + relations[:1]
    alarms = Alarms()
    alarms.check_labels(records("esnli", relations[:30] + rolled[30:], relations))  # half of them right
    assert said() == []
    alarms.check_labels(records("esnli", rolled, relations))
    alarms.check_labels(records("esnli", rolled, relations))
    assert len(said()) == 1 and "esnli agrees with 0.0% of the gold labels, guessing with 33.3%" in said()[0]
    Alarms(records("esnli", relations, relations)).check({"teacher/accuracy": 0.34}, 5)
    assert len(said()) == 1
    Alarms(records("esnli", relations, relations)).check({"teacher/accuracy": 0.1}, 5)
    assert "the teacher agrees with 10.0% of the gold labels, guessing with 33.3%" in said()[1]
    written = {"esnli/train/teacher_parsed": 50, "esnli/train/teacher_agrees": 16}
    Alarms().check_written(written, records("esnli", relations, relations))
    assert "esnli agrees with 32.0%" in said()[2]
    Alarms().check_written(
        written | {"esnli/train/teacher_agrees": 17}, records("esnli", relations, relations)
    )
    assert len(said()) == 3


def test_chance_of_guessing():
    options = "Where?\nAnswer Choices:\n(a) bank\n(b) shop\n(c) sea\n(d) hill"
    assert chance(records("cqa", ["bank"] * 3, ["bank"] * 3, options)) == 0.25
    assert chance(records("esnli", ["a"] * 40, ["a", "b"] * 20)) == 0.5
    assert chance(records("svamp", ["1"] * 4, ["1", "2", "3", "4"])) == 0.0
    assert chance([]) == 0.0


def test_chance_is_taken_once_a_task(monkeypatch):
    """Not once a record, which made the start of a run on 16,000 records take minutes."""
    calls = []
    monkeypatch.setattr(monitor_alarms, "chance", lambda part: calls.append(len(part)) or 1 / len(part))
    records = [Record("0", task, "q", "l", "", "l") for task in "aabbb"]
    assert Alarms(records)._chance == pytest.approx((2 * 1 / 2 + 3 * 1 / 3) / 5)
    assert calls == [2, 3]
