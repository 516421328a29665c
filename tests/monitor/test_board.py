"""TensorBoard never ends a run: not by a full disk, not by a folder that cannot be made, not by a figure."""

from __future__ import annotations

import logging

import pytest
from harness import full_disk, same, steps, weights

from ibdistill import train
from ibdistill.evaluation import report
from ibdistill.monitor import board
from ibdistill.monitor.board import Board


def messages(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def write_much(shown: Board) -> None:
    for step in range(1, 400):
        shown.scalars({f"loss/{i}": float(step) for i in range(20)}, step)
    shown.text("t", "text", 400)
    shown.summary({"a": 1}, {"b": 2.0})
    shown.advance(400)
    shown.close()
    shown.close()


def test_a_full_disk_ends_the_events_with_one_warning_and_no_traceback(world, tmp_path, caplog, capfd):
    with full_disk(20_000):
        write_much(Board(tmp_path, world, 0, report_to=["tensorboard"]))
    (warning,) = messages(caplog)
    assert "run.report_to tensorboard: no more until the next start, since [Errno 27]" in warning
    assert "Traceback" not in capfd.readouterr().err


def test_events_that_were_never_flushed_do_not_end_the_close(world, tmp_path, caplog, capfd):
    shown = Board(tmp_path, world, 0, report_to=["tensorboard"])
    for step in range(1, 20):
        shown.scalars({f"loss/{i}": float(step) for i in range(20)}, step)
    with full_disk(100):
        shown.close()
    assert len(messages(caplog)) == 1 and "Traceback" not in capfd.readouterr().err


def test_a_file_where_the_events_belong_leaves_them_out(world, tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("")
    write_much(Board(tmp_path, world, 0, report_to=["tensorboard"]))
    (warning,) = messages(caplog)
    assert "tensorboard: no more until" in warning and "tensorboard" in warning


def test_a_figure_that_cannot_be_drawn_costs_itself_alone(world, tmp_path, caplog):
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    bad, good = Figure(), Figure()
    bad.suptitle(r"$\frac{$")
    shown = Board(tmp_path, world, 0, report_to=["tensorboard"])
    shown.figures({"bad": bad, "good": good}, 1)
    shown.scalars({"loss": 1.0}, 1)
    shown.close()
    (warning,) = messages(caplog)
    assert "tensorboard: something is left out" in warning
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["images"] == ["good"] and events.Tags()["scalars"] == ["loss"]


@pytest.mark.parametrize("part", ["figures", "samples", "learning_curve"])
def test_an_evaluation_outlives_what_shows_it(make_job, monkeypatch, caplog, part):
    def broken(*_, **__):
        raise RuntimeError("no such glyph")

    monkeypatch.setattr(report, part, broken)
    job = make_job(**{"run.test_limit": 3})
    scores = train.evaluate(job, "test", 3)
    assert scores.keys() == {"demo"} and (job.folder / "predictions/step-00000000/test_demo.jsonl").is_file()
    assert any("the figures of test_demo at step 0 are left out" in text for text in messages(caplog))


def test_a_run_whose_events_fail_learns_the_same(make_job, tmp_path, caplog):
    jobs = [make_job(tmp_path / name, **{"student.dropout": 0.0}) for name in ("fine", "full")]
    for job in jobs:
        with full_disk(5_000) if job is jobs[1] else full_disk(1 << 30):
            for _ in range(3):
                steps(job, 1)
                train.log(job)
                board.Board.text(job.board, "filler", "x" * 20_000, job.state.step)
    assert same(weights(jobs[0]), weights(jobs[1]))
    assert sum("tensorboard: no more until" in text for text in messages(caplog)) == 1
