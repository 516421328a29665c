"""JSON lines and Weights & Biases beside TensorBoard; early stopping; the export on the hub."""

from __future__ import annotations

import json
import math
import time
import types

import pytest
from harness import full_disk

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.models import hub
from ibdistill.monitor.board import Board
from ibdistill.training import early_checks, results


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_json_lines_continue_without_gap_and_double(world, tmp_path):
    for first in (0, 4):  # killed at step 7, within a line, after the checkpoint of step 4
        board = Board(tmp_path, world, first, report_to=["jsonl"])
        for step in range(first + 1, 8 if first == 0 else 11):
            board.scalars({"loss/total": 10.0 * first + step, "grad/norm": math.nan}, step)
        board.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "loss' if first == 0 else "")
    want = [(s, s) for s in range(1, 5)] + [(s, 40 + s) for s in range(5, 11)]
    assert [(line["step"], line["loss/total"]) for line in lines(tmp_path)] == want
    assert {line["grad/norm"] for line in lines(tmp_path)} == {None}


@pytest.mark.parametrize("damage", [b"\xff\n", b"[1]\n", b'{"step": "x"}\n', b'{"step": null}\n', b"\n"])
def test_a_damaged_line_costs_itself_alone(world, tmp_path, caplog, damage):
    good = b'{"step": 1, "a": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + damage + good)
    Board(tmp_path, world, 5, report_to=["jsonl"]).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == good + good and not caplog.records


