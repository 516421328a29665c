"""The ranks of a run: how they start, talk, decide together and stop.

`init` serves three launchers: `deepspeed` (RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* in the
environment), `srun` with one task per GPU (the same from SLURM_*), and plain `python` (one
process).

Small decisions (has any rank been told to stop, did every rank write its file) travel over
gloo on CPU tensors, so that deciding costs no device synchronisation. Gradients and weights
travel over the accelerator's own backend. Both live in torch's one default process group.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ibdistill.runtime import deepspeed_fixes, hardware, launcher, rank_logging, rendezvous, startup

T = TypeVar("T")

EXIT_BAD_INPUT = 2
"""A setting, file or record is wrong; the message says which."""
EXIT_DIVERGED = 3
"""Too many steps in a row with a non-finite loss or gradient; the last checkpoint stands."""
EXIT_UNWRITTEN = 5
"""Trained and tested, but something of the end could not be written: the same command writes it."""
EXIT_UNREACHABLE = 6
"""The teacher's server gave no answer for too long; what it said is kept, and the same command goes on."""
EXIT_REQUEUE = 85
"""Saved after SIGUSR1: start the same command again."""
EXIT_TERMINATED = 143
"""Saved after SIGTERM (128 + 15): somebody wants this run gone."""
_STOP_SIGNALS = {signal.SIGUSR1: EXIT_REQUEUE, signal.SIGTERM: EXIT_TERMINATED}


PATIENCE = timedelta(hours=12)
"""How long ranks wait for what rank 0 does alone. If its process ends, the launcher ends theirs."""


class Unreachable(ValueError):
    """A server that the run needs, and that answered before, gives no answer any more."""


class _Done:
    """How ranks learn from the run's store, in no collective, that rank 0 has done its part."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store, self._rank, self._count = store, rank, 0

    def meet(self) -> None:
        """Return on rank 0 at once, and on the others when rank 0 has come here too."""
        self._count += 1
        key = f"done by rank 0/{self._count}"
        if self._rank == 0:
            self._store.set(key, "")
        else:
            self._store.wait([key], PATIENCE)


_done_by_rank_0: _Done | None = None


@dataclass(frozen=True)
class World:
    """This process among the processes of its run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


def init(timeout_minutes: int = 30) -> World:
    """Join the process group and set up this rank's device and logging.

    Ends this process with exit code 2 and a message if the launcher's environment is incomplete, or if the
    ranks cannot meet.
    """
    launcher.end_with_launcher()
    timeout = timedelta(minutes=timeout_minutes)
    try:
        rank, size, local_rank = _place()
        store = rendezvous.meet(rank, size, timeout)
    except ValueError as error:
        sys.stderr.write(startup.for_terminal(f"error: {error}\n"))
        sys.exit(EXIT_BAD_INPUT)
    device = _device(local_rank)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    global _done_by_rank_0
    # torchrun serves a store of its own
    _done_by_rank_0 = _Done(store or distributed_c10d._get_default_store(), rank)
    sum_over_ranks(torch.zeros(1))  # all ranks are here
    rendezvous.clear_up(rank)
    deepspeed_fixes.leave_shared_memory_operator_out()
    deepspeed_fixes.import_muon_uncompiled()
    _share_cores()
    rank_logging.start_logging(rank)
    return World(rank, size, local_rank, device)


