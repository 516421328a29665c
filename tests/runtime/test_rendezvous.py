"""Where ranks meet: the store of a run is for its own ranks."""

from __future__ import annotations

import socket
import subprocess
import sys
from datetime import timedelta

import pytest

from ibdistill.runtime import rendezvous

SOON = timedelta(seconds=5)


@pytest.fixture(autouse=True)
def place(monkeypatch):
    monkeypatch.setattr(rendezvous, "_YIELD_SECONDS", 0)
    monkeypatch.setattr(rendezvous, "_ANSWER_SECONDS", 1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")  # `meet` replaces it by the port that it took
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "--local_rank=0", "demo"])


def test_a_rank_of_the_same_run_joins(monkeypatch):
    store = rendezvous.meet(0, 2, SOON)
    monkeypatch.setattr(sys, "argv", ["train.py", "--local_rank=1", "demo"])
    rendezvous.meet(1, 2, SOON).set("key", "value")
    assert store.get("key") == b"value"


@pytest.mark.parametrize("differs", ["arguments", "ranks", "Slurm job"])
def test_a_rank_of_another_run_is_refused(monkeypatch, differs):
    kept = rendezvous.meet(0, 2, SOON)
    if differs == "arguments":
        monkeypatch.setattr(sys, "argv", ["train.py", "--local_rank=1", "demo", "--run.seed", "1"])
    if differs == "Slurm job":
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ValueError, match=r"the ranks of another run meet at 127.0.0.1:\d+. .*--master_port"):
        rendezvous.meet(1, 3 if differs == "ranks" else 2, SOON)
    assert kept.port


def test_a_store_of_another_program_is_refused(monkeypatch):
    import torch.distributed as dist

    other = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(other.port))
    with pytest.raises(ValueError, match=rf"rank 0 was not found at 127.0.0.1:{other.port}"):
        rendezvous.meet(1, 2, SOON)


def test_a_taken_port_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(
            ValueError, match=r"cannot serve port \d+, .*: Address already in use. Another job"
        ):
            rendezvous.meet(0, 2, SOON)


@pytest.mark.parametrize("port", ["99999", "65536", "-1", "", "29500 ", "http", "\u0663"])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_no_port_is_refused(monkeypatch, rank, port):
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(
        ValueError, match=f"MASTER_PORT is '{port}'; it must be a port, a number from 0 to 6553"
    ):
        rendezvous.meet(rank, 2, SOON)


def test_torchrun_serves_the_store_itself(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert rendezvous.meet(0, 2, SOON) is None


def test_under_torchrun_ranks_learn_from_its_own_store_that_rank_0_is_done(tmp_path):
    script = tmp_path / "meets.py"
    script.write_text(
        "from ibdistill.runtime import distributed\n"
        "world = distributed.init()\n"
        "answer = distributed.run_on_rank_0(lambda: f'of {world.size}')\n"
        f"open(f'{tmp_path}/{{world.rank}}', 'w').write(answer)\n"
        "distributed.exit_at_once(0)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    subprocess.run(command, check=True, timeout=300)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["of 2", "of 2"]
