"""Ranks of DeepSpeed's real launcher: they end with it, and they meet no other run's ranks."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from harness import ROOT, alone, kill_session, start

from ibdistill.runtime import distributed, launcher, processes

RANK = """
import os, sys, time
from ibdistill.runtime import launcher, startup
startup.hold_requeue_signal()
launcher.end_with_launcher()
sys.stdout.write("started\\n")  # whole lines: the launcher's ranks write without a buffer to one file
if sys.argv[-1] == "importing":
    time.sleep(600)
from ibdistill.runtime import distributed
try:
    world = distributed.init()
except SystemExit as end:
    distributed.exit_at_once(end.code)  # as the entry points do
port, names = os.environ["MASTER_PORT"], distributed.gather_objects(sys.argv[-2])
sys.stdout.write(f"met at {port} {names}\\n")
time.sleep(float(sys.argv[-1]))
"""


VICTIMS = ("deepspeed", "deepspeed.launcher.launch")


@pytest.fixture
def launched(tmp_path):
    """Starts RANK on two ranks of a launcher, which is killed at the end with all its ranks."""
    script, running = tmp_path / "rank.py", []
    script.write_text(RANK)

    def begin(name: str, what: str, *options: str) -> tuple[subprocess.Popen, Path]:
        log = tmp_path / f"{name}.log"
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", "2", *options]
        with log.open("w") as output:
            running.append(
                subprocess.Popen(
                    [*command, str(script), name, what],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=alone() | {"OMP_NUM_THREADS": "1"},
                    start_new_session=True,
                    cwd=ROOT,
                )
            )
        return running[-1], log

    yield begin
    for process in running:
        try:
            kill_session(process)
        except ProcessLookupError:
            process.wait()


def wait_for(log: Path, text: str, count: int = 2, seconds: float = 300) -> str:
    deadline = time.monotonic() + seconds
    while log.read_text().count(text) < count:
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)
    return log.read_text()


def kill_and_see_its_ranks_end(process: subprocess.Popen, victim: str) -> None:
    """kill -9 of the command itself (deepspeed), or of the process that it starts."""
    (launch,) = psutil.Process(process.pid).children()
    ranks = launch.children()
    assert len(ranks) == 2
    os.kill(process.pid if victim == "deepspeed" else launch.pid, signal.SIGKILL)
    assert launcher._WATCH_SECONDS <= 0.5  # so often they look; a busy machine may let them wait for longer
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not [p for p in alive if processes.start_time(p.pid)]  # one that nobody waits for has ended too


@pytest.mark.parametrize("victim", VICTIMS)
def test_ranks_end_with_their_launcher_while_they_import(launched, victim):
    process, log = launched("a", "importing")
    wait_for(log, "started")
    kill_and_see_its_ranks_end(process, victim)


def test_two_jobs_of_one_machine_meet_at_ports_of_their_own_and_end_with_their_launchers(launched):
    """Nobody has chosen a port; another program listens on the launcher's default one."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):  # where another program of this machine listens there already
            taken.bind(("127.0.0.1", int(launcher.DEFAULT_PORT)))
            taken.listen()
        jobs = launched("a", "600"), launched("b", "600")
        met = [re.findall(r"met at (\d+) (.*)", wait_for(log, "met at")) for _, log in jobs]
    for name, found in zip("ab", met, strict=True):
        assert len(set(found)) == 1 and found[0][1] == str([name, name])
    assert len({found[0][0] for found in met} | {launcher.DEFAULT_PORT}) == 3
    for (process, _), victim in zip(jobs, VICTIMS, strict=True):
        kill_and_see_its_ranks_end(process, victim)


def test_a_chosen_port_that_another_job_has_is_one_clear_line(launched, tmp_path):
    """The other job's processes are forks, and have the port by the launcher's own code."""
    port, log = str(distributed.free_port()), tmp_path / "a.log"
    other = start(["--master_port", port, str(tmp_path / "rank.py"), "a", "600"], ranks=2, log=log)
    try:
        assert f"met at {port} ['a', 'a']" in wait_for(log, "met at")
        process, log = launched("b", "0", "--master_port", port)
        assert process.wait(300) == 2
    finally:
        kill_session(other)
    said = log.read_text()
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert (
        f"error: rank 0 cannot serve port {port}, at which the ranks would meet: Address already in use"
        in said
    )
    assert "choose a free one with `deepspeed --master_port N`" in said


def test_only_deepspeeds_launcher_is_watched():
    assert launcher.pid() is None  # of this process, which pytest's caller started
    python = "/usr/bin/python3"
    runs = [[python, "/venv/bin/deepspeed", "a.py"], [python, "-m", "deepspeed.launcher.runner", "a.py"]]
    others = [["bash", "-c", "deepspeed a.py"], ["sshd: user"], [python, "-m", "pytest", "deepspeed"][:3], []]
    assert all(map(launcher._is_runner, runs)) and not any(map(launcher._is_runner, others))
