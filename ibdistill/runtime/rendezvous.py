"""Where the ranks of a run meet: a store that rank 0 serves on a TCP port, and that no other run can join.

The port is MASTER_PORT, with one exception: DeepSpeed's launcher gives every job the same port, 29500, unless
the user chooses one. Two such jobs on a machine would meet each other. So on a single node rank 0 takes any
free port in its place, and tells the other ranks through a small file of the launcher's.

A run's identity is in the store. A rank that reaches the store of another run is told so.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch.distributed as dist

from ibdistill.runtime import files, launcher, processes

_IDENTITY = "ibdistill/run"
_ANSWER_SECONDS = 30
"""How long a store may take to name its run: rank 0 writes the name as soon as it serves the store."""
_YIELD_SECONDS = 10
"""How long a rank that met another run waits before it says so: its own rank 0 has lost the port, says so
first, and the launcher then ends the other ranks, so that one message is seen."""


def meet(rank: int, size: int, timeout: timedelta) -> dist.Store | None:
    """The store through which the ranks find each other; MASTER_PORT is set to its port.

    None under torchrun, which serves the store itself and gives each run a port of its own.

    Raises ValueError if the port is none or is taken, or if another run's ranks meet there.
    """
    if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        return None
    address, path = os.environ["MASTER_ADDR"], _port_file()
    given = os.environ.get("MASTER_PORT", launcher.DEFAULT_PORT)
    if not re.fullmatch("[0-9]{1,5}", given) or (port := int(given)) >= 2**16:
        raise ValueError(f"MASTER_PORT is {given[:80]!r}; it must be a port, a number from 0 to 65535")
    if rank == 0:
        listener = _listen(address, 0 if path else port)
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            address,
            port,
            size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        store.set(_IDENTITY, _identity(size))
        if path:
            files.write_atomically(path, str(port))
    else:
        port = _read_port(path, timeout) if path else port
        store = _join(address, port, size, timeout)
    os.environ["MASTER_PORT"] = str(port)
    return store


def clear_up(rank: int) -> None:
    """Remove what `meet` has left behind, once all ranks have met."""
    if rank == 0 and (path := _port_file()):
        with suppress(OSError):
            path.unlink()


def _listen(address: str, port: int) -> socket.socket:
    """A listening socket, on loopback only if that is where the ranks meet; port 0: any free one."""
    try:
        if address == "127.0.0.1":
            return socket.create_server((address, port), backlog=1024)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        raise ValueError(
            f"rank 0 cannot serve port {port}, at which the ranks would meet: {os.strerror(error.errno)}. "
            f"{_WAY_OUT}"
        ) from error


def _join(address: str, port: int, size: int, timeout: timedelta) -> dist.Store:
    try:
        store = dist.TCPStore(address, port, size, is_master=False, timeout=timeout, wait_for_workers=False)
        store.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
        found = store.get(_IDENTITY).decode()
        store.set_timeout(timeout)
    except RuntimeError as error:  # torch's network errors are RuntimeErrors
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"rank 0 was not found at {address}:{port}: {reason}. {_WAY_OUT}") from error
    if found != _identity(size):
        time.sleep(_YIELD_SECONDS)
        raise ValueError(f"the ranks of another run meet at {address}:{port}. {_WAY_OUT}")
    return store


_WAY_OUT = (
    "Another job may have that port: choose a free one with `deepspeed --master_port N`, or with MASTER_PORT "
    "where another launcher is used"
)


def _identity(size: int) -> str:
    """What tells a run's ranks from those of another run: the arguments, the number of ranks and the job."""
    arguments = [word for word in sys.argv[1:] if not word.startswith(("--local_rank", "--local-rank"))]
    parts = [*arguments, str(size), os.environ.get("SLURM_JOB_ID", "")]
    if launcher.is_alone() and (pid := launcher.pid()):
        parts += [str(pid), str(processes.start_time(pid))]
    return files.digest("\0".join(parts).encode(errors="surrogatepass"), 16).hex()


@cache  # as it was before `meet` has changed MASTER_PORT
def _port_file() -> Path | None:
    """The file in which rank 0 says its port; None where the ranks meet at MASTER_PORT."""
    pid = launcher.pid()
    if pid is None or not launcher.is_alone() or os.environ.get("MASTER_PORT") != launcher.DEFAULT_PORT:
        return None
    name = f"ibdistill-{os.getuid()}-{pid}-{processes.start_time(pid)}.port"
    return Path(tempfile.gettempdir()) / name


def _read_port(path: Path, timeout: timedelta) -> int:
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        with suppress(OSError):
            if path.stat().st_uid == os.getuid():  # nobody else's, in a folder that all may write to
                return int(path.read_text())
        time.sleep(0.02)
    raise ValueError(f"rank 0 has not said within {timeout} at which port the ranks meet ({path})")
