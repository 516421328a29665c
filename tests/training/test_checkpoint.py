"""Checkpoints: what counts, what is refused, and what a failed write costs."""

from __future__ import annotations

import json
import re
import shutil
import socket
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from harness import full_disk, remark, same, steps, tiny, weights

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.training import checkpoint, checkpoint_write
from ibdistill.training.checkpoint_marker import MARKER, read_marker
from ibdistill.training.prepare import prepare

SHARDED = {"deepspeed.config": "zero2"}  # its optimizer states are files of their own


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of a run that was saved at steps 2 and 4, and its weights at step 2."""
    folder = tmp_path_factory.mktemp("saved")
    job = prepare(load_settings(None, tiny(folder, **SHARDED)), world)
    steps(job, 2)
    assert job.checkpoints.save(job.engine, job.state)
    at_2 = weights(job)
    steps(job, 2)
    assert job.checkpoints.save(job.engine, job.state)
    job.board.close()
    job.engine.destroy()
    return folder, at_2


@pytest.fixture
def with_damage(saved, make_job, tmp_path, caplog):
    """A function that damages the newest checkpoint of a copy of `saved`; what was said, when it resumed from
    the one before."""

    def resumed(damage: Callable[[Path], object]) -> str:
        shutil.copytree(saved[0], tmp_path / "run")
        damage(tmp_path / "run/checkpoints/step-00000004")
        again = make_job(**SHARDED)
        assert again.state.step == 2 and same(weights(again), saved[1])
        (refused,) = [r.getMessage() for r in caplog.records if "is not used" in r.getMessage()]
        assert "step-00000004" in refused and len(refused) < len(str(again.checkpoints.folder)) + 400
        return refused

    return resumed


def zeroed(path: Path) -> None:
    """Leave the file as some file systems do after a power failure, with its size but without its content."""
    path.write_bytes(bytes(path.stat().st_size))


def with_one_bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


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
        (lambda f: (f / MARKER).unlink(), "it has no complete.json"),
        (lambda f: (f / MARKER).write_text("{"), "its complete.json is damaged"),
        (lambda f: (f / MARKER).write_text('{"step": 2, "files": {}}'), "is that of step 2"),
        (lambda f: (f / MARKER).write_bytes(b"\xff\x00"), "its complete.json is damaged"),
        (lambda f: (f / MARKER).write_text("[4]"), "its complete.json is damaged"),
        (
            lambda f: (f / MARKER).write_text('{"step": 4, "files": [1]}'),
            "its complete.json is damaged",
        ),
        (lambda f: zeroed(f / "mp_rank_00_model_states.pt"), "the content of mp_rank_00_model_states.pt has"),
        (
            lambda f: zeroed(next(f.glob("*optim_states.pt"))),
            "optim_states.pt has changed since it was written",
        ),
        (
            lambda f: with_one_bit_flipped(f / "mp_rank_00_model_states.pt"),
            "has changed since it was written",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(with_damage, damage, message):
    assert message in with_damage(damage)


def rewritten(folder: Path, pattern: str, change: Callable[[dict], object]) -> None:
    """Change what a file of a checkpoint holds, and the marker with it, so that no checksum is wrong."""
    (path,) = folder.glob(pattern)
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
    remark(path)


def torn(folder: Path, pattern: str) -> None:
    """The file was already garbage when its checksum was computed."""
    (path,) = folder.glob(pattern)
    path.write_bytes(path.read_bytes()[:1000])
    remark(path)


def without_checksums(folder: Path, pattern: str) -> None:
    """A zeroed file below a marker from before there were checksums."""
    (path,) = folder.glob(pattern)
    zeroed(path)
    content = json.loads((folder / MARKER).read_text())
    content["files"] = {name: file["bytes"] for name, file in content["files"].items()}
    (folder / MARKER).write_text(json.dumps(content))


MODEL, SHARD = "mp_rank_00_model_states.pt", "*optim_states.pt"


def shrink_a_weight(content: dict) -> None:
    name = next(iter(content["module"]))
    content["module"][name] = content["module"][name][:1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: torn(f, MODEL), "mp_rank_00_model_states.pt cannot be loaded: RuntimeError"),
        (lambda f: torn(f, SHARD), "optim_states.pt cannot be loaded: RuntimeError"),
        (lambda f: without_checksums(f, SHARD), "optim_states.pt cannot be loaded: "),
        (lambda f: rewritten(f, MODEL, shrink_a_weight), "model_states.pt cannot be loaded: RuntimeError"),
        (lambda f: rewritten(f, MODEL, lambda c: c.pop("ibdistill")), "cannot be loaded: KeyError: 'ibdi"),
        (
            lambda f: rewritten(f, MODEL, lambda c: c["ibdistill"].update(new=1)),
            "cannot be loaded: TypeError",
        ),
        (lambda f: rewritten(f, MODEL, lambda c: c["rng"].clear()), "cannot be loaded: IndexError"),
        (lambda f: rewritten(f, MODEL, lambda c: c.pop("lr_scheduler")), "KeyError: 'lr_scheduler'"),
        (
            lambda f: rewritten(f, SHARD, lambda c: c["optimizer_state_dict"].clear()),
            "optim_states.pt cannot",
        ),
    ],
)
def test_files_that_are_whole_but_do_not_load_are_named_and_the_one_before_is_used(
    with_damage, damage, message
):
    assert message in with_damage(damage)


def test_loading_goes_back_over_two_and_ends_where_none_is_left(make_job, caplog):
    """The weights may be partly those of a file by then, so the run does not start afresh with them."""
    job = make_job(**{"run.keep_last": 3})
    for _ in range(3):
        steps(job, 1)
        job.checkpoints.save(job.engine, job.state)
    folder = job.checkpoints.folder
    for step in (3, 2):
        rewritten(folder / f"step-0000000{step}", MODEL, lambda content: content.pop("optimizer"))
    assert make_job().state.step == 1
    torn(folder / "step-00000001", MODEL)
    with pytest.raises(
        ValueError, match="step-00000003: .*model_states.pt cannot be loaded: KeyError.*"
    ) as e:
        make_job()
    assert "there is no checkpoint before it" in str(e.value) and f"delete {folder}" in str(e.value)


def test_a_marker_holds_every_files_size_and_checksum(make_job):
    job = make_job()
    steps(job, 1)
    job.checkpoints.save(job.engine, job.state)
    folder = job.checkpoints.folder / "step-00000001"
    contents = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARKER}
    assert json.loads((folder / MARKER).read_text()) == {
        "step": 1,
        "world_size": 1,
        "zero_optimization": {"stage": 0},
        "files": {name: {"bytes": len(c), "crc32": zlib.crc32(c)} for name, c in contents.items()},
    }
    assert len(contents) >= 1


def test_a_marker_from_before_there_were_checksums_still_counts(make_job):
    job = make_job()
    steps(job, 1)
    job.checkpoints.save(job.engine, job.state)
    marker = job.checkpoints.folder / "step-00000001" / MARKER
    content = json.loads(marker.read_text())
    content["files"] = {name: file["bytes"] for name, file in content["files"].items()}
    marker.write_text(json.dumps(content))
    assert make_job().state.step == 1


def test_the_best_checkpoint_is_not_replaced_by_another_if_it_is_damaged(make_job, capsys):
    job = make_job(**{"run.final": "best", "run.keep_last": 1, "run.test_limit": 3})
    for step in range(1, 3):
        steps(job, 1)
        if step == 1:
            job.state.best_step, job.state.best_score = 1, 0.5
        job.checkpoints.save(job.engine, job.state)
    zeroed(job.checkpoints.folder / "step-00000001" / "mp_rank_00_model_states.pt")
    with pytest.raises(SystemExit) as ended:
        train.close(job)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "step-00000001, the best one, cannot be used: the content of mp_rank_00" in message
    assert "--run.final last" in message and not (job.folder / "result.json").exists()


def test_a_foreign_folder_is_refused(make_job, caplog):
    job = make_job()
    steps(job, 1)
    job.checkpoints.save(job.engine, job.state)
    foreign = job.checkpoints.folder / "step-00000009"
    foreign.mkdir()
    (foreign / "pytorch_model.bin").write_bytes(b"x")
    assert "was not written by ibdistill" in checkpoint.problem_with(foreign)
    assert make_job().state.step == 1


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
    (said,) = (m for r in caplog.records if "not saved, training goes on: rank 0" in (m := r.getMessage()))
    assert ("where a disk is full" in said) == (obstacle == "full disk")
    steps(job, 1)
    assert same(weights(job), weights(undisturbed))
    assert job.checkpoints.save(job.engine, job.state)
    assert make_job().state.step == 4


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Until it is set, no file of a checkpoint is written beside the steps."""
    event, write = threading.Event(), torch.save

    def waiting(*args, **kwargs) -> None:
        assert not threading.current_thread().name.startswith("checkpoint") or event.wait(60)
        write(*args, **kwargs)

    monkeypatch.setattr(torch, "save", waiting)
    yield event
    event.set()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_a_checkpoint_is_written_beside_the_steps_that_follow(make_job, gate, stage, precision):
    settings = {"deepspeed.config": f"zero{stage}", "student.precision": precision}
    job = make_job(**settings)
    steps(job, 2)
    expected = weights(job)
    job.checkpoints.begin(job.engine, job.state)
    steps(job, 1)
    job.checkpoints.poll()
    assert not list(job.checkpoints.folder.glob("*/*"))  # no file yet, and no marker
    straight = weights(job)
    gate.set()
    assert job.checkpoints.wait()
    again = make_job(**settings)
    assert again.state.step == 2 and same(weights(again), expected)
    steps(again, 1)
    assert same(weights(again), straight)


