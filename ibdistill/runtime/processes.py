"""What Linux says in /proc about the processes of this machine. Where there is no /proc, nothing is known."""

from __future__ import annotations

import os
import socket
from pathlib import Path

_PROC = Path("/proc")
_ENDED = ("Z", "X")
"""States of a process that has ended but that its parent has not yet asked about."""


def command_line(pid: int) -> list[str]:
    """The words of the process's command line; empty if there is no such process."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def parent_of(pid: int) -> int | None:
    """The id of the process's parent; None if there is no such process."""
    fields = _fields(pid)
    return int(fields[1]) if fields else None


def start_time(pid: int) -> int | None:
    """When the process began, in ticks since the machine started; None if there is no such process.

    An id is given out again after its process has ended; together with this time it is unique.
    """
    fields = _fields(pid)
    return int(fields[19]) if fields else None


def namespace() -> str:
    """Two processes with equal values see each other's process ids: they are on the same machine since its
    last start, and in the same container."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return ""


def _fields(pid: int) -> list[str]:
    """The words of `/proc/PID/stat` from the third on, the state; empty if the process has ended."""
    try:
        # the second is the program's name in parentheses, which may hold spaces and parentheses
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return fields if fields and fields[0] not in _ENDED else []
