"""What cannot be written at the end costs nothing else, is named, and is written by the same command."""

from __future__ import annotations

import json

import pytest
from harness import TRAIN, as_arguments, full_disk, launch, tiny

from ibdistill import train
from ibdistill.runtime.distributed import EXIT_UNWRITTEN
from ibdistill.training.checkpoint import Checkpoints

SETTINGS = {"optim.max_steps": 2, "run.test_limit": 3, "run.eval_every": 2, "run.eval_limit": 4}


def obstruct(folder, what: str) -> None:
    """Put a file where a folder belongs, or the other way round."""
    folder.mkdir(exist_ok=True)
    if what == "result.json":
        (folder / what).mkdir()
    else:
        (folder / what).write_text("a file")


@pytest.mark.parametrize("what", ["student", "predictions", "result.json"])
def test_the_same_command_writes_what_could_not_be_written(make_job, caplog, what):
    job = make_job(**SETTINGS)
    obstruct(job.folder, what)
    train.train(job)
    with pytest.raises(SystemExit) as ended:
        train.close(job)
    assert ended.value.code == EXIT_UNWRITTEN == 5
    error = next(r.getMessage() for r in caplog.records if "could not write" in r.getMessage())
    assert str(job.folder / what) in error and "start the same command again" in error
    assert (job.folder / "checkpoints/step-00000002/complete.json").is_file()
    path = job.folder / "result.json"
    if what == "result.json":
        path.rmdir()
    else:
        result = json.loads(path.read_text())
        assert (
            result["test"]["demo"].keys() >= {"accuracy"} and str(job.folder / what) in result["unwritten"][0]
        )
        (job.folder / what).unlink()

    again = make_job(**SETTINGS)
    assert again.state.step == 2 and not train.is_finished(again)
    train.train(again)
    train.close(again)
    result = json.loads(path.read_text())
    assert "unwritten" not in result and train.is_finished(again)
    if what != "result.json":
        assert result["valid"].keys() == {"demo"}  # of the earlier start
    assert (job.folder / "student/model.safetensors").is_file()
    assert (job.folder / "predictions/step-00000002/test_demo.jsonl").is_file()
    assert not list(job.folder.glob(".tmp-*"))


def test_a_full_disk_leaves_the_earlier_export_as_it_was(make_job, caplog):
    job = make_job(**SETTINGS)
    train.train(job)
    (job.folder / "student").mkdir()
    (job.folder / "student/model.safetensors").write_text("whole")
    with full_disk(40_000), pytest.raises(SystemExit) as ended:
        train.close(job)
    assert ended.value.code == EXIT_UNWRITTEN
    assert [p.name for p in (job.folder / "student").iterdir()] == ["model.safetensors"]
    assert (job.folder / "student/model.safetensors").read_text() == "whole"
    assert not list(job.folder.glob(".tmp-*")) and not train.is_finished(job)


def test_a_last_checkpoint_that_could_not_be_saved_is_named(make_job, monkeypatch, caplog):
    job = make_job(**SETTINGS)
    monkeypatch.setattr(Checkpoints, "wait", lambda _: False)
    train.train(job)
    with pytest.raises(SystemExit) as ended:
        train.close(job)
    assert ended.value.code == EXIT_UNWRITTEN
    assert json.loads((job.folder / "result.json").read_text())["unwritten"] == ["the checkpoint of step 2"]
    monkeypatch.undo()
    again = make_job(**SETTINGS)
    assert again.state.step == 0 and not train.is_finished(again)


def test_the_exit_code_of_the_command_says_it(tmp_path):
    """The real script, twice: the first time `student` is a file."""
    run, log = tmp_path / "run", tmp_path / "log"
    obstruct(run, "student")
    command = [TRAIN, *as_arguments(tiny(run, **SETTINGS))]
    assert launch(command, log=log) == EXIT_UNWRITTEN, log.read_text()[-4000:]
    assert "could not write" in log.read_text() and "Traceback" not in log.read_text()
    assert not (run / "run.lock").exists()
    (run / "student").unlink()
    assert launch(command, log=log) == 0, log.read_text()[-4000:]
    assert (run / "student/model.safetensors").is_file()
    assert launch(command, log=log) == 0 and "is finished already" in log.read_text()