def test_there_is_one_checkpoint_at_a_time_and_polling_completes_it(make_job, gate):
    job = make_job(**{"run.keep_last": 5})
    folder = job.checkpoints.folder
    gate.set()
    for step in (1, 2):
        steps(job, 1)
        job.checkpoints.begin(job.engine, job.state)
        assert checkpoint.problem_with(folder / f"step-{step - 1:08d}") is None or step == 1
    deadline = time.monotonic() + 60
    while checkpoint.problem_with(folder / "step-00000002") is not None:
        job.checkpoints.poll()
        assert time.monotonic() < deadline
    assert job.checkpoints.wait()  # there is nothing to wait for


def test_a_write_that_fails_beside_the_steps_is_told_at_the_next(make_job, gate, caplog):
    job = make_job()
    gate.set()
    steps(job, 1)
    assert job.checkpoints.save(job.engine, job.state)
    gate.clear()
    steps(job, 1)
    job.checkpoints.begin(job.engine, job.state)
    with full_disk(20_000):
        gate.set()
        while not caplog.records or "not saved" not in caplog.records[-1].getMessage():
            steps(job, 1)
            job.checkpoints.poll()
    assert "checkpoint of step 2 not saved, training goes on: rank 0: " in caplog.records[-1].getMessage()
    assert [path.name for path in job.checkpoints.folder.iterdir()] == ["step-00000001"]


