"""The lock of a run folder: who has it, when it is taken over, and when it is given back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from harness import TRAIN, Forked, alone, as_arguments, kill_session, launch, start, tiny

from ibdistill.runtime import folder_lock, processes
from ibdistill.runtime.folder_lock import NAME, STALE_SECONDS, FolderLock


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(folder_lock, "_SETTLE_SECONDS", 0.05)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def put_lock(folder, age: float = 0.0, **content) -> None:
    """A lock that another process left: by default one that is alive, on another machine."""
    ours = FolderLock(folder)._content
    other = {"host": "node7", "pid": 4711, "start": 1, "namespace": "another", "token": "other"}
    (folder / NAME).write_text(json.dumps(ours | other | content))
    then = time.time() - age
    os.utime(folder / NAME, (then, then))


def holder_of(folder) -> str:
    return json.loads((folder / NAME).read_text())["token"]


def refused(folder) -> str:
    with pytest.raises(ValueError) as error:
        FolderLock(folder).acquire()
    assert not list(folder.glob(".tmp-*"))
    return str(error.value)


def test_the_second_is_told_who_has_the_folder(tmp_path):
    first = FolderLock(tmp_path / "run")
    first.acquire()
    message = refused(tmp_path / "run")
    assert re.search(
        rf"run is in use by process {os.getpid()} on \S+, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", message
    )
    assert "choose another --run.dir" in message
    first.release()
    first.release()
    assert not (tmp_path / "run" / NAME).exists()
    second = FolderLock(tmp_path / "run")
    second.acquire()
    second.release()


def test_nobody_gives_back_the_lock_of_another(tmp_path):
    put_lock(tmp_path)
    lock = FolderLock(tmp_path)
    with pytest.raises(ValueError, match="in use by process 4711 on node7"):
        lock.acquire()
    lock.release()
    assert holder_of(tmp_path) == "other"


@pytest.mark.parametrize("dead", ["killed", "not yet waited for", "its number is another process's by now"])
def test_a_dead_process_of_this_machine_loses_its_lock_at_once(tmp_path, dead):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    here = {"pid": child.pid, "start": processes.start_time(child.pid), "namespace": processes.namespace()}
    put_lock(tmp_path, age=10 * STALE_SECONDS, **here)
    assert f"in use by process {child.pid}" in refused(tmp_path)  # its silence does not count: it is alive
    if dead == "its number is another process's by now":
        put_lock(tmp_path, **here | {"start": here["start"] - 1})
    else:
        child.kill()
        if dead == "killed":
            child.wait()
        else:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert holder_of(tmp_path) == lock._content["token"]
    lock.release()
    child.kill()
    child.wait()


@pytest.mark.parametrize(
    ("age", "taken"),
    [
        (0, False),
        (STALE_SECONDS - 20, False),
        (STALE_SECONDS + 20, True),
        (20 - STALE_SECONDS, False),  # the clock was set back a little
        (-10 * STALE_SECONDS, True),  # and further than a job that is alive stays silent
    ],
)
@pytest.mark.parametrize("content", ["whole", "binary", "a list", "empty", "endless"])
def test_a_lock_of_another_machine_counts_until_it_is_silent(tmp_path, age, taken, content):
    put_lock(tmp_path, age)
    damaged = {"binary": b"\xff\x00", "a list": b"[]", "empty": b"", "endless": b'{"host": "' + b"a" * 10**5}
    if content in damaged:
        (tmp_path / NAME).write_bytes(damaged[content])
        os.utime(tmp_path / NAME, (time.time() - age,) * 2)
    if taken:
        lock = FolderLock(tmp_path)
        lock.acquire()
        assert holder_of(tmp_path) == lock._content["token"]
        lock.release()
    else:
        who = "process 4711 on node7" if content == "whole" else "a job that has not written its name"
        assert f"in use by {who}" in refused(tmp_path)


def test_a_pipe_is_no_lock(tmp_path):
    os.mkfifo(tmp_path / NAME)
    assert "run.lock is a named pipe, a device or a socket, and a file belongs there; rem" in refused(
        tmp_path
    )


@pytest.mark.parametrize(
    ("job", "restart", "taken"), [("88", "1", True), ("88", "0", False), ("89", "1", False)]
)
def test_a_requeued_slurm_job_takes_its_own_lock_over_at_once(tmp_path, monkeypatch, job, restart, taken):
    put_lock(tmp_path, job="88", restart="0")
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    if taken:
        lock = FolderLock(tmp_path)
        lock.acquire()
        lock.release()
    else:
        assert "node7, Slurm job 88, since" in refused(tmp_path)


def test_of_two_that_take_a_stale_lock_over_one_has_it(tmp_path, monkeypatch):
    """The other one's write comes between ours and our second look."""
    put_lock(tmp_path, age=STALE_SECONDS + 1)
    monkeypatch.setattr(folder_lock.time, "sleep", lambda _: put_lock(tmp_path, host="node8"))
    assert "in use by process 4711 on node8" in refused(tmp_path)
    assert holder_of(tmp_path) == "other"


def test_the_holder_touches_its_lock_and_ends_when_it_has_lost_it(tmp_path):
    code = f"""
import sys, time
from ibdistill.runtime import folder_lock
folder_lock.BEAT_SECONDS = 0.05
from pathlib import Path
folder_lock.FolderLock(Path({str(tmp_path)!r})).acquire()
print("has it", flush=True)
time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=alone())
    while "has it" not in child.stdout.readline():
        assert child.poll() is None
    os.utime(tmp_path / NAME, (0, 0))
    deadline = time.monotonic() + 60
    while (tmp_path / NAME).stat().st_mtime < time.time() - 60 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / NAME).stat().st_mtime > time.time() - 60
    put_lock(tmp_path)
    assert child.wait(60) == 2


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run.dir is '.*file/run', which cannot be written"):
        FolderLock(tmp_path / "file" / "run").acquire()


def test_two_jobs_on_one_folder(tmp_path):
    """The real script: the second is refused, a killed one's lock is taken over, a signal gives it back."""
    run, log, second = tmp_path / "run", tmp_path / "log", tmp_path / "second"
    command = [TRAIN, *as_arguments(tiny(run, **{"optim.max_steps": 4000, "run.report_to": []}))]

    def first_steps(process: Forked) -> None:
        deadline = time.monotonic() + 300
        while "step " not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)

    first = start(command, log=log)
    first_steps(first)
    assert launch(command, log=second) == 2
    said = second.read_text()
    assert f"error: {run} is in use by process {first.pid} on " in said and "Traceback" not in said
    kill_session(first)
    assert (run / NAME).exists()
    first = start(command, log=log)
    first_steps(first)
    assert "is taken over" in log.read_text()
    first.send_signal(signal.SIGTERM)
    assert first.wait(300) == 143 and not (run / NAME).exists()
