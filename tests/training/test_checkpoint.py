"""Checkpoints: what counts, what is refused, and what a failed write costs."""

from __future__ import annotations

import json
import shutil

import pytest
from harness import full_disk, same, steps, weights

from ibdistill.config.load import load_settings, to_yaml
from ibdistill.runtime import version
from ibdistill.training import checkpoint, run_folder


def test_a_restored_job_continues_as_if_nothing_had_happened(make_job):
    job = make_job()
    steps(job, 3)
    job.state.tokens = 123
    assert job.checkpoints.save(job.engine, job.state)
    steps(job, 3)
    expected = weights(job)

    again = make_job()
    assert (again.state.step, again.state.tokens) == (3, 123)
    steps(again, 3)
    assert same(weights(again), expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "mp_rank_00_model_states.pt").write_bytes(b"short"), "has 5 bytes instead of"),
        (lambda f: next(f.glob("*optim_states.pt")).unlink(), "optim_states.pt is missing"),
        (lambda f: (f / checkpoint.MARKER).unlink(), "it has no complete.json"),
        (lambda f: (f / checkpoint.MARKER).write_text("{"), "its complete.json is damaged"),
        (lambda f: (f / checkpoint.MARKER).write_text('{"step": 2, "files": {}}'), "is that of step 2"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(make_job, caplog, damage, message):
    sharded = {"deepspeed.config": "zero2"}  # its optimizer states are files of their own
    job = make_job(**sharded)
    for _ in range(2):
        steps(job, 2)
        job.checkpoints.save(job.engine, job.state)
    damage(job.checkpoints.folder / "step-00000004")
    assert make_job(**sharded).state.step == 2
    refused = [r.getMessage() for r in caplog.records if "is not used" in r.getMessage()]
    assert len(refused) == 1 and "step-00000004" in refused[0] and message in refused[0]


def test_a_foreign_folder_is_refused(make_job, caplog):
    job = make_job()
    steps(job, 1)
    job.checkpoints.save(job.engine, job.state)
    foreign = job.checkpoints.folder / "step-00000009"
    foreign.mkdir()
    (foreign / "pytorch_model.bin").write_bytes(b"x")
    assert "was not written by ibdistill" in checkpoint.problem_with(foreign)
    assert make_job().state.step == 1


def test_another_number_of_ranks_is_refused(make_job):
    job = make_job()
    steps(job, 1)
    job.checkpoints.save(job.engine, job.state)
    marker = job.checkpoints.folder / "step-00000001" / checkpoint.MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"world_size": 3}))
    with pytest.raises(
        ValueError, match=r"step-00000001 was written by 3 ranks and this run has 1.*that number"
    ):
        make_job()


def test_the_last_ones_and_the_best_are_kept(make_job):
    job = make_job(**{"run.keep_last": 2})
    for step in range(1, 6):
        steps(job, 1)
        if step == 2:
            job.state.best_step, job.state.best_score = 2, 0.5
        job.checkpoints.save(job.engine, job.state)
    kept = sorted(path.name for path in job.checkpoints.folder.iterdir())
    assert kept == ["step-00000002", "step-00000004", "step-00000005"]
    assert job.checkpoints.restore(job.engine, 2).step == 2


@pytest.mark.parametrize("obstacle", ["full disk", "folder cannot be made"])
def test_a_failed_write_loses_neither_the_run_nor_the_checkpoint_before(make_job, tmp_path, caplog, obstacle):
    undisturbed = make_job(tmp_path / "undisturbed")
    steps(undisturbed, 4)

    job = make_job()
    steps(job, 2)
    assert job.checkpoints.save(job.engine, job.state)
    steps(job, 1)
    target = job.checkpoints.folder / "step-00000003"
    if obstacle == "full disk":
        with full_disk(20_000):
            assert not job.checkpoints.save(job.engine, job.state)
    else:
        target.write_text("a file where the folder should be")
        assert not job.checkpoints.save(job.engine, job.state)
        target.unlink()
    assert not target.exists()
    assert checkpoint.problem_with(job.checkpoints.folder / "step-00000002") is None
    assert any("not saved, training goes on: rank 0" in r.getMessage() for r in caplog.records)
    steps(job, 1)
    assert same(weights(job), weights(undisturbed))
    assert job.checkpoints.save(job.engine, job.state)
    assert make_job().state.step == 4


def test_a_run_folder_of_another_configuration_is_refused(make_job):
    make_job()
    with pytest.raises(
        ValueError, match=r"another configuration: optim.lr was 0.002 and is 0.1. Choose another"
    ):
        make_job(**{"optim.lr": 0.1})
    make_job(**{"run.log_every": 7})
    assert make_job(**{"optim.lr": 0.1, "run.allow_config_change": True}).config.optim.lr == 0.1


def test_other_code_may_continue_a_run_and_config_yaml_names_each(make_job, monkeypatch):
    """The lines are comments: no settings that could differ, and the file stays a recipe."""
    first = make_job()
    path = first.folder / "config.yaml"
    ours = "# ibdistill {version}, commit {commit}".format_map(version.version())
    assert path.read_text() == f"{ours}\n" + to_yaml(first.config)
    again = make_job()
    assert path.read_text() == f"{ours}\n" + to_yaml(again.config)
    monkeypatch.setattr(run_folder, "version", lambda: {"version": "9.9", "commit": "abc-dirty"})
    make_job()
    heads = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert heads == [ours, "# ibdistill 9.9, commit abc-dirty"]
    assert load_settings(str(path), {}) == first.config


def test_an_unwritable_run_folder_is_refused(make_job, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run.dir is '.*file/run', which cannot be written"):
        make_job(tmp_path / "file" / "run")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("just text")
    with pytest.raises(ValueError, match=r"config.yaml is damaged"):
        make_job()