def test_where_a_copy_does_not_fit_the_file_is_written_first(make_job, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint_write, "free_memory", lambda device, ranks_on_node: 10_000)
    job = make_job()
    steps(job, 1)
    job.checkpoints.begin(job.engine, job.state)
    folder = job.checkpoints.folder / "step-00000001"
    assert (folder / "mp_rank_00_model_states.pt").stat().st_size > 10_000
    text = "mp_rank_00_model_states.pt is written before the next step: a copy of its 0.0"
    assert any(text in record.getMessage() for record in caplog.records)
    assert job.checkpoints.wait() and checkpoint.problem_with(folder) is None


@pytest.fixture
def local() -> Iterator[Path]:
    """A folder on another file system than that of the runs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("room", [1 << 40, 10_000], ids=["with room for a copy", "without"])
def test_a_file_goes_through_the_nodes_disk_without_a_name_there(make_job, local, monkeypatch, caplog, room):
    """With a copy in memory or not, the step goes on while the run's folder has nothing yet."""
    go_on, copy_to = threading.Event(), checkpoint_write.copy_to
    monkeypatch.setattr(checkpoint_write, "copy_to", lambda *given: go_on.wait(60) and copy_to(*given))
    monkeypatch.setattr(checkpoint_write, "free_memory", lambda device, ranks_on_node: room)
    # with a copy a thread stages both files once both are handed over; without, `begin` stages them itself
    has_begun, staged = threading.Event(), checkpoint_write.Writing._staged
    if room == 10_000:
        has_begun.set()
    monkeypatch.setattr(
        checkpoint_write.Writing, "_staged", lambda *given: has_begun.wait(60) and staged(*given)
    )
    job = make_job(**SHARDED, **{"run.local_dir": str(local)})
    steps(job, 2)
    job.checkpoints.begin(job.engine, job.state)
    has_begun.set()
    told = f"model_states.pt is written to {local} before the next step: a copy of its 0.0"
    assert any(told in record.getMessage() for record in caplog.records) == (room == 10_000)
    writing = job.checkpoints._begun.writing
    while len(writing._begun) < (4 if room > 10_000 else 2):  # both files are staged
        time.sleep(0.01)
    opened = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.exists()]
    assert sum(path.parent == local for path in opened) == 2 and not list(local.iterdir())
    job.checkpoints.poll()
    folder = job.checkpoints.folder / "step-00000002"
    assert not list(folder.iterdir())
    expected = weights(job)
    steps(job, 1)
    go_on.set()
    assert job.checkpoints.wait() and checkpoint.problem_with(folder) is None
    marker = read_marker(folder)
    assert {n: f.crc32 for n, f in marker.files.items()} == {
        n: zlib.crc32((folder / n).read_bytes()) for n in marker.files
    }
    again = make_job(**SHARDED)  # a run may leave the setting out
    assert again.state.step == 2 and same(weights(again), expected)
    steps(again, 1)
    assert same(weights(again), weights(job))