def test_one_full_reporter_leaves_the_others(world, tmp_path, caplog):
    board = Board(tmp_path, world, 0, report_to=["tensorboard", "jsonl"])
    with full_disk(200):
        for step in range(1, 100):
            board.scalars({"a": 1.0}, step)
    board.scalars({"a": 2.0}, 100)
    board.close()
    warnings = [record.getMessage() for record in caplog.records]
    assert sum("run.report_to jsonl: no more until the next start" in text for text in warnings) == 1
    Board(tmp_path, world, 100, report_to=["jsonl"]).close()  # the next start removes the line that was cut
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) < 12


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Weights & Biases writes to its folder alone."""
    for name, value in {"MODE": "offline", "SILENT": "true", "CACHE_DIR": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)


def test_weights_and_biases_get_scalars_texts_figures_and_the_summary(world, tmp_path, offline):
    """Through the library itself, offline: its file of records is not compressed, and media lie beside it."""
    from matplotlib.figure import Figure

    board = Board(tmp_path / "run", world, 0, report_to=["wandb"])
    board.scalars({"loss/total": 0.15625}, 1)
    board.text("samples", "a < b", 1)
    board.figures({"curve": Figure()}, 1)
    board.summary({"optim.lr": 0.28125}, {"eval/test_demo_accuracy": 0.78125, "eval/test_demo_x": 0.9})
    board.close()
    name = (tmp_path / "run/wandb/id").read_text()
    (started,) = (tmp_path / "run/wandb").glob(f"offline-run-*-{name}")
    (file,) = started.glob("*.wandb")
    wanted, until = (
        "loss/total 0.15625 optim.lr 0.28125 eval/test_demo_accuracy 0.78125",
        time.monotonic() + 60,
    )
    while missing := [text for text in wanted.split() if text.encode() not in file.read_bytes()]:
        assert time.monotonic() < until, missing  # the library's own process may write after `finish`
        time.sleep(0.1)
    records = file.read_bytes()
    assert b"eval/test_demo_x" not in records
    assert sorted(path.name.split("_")[0] for path in started.glob("files/media/*/*")) == ["curve", "samples"]


def test_a_run_that_continues_keeps_its_identity(world, tmp_path, monkeypatch):
    import wandb

    given = []

    def init(**settings):
        given.append((settings["id"], settings["resume"], settings["dir"]))
        return types.SimpleNamespace(define_metric=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setattr(wandb, "init", init)
    for run, step in (("a", 0), ("a", 5), ("b", 0)):
        Board(tmp_path / run, world, step, report_to=["wandb"]).close()
    first, again, other = given
    assert first == again and first[1:] == ("allow", tmp_path / "a") and first[0] != other[0]


def test_a_library_that_fails_is_a_warning(world, tmp_path, monkeypatch, caplog):
    import wandb

    def refuses(**_):
        raise wandb.errors.UsageError("no key")

    monkeypatch.setattr(wandb, "init", refuses)
    board = Board(tmp_path, world, 0, report_to=["wandb", "jsonl"])
    board.scalars({"a": 1.0}, 1)
    board.close()
    assert "run.report_to wandb: something is left out" in caplog.text and "no key" in caplog.text
    assert lines(tmp_path) == [{"step": 1, "a": 1.0}]


def test_a_run_reports_the_same_numbers_everywhere(make_job):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = make_job(**{"optim.max_steps": 4, "run.log_every": 2, "run.eval_every": 2, "run.eval_limit": 3})
    train.train(job)
    job.board.close()
    events = EventAccumulator(str(job.folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = [(tag, line["step"], v) for line in lines(job.folder) for tag, v in line.items()]
    written = [(tag, step, value) for tag, step, value in found if tag != "step"]
    for tag, step, value in written:
        assert any(e.step == step and e.value == pytest.approx(value, rel=1e-6) for e in events.Scalars(tag))
    assert {tag for tag, _, _ in written} == set(events.Tags()["scalars"])


def test_a_run_ends_after_evaluations_without_a_better_score(make_job, monkeypatch, caplog):
    scores = iter([0.2, 0.4, 0.4, 0.3, 0.9])
    monkeypatch.setattr(train, "evaluate", lambda *_: {"demo": next(scores)})
    job = make_job(**{"optim.max_steps": 40, "run.eval_every": 3, "run.patience": 2, "run.save_every": 40})
    train.train(job)
    assert (job.state.step, job.state.best_step, job.state.best_score) == (12, 6, 0.4)
    assert "no better validation score since step 6" in caplog.text
    again = make_job(**{"optim.max_steps": 40, "run.eval_every": 3, "run.patience": 2, "run.save_every": 40})
    assert again.state.step == 12 and train.is_over(again)


def refused(**settings: object) -> str:
    given = {name.replace("__", "."): value for name, value in settings.items()}
    with pytest.raises(ValueError) as error:
        early_checks.check(load_settings(None, given))
    return str(error.value)


def test_settings_that_cannot_be_met_are_refused_at_the_start(monkeypatch):
    assert "run.eval_every is 0" in refused(run__patience=2)
    assert "run.export is false" in refused(run__push_to_hub="me/it", run__export=False)
    assert "run.report_to is 'tensorbord'" in refused(run__report_to="tensorbord")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(run__push_to_hub="me/it")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert "set HF_TOKEN" in refused(run__push_to_hub="me/it")
    for name in ("a/b/c", "-x", "a b", "/tmp/x"):
        assert "is no name of a repository" in refused(run__push_to_hub=name)
    monkeypatch.setattr(early_checks.importlib.util, "find_spec", lambda _: None)
    assert "pip install" in refused(run__report_to="wandb")


class FakeHub:
    endpoint = "https://hub"
    calls: tuple = ()

    def __init__(self, library_name):
        FakeHub.calls = ()

    def create_repo(self, name, *, private, exist_ok):
        assert private and exist_ok
        return types.SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        FakeHub.calls = (repo_id, sorted(path.name for path in folder_path.iterdir()))


def test_the_export_is_sent_to_the_hub(make_job, monkeypatch, caplog):
    monkeypatch.setattr(hub, "HfApi", FakeHub)
    job = make_job(**{"run.push_to_hub": "pupil"})
    results.export_student(job)
    assert FakeHub.calls[0] == "me/pupil" and {"README.md", "model.safetensors"} <= set(FakeHub.calls[1])
    assert "the student is at https://hub/me/pupil" in caplog.text and not job.unwritten


def test_a_hub_that_refuses_leaves_the_export_and_says_so(make_job, monkeypatch):
    def full(*_, **__):
        raise OSError("quota")

    monkeypatch.setattr(FakeHub, "upload_folder", full)
    monkeypatch.setattr(hub, "HfApi", FakeHub)
    job = make_job(**{"run.push_to_hub": "pupil"})
    results.export_student(job)
    assert (job.folder / "student/model.safetensors").is_file()
    assert any("quota" in text for text in job.unwritten)