def _place() -> tuple[int, int, int]:
    """This rank, the number of ranks and the rank on this node, from the environment, which is completed.

    Raises ValueError if the launcher has set only a part of it.
    """
    _environment_from_slurm()
    given = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
    if not given:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free one
    elif len(given) < 3 or "MASTER_ADDR" not in os.environ:
        raise ValueError(
            f"of RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR only {', '.join(given)} are set; start with "
            "`deepspeed ibdistill/train.py ...`, through slurm/, or as one process with plain `python`"
        )
    return tuple(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


def _device(local_rank: int) -> torch.device:
    """This rank's device, made the current one, with LOCAL_RANK set to its index.

    Under `srun --gpus-per-task=1` a task sees one device, whatever its rank on the node. DeepSpeed takes
    LOCAL_RANK for the index of the device.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(device.index)
    hardware.choose_attention_kernels()
    return device


def _share_cores() -> None:
    """Give each rank its part of the node's threads, unless the user has set OMP_NUM_THREADS.

    DeepSpeed's launcher gives each rank as many threads as there are cores: two ranks on two cores then took
    0.30 s for a step that takes 0.03 s with one thread each.
    """
    ranks = int(os.environ.get("LOCAL_SIZE", 1))  # set by the launcher
    if "OMP_NUM_THREADS" not in os.environ and ranks > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of a CPU tensor, on every rank. The argument is not changed."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def max_over_ranks(value: int) -> int:
    """The largest of the ranks' values, on every rank."""
    tensor = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable object, in rank order, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def errors_of_all(errors: Sequence[str]) -> str:
    """All ranks' errors as one text, the same on every rank; empty if there are none. Collective."""
    return "; ".join(
        f"rank {rank}: {error}" for rank, found in enumerate(gather_objects(errors)) for error in found
    )


def run_on_rank_0(action: Callable[[], T]) -> T:
    """Rank 0's result on every rank; what it raises is raised on every rank. Collective.

    The action may take longer than the timeout of collectives, as reading a large model does: until it is
    done the other ranks wait outside of any collective.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = error
    if _done_by_rank_0 is not None:
        _done_by_rank_0.meet()
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def user_errors() -> Iterator[None]:
    """Around the preparation of a run: a ValueError on any rank ends all ranks with exit code 2. Collective.

    The exit code is 6 where it is Unreachable. Rank 0 prints the message, without a traceback: it is written
    for the user. No rank ends before that, since a launcher that sees one end kills the others.
    """
    error: ValueError | None = None
    try:
        yield
    except ValueError as caught:
        error = caught
    code = EXIT_UNREACHABLE if isinstance(error, Unreachable) else EXIT_BAD_INPUT
    errors = gather_objects(None if error is None else (str(error), code))
    if any(errors):
        rank, (message, code) = next(pair for pair in enumerate(errors) if pair[1])
        if dist.get_rank() == 0:
            where = "" if rank == 0 else f" (rank {rank})"
            sys.stderr.write(startup.for_terminal(f"error{where}: {message}\n"))
        dist.barrier()
        sys.exit(code)


class StopRequest:
    """Remembers SIGUSR1 or SIGTERM until all ranks act on it together at the end of a step.

    Slurm and a cluster's scheduler signal ranks at slightly different times, so a rank may
    only act on what `exit_code` returns.
    """

    def __init__(self) -> None:
        self._code = 0
        for number in _STOP_SIGNALS:
            signal.signal(number, self._remember)
        # `startup.hold_requeue_signal` keeps SIGUSR1 pending; one that came meanwhile is delivered here
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)

    def _remember(self, number: int, frame: Any) -> None:
        self._code = max(self._code, _STOP_SIGNALS[signal.Signals(number)])

    @property
    def is_asked(self) -> bool:
        """Whether this rank has got a signal; for what rank 0 does alone until all look at `exit_code`."""
        return self._code != 0

    def exit_code(self) -> int:
        """The exit code that the run must end with after saving, the same on every rank, or 0 to go on.

        SIGTERM outranks SIGUSR1: a cancelled job must not come back. Collective.
        """
        return max_over_ranks(self._code)


def exit_at_once(code: int) -> NoReturn:
    """End this process without the interpreter's clean-up, which may take seconds.

    A launcher kills the other ranks when it sees one end, and a rank that is killed while it
    cleans up loses the exit code that all ranks have in common. A thread of the process group that frees a
    tensor during the clean-up aborts the process ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    """A TCP port on loopback that nobody listens on at the moment.

    It lies below the launcher's default port, and so below the ports that Linux gives to outgoing
    connections, one of which could take it before the caller does.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, int(launcher.DEFAULT_PORT))
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def _environment_from_slurm() -> None:
    if "SLURM_PROCID" in os.environ and "RANK" not in os.environ and "MASTER_ADDR" in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