def test_where_the_nodes_disk_is_full_the_file_goes_to_the_runs_folder(make_job, local, monkeypatch, caplog):
    job = make_job(**{"run.local_dir": str(local)})
    steps(job, 1)
    full = Path("/dev/full")
    monkeypatch.setattr(checkpoint_write.tempfile, "TemporaryFile", lambda dir: full.open("r+b"))
    job.checkpoints.begin(job.engine, job.state)
    assert job.checkpoints.wait()
    assert checkpoint.problem_with(job.checkpoints.folder / "step-00000001") is None
    (told,) = [r.getMessage() for r in caplog.records if "could not take it" in r.getMessage()]
    assert told.startswith("mp_rank_00_model_states.pt is written to the run's folder at once, as /dev/shm/")
    assert make_job().state.step == 1


def test_a_copy_that_fails_is_told_and_the_last_checkpoint_needs_no_copy(
    make_job, local, monkeypatch, caplog
):
    job = make_job(**{"run.local_dir": str(local)})

    def fails(path: Path, source: object) -> int:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_write, "copy_to", fails)
    steps(job, 1)
    job.checkpoints.begin(job.engine, job.state)
    assert not job.checkpoints.wait() and not list(job.checkpoints.folder.iterdir())
    assert "checkpoint of step 1 not saved, training goes on: rank 0: " in caplog.records[-1].getMessage()
    assert "No space left on device" in caplog.records[-1].getMessage()
    assert job.checkpoints.save(job.engine, job.state) and make_job().state.step == 1


def test_a_local_folder_that_cannot_serve_is_refused(make_job, tmp_path, monkeypatch, local):
    monkeypatch.delenv("NO_SUCH", raising=False)
    way_out = "Give a folder on each node's own disk, such as \\$SLURM_TMPDIR, or leave it out"
    for given in ("$NO_SUCH/here", str(local / "missing"), "/proc"):
        said = f"run.local_dir is {given!r}, which {socket.gethostname()} cannot write to: [Errno"
        with pytest.raises(ValueError, match=f"{re.escape(said)}.*{way_out}"):
            make_job(**{"run.local_dir": given})
    for folder in (tmp_path, tmp_path / "run"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(
            ValueError, match="a folder of the same file system as run.dir, so files would only"
        ):
            make_job(**{"run.local_dir": str(folder)})
    monkeypatch.setenv("MINE", str(local))
    assert make_job(**{"run.local_dir": "$MINE"}).checkpoints._local == local
    assert "local_dir: $MINE" in (tmp_path / "run/config.yaml").read_text()  # another job has another folder


def test_tied_weights_stay_one_in_the_copy():
    tied = torch.ones(3)
    first = {"a": [tied, {"b": tied}], "c": torch.ones(3), "d": ("kept", 1)}
    kept = []
    writing = checkpoint_write.Writing(lambda state, path: kept.append(state), beside=True)
    writing.save(first, "/nowhere")
    tied += 1
    writing.wait()
    (copied,) = kept
    assert copied["a"][0] is copied["a"][1]["b"] and copied["a"][0] is not copied["c"]
    assert copied["a"][0].tolist() == [1, 1, 1] and copied["d"] == ("kept", 1)
    assert len(writing.errors) == 1 and "/nowhere" in writing.errors[0]  # its checksum


def test_every_so_many_steps_one_is_kept(make_job):
    job = make_job(**{"run.keep_last": 1, "run.save_every": 1, "run.keep_every": 2})
    for _ in range(5):
        steps(job, 1)
        job.checkpoints.save(job.engine, job.state)
    kept = sorted(path.name for path in job.checkpoints.folder.iterdir())
    assert kept == ["step-00000002", "step-00000004", "step-00000005"]
    with pytest.raises(ValueError, match="run.keep_every is 3, and run.save_every 2 does not divide it"):
        make_job(**{"run.save_every": 2, "run.keep_every": 3})
