"""A lock on a folder, so that two jobs do not write to it at once; on network file systems too.

    FOLDER/run.lock     who holds it: host, process, Slurm job, since when

The file is created exclusively, which NFS does in one step, and a thread touches it every `BEAT_SECONDS`. A
lock is taken over

- at once if its process has ended, where that can be seen from here (the same machine and container);
- at once if it is that of the same Slurm job before the job was requeued;
- otherwise once it has not been touched for `STALE_SECONDS`, by the clock of the file system.

Whoever loses the lock all the same, as a process that was suspended for long, sees that at its next touch and
ends.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ibdistill.runtime import distributed, files, processes

logger = logging.getLogger("ibdistill")

NAME = "run.lock"
BEAT_SECONDS = 15
STALE_SECONDS = 120
_SETTLE_SECONDS = 1.0
"""After a stale lock was replaced: by then everybody else who wanted the same has replaced it too, and the
last one has it."""


class FolderLock:
    """The lock of one folder, which this process holds between `acquire` and `release`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._content = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": processes.start_time(os.getpid()),
            "namespace": processes.namespace(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "since": datetime.now().astimezone().isoformat(" ", "seconds"),
            "token": uuid.uuid4().hex,
        }
        self._stop = threading.Event()

    def acquire(self) -> None:
        """Take the lock; the folder is made if it is missing.

        Raises ValueError, which names the holder, if somebody else has it, or if the folder cannot be
        written, or if the lock is no file.
        """
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files.refuse_special(self._path)
            self._create_or_take_over()
        except OSError as error:
            raise ValueError(f"run.dir is {str(folder)!r}, which cannot be written: {error}") from error
        threading.Thread(target=self._beat, name="touch the lock", daemon=True).start()

    def release(self) -> None:
        """Give the lock back; nothing happens if this process does not hold it."""
        self._stop.set()
        with suppress(OSError):
            if self._is_ours():
                self._path.unlink()

    def _create_or_take_over(self) -> None:
        text = json.dumps(self._content, indent=2) + "\n"
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            self._refuse_if_held()
            files.write_atomically(self._path, text)
            time.sleep(_SETTLE_SECONDS)
            if not self._is_ours():
                self._refuse_if_held()
                raise ValueError(f"{self._path.parent} has just been taken by another job") from None
            return
        with open(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _refuse_if_held(self) -> None:
        """Raise ValueError unless the lock's holder has ended."""
        holder, silent = self._holder(), self._silent_seconds()
        same_namespace = holder.get("namespace") and holder["namespace"] == self._content["namespace"]
        if same_namespace:
            alive = processes.start_time(holder["pid"]) == holder["start"]
        elif holder.get("job") and holder["job"] == self._content["job"]:
            alive = holder["restart"] == self._content["restart"] and silent < STALE_SECONDS
        else:
            alive = silent < STALE_SECONDS
        if not alive:
            logger.warning("the lock of %s is taken over: %s has ended", self._path.parent, _who(holder))
            return
        raise ValueError(
            f"{self._path.parent} is in use by {_who(holder)}; its last sign of life is {silent:.0f} s old. "
            "Wait until it ends, or choose another --run.dir. A job that died on another machine keeps the "
            f"folder until that sign is {STALE_SECONDS} s old"
        )

    def _holder(self) -> dict[str, Any]:
        """What the lock says; empty if it is damaged, or not written to its end yet."""
        try:
            with self._path.open("rb") as file:
                content = json.loads(file.read(4096))  # ours is shorter, and messages show what is in it
            whole = isinstance(content, dict) and content.keys() >= self._content.keys()
            return content if whole and isinstance(content["pid"], int) else {}
        except (OSError, ValueError):
            return {}

    def _silent_seconds(self) -> float:
        """Seconds since the lock was touched, by the clock of the file system, which may be another
        machine's."""
        probe = self._path.with_name(f"{files.TEMPORARY}{uuid.uuid4().hex}")
        try:
            probe.touch()
            with self._path.open("rb") as file:  # opened, because NFS may give an old time for a closed file
                # a time to come is one before the clock was set back, and nobody has touched the lock since
                return abs(probe.stat().st_mtime - os.fstat(file.fileno()).st_mtime)
        except FileNotFoundError:
            return float("inf")  # released meanwhile
        finally:
            probe.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        return self._holder().get("token") == self._content["token"]

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with suppress(OSError):  # the next touch may succeed
                if self._is_ours():
                    os.utime(self._path)
                elif (holder := self._holder()) and not self._stop.is_set():
                    who = _who(holder)
                    logger.error("%s was taken over by %s; this job ends", self._path.parent, who)
                    distributed.exit_at_once(distributed.EXIT_BAD_INPUT)


def _who(holder: dict[str, Any]) -> str:
    """The holder of a lock, for a message."""
    if not holder:
        return "a job that has not written its name"
    job = f", Slurm job {holder['job']}" if holder["job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"
