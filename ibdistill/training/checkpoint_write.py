"""One rank's files of a checkpoint, written by a thread beside the steps that follow.

The states are copied to the host's memory first, on a GPU's side through pinned memory, and the step goes on
once that is done. The copies take as many bytes as the files until these are written. Where they would take
more than half of the memory that is free for a rank, the file is written before the step goes on, so no run
needs more memory than without them.

With a folder on the node's own disk (`run.local_dir`) a file is first written there, and from there copied to
the run's folder. A slow shared file system then holds neither the copy in memory nor, where that does not
fit, the step. The file on the node has no name, so nothing is left of it when its process ends, however that
ends: a checkpoint on the disks of some nodes would have to be found and checked on all of them, and Slurm
removes a job's folder there at a requeue, so a run that is killed before the files are in its folder resumes
from the checkpoint before. Where the node's disk is full, the file is written to the run's folder instead.

DeepSpeed's decoupled engine was the alternative. It needs its own file writer to be compiled, prints the
errors of its process instead of handing them over, and its marker `latest` says nothing about other ranks.
"""

from __future__ import annotations

import copy
import logging
import os
import socket
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ibdistill.config.fields import shown
from ibdistill.config.sections import RunConfig
from ibdistill.planning.memory_check import free_memory
from ibdistill.runtime import distributed
from ibdistill.runtime.files import checksum, copy_to
from ibdistill.runtime.hardware import GIB, ToHost

logger = logging.getLogger("ibdistill")


def local_folder(run: RunConfig) -> Path | None:
    """The folder that `run.local_dir` names on this node; None if it is empty."""
    return Path(os.path.expandvars(run.local_dir)).expanduser() if run.local_dir else None


def check_local_folder(run: RunConfig) -> None:
    """Raise ValueError if this node cannot write to that folder, or it is on the file system of `run.dir`."""
    folder = local_folder(run)
    if folder is None:
        return
    here = f"run.local_dir is {shown(run.local_dir)}"
    way_out = "Give a folder on each node's own disk, such as $SLURM_TMPDIR, or leave it out"
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"{here}, which {socket.gethostname()} cannot write to: {error}. {way_out}"
        ) from error
    shared = Path(run.dir).resolve()
    shared = next(path for path in (shared, *shared.parents) if path.exists())
    if folder.stat().st_dev == shared.stat().st_dev:
        raise ValueError(
            f"{here}, on {socket.gethostname()} a folder of the same file system as run.dir, so files would "
            f"only be written twice. {way_out}"
        )


class Writing:
    """The files of a checkpoint that this rank writes; `save` stands in for DeepSpeed's function."""

    def __init__(self, write: Any, *, beside: bool, local: Path | None = None) -> None:
        """`write(state, file)` writes to a path or an open file; `beside`: it does so in a thread, and
        through the folder `local` if there is one. Collective."""
        self._write, self._beside, self._local = write, beside, local if beside else None
        hosts = distributed.gather_objects(socket.gethostname())
        self._on_node = hosts.count(socket.gethostname())
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._begun: list[Future[None]] = []
        self.checksums: dict[str, int] = {}
        """Of the files that are written, by name."""
        self.errors: list[str] = []
        """Why files could not be written."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, now or beside what follows; an error goes to `errors`."""
        if not self._beside or not self._copy_fits(state_dict, path):
            self._written(state_dict, path)
            return
        tensors: dict[str, Tensor] = {}
        _map_tensors(state_dict, lambda tensor: tensors.setdefault(_key(tensor), tensor))
        copies = ToHost(tensors).wait()
        for name, tensor in tensors.items():
            if tensor.device.type == "cpu":
                copies[name] = tensor.detach().clone()
        on_host = _map_tensors(state_dict, lambda tensor: copies[_key(tensor)])
        self._begun.append(self._thread.submit(self._written, on_host, path))

    @property
    def is_done(self) -> bool:
        """Whether nothing has to be waited for."""
        return all(future.done() for future in self._begun)

    def wait(self) -> None:
        """Return once all files are written, or have failed."""
        for future in self._begun:
            future.result()
        self._thread.shutdown()

    def _written(self, state: Any, path: str) -> None:
        try:
            if self._local and (staged := self._staged(state, path)):
                self._begun.append(self._thread.submit(self._copied, staged, path))
                return
            self._write(state, path)
            self.checksums[Path(path).name] = checksum(Path(path))
        except (OSError, RuntimeError) as error:
            why = " (torch says so where a disk is full)" if "unexpected pos" in str(error) else ""
            self.errors.append(f"{path}: {error}{why}")

    def _staged(self, state: Any, path: str) -> IO[bytes] | None:
        """The file on the node's own disk; None (after a message) if it could not be written."""
        try:
            with ExitStack() as on_error:
                file = on_error.enter_context(tempfile.TemporaryFile(dir=self._local))
                self._write(state, file)
                file.flush()
                on_error.pop_all()
                return file
        except (OSError, RuntimeError) as error:
            text = "%s is written to the run's folder at once, as %s (run.local_dir) could not take it: %s"
            logger.warning(text, Path(path).name, self._local, error)
            return None

    def _copied(self, staged: IO[bytes], path: str) -> None:
        try:
            with staged:
                self.checksums[Path(path).name] = copy_to(Path(path), staged)
        except OSError as error:
            self.errors.append(f"{path}: {error}")

    def _copy_fits(self, state: Any, path: str) -> bool:
        sizes: dict[str, int] = {}
        _map_tensors(state, lambda tensor: sizes.setdefault(_key(tensor), tensor.nbytes))
        size, free = sum(sizes.values()), free_memory(torch.device("cpu"), self._on_node)
        if size > free / 2:
            logger.warning(
                "%s is written%s before the next step: a copy of its %.2f GiB would take more than half of "
                "the %.2f GiB of memory that are free for this rank",
                Path(path).name,
                f" to {self._local}" if self._local else "",
                size / GIB,
                free / GIB,
            )
        return size <= free / 2


def _key(tensor: Tensor) -> str:
    """The same for tensors that are one, such as tied weights, which stay one in a file."""
    return f"{tensor.device} {tensor.data_ptr()} {tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}"


def _map_tensors(value: Any, change: Any) -> Any:
    """The value with all tensors in its dictionaries and lists, and in theirs, changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        new = copy.copy(value)  # a state dict of torch has attributes
        for key, inner in value.items():
            new[key] = _map_tensors(inner, change)
        return new
    if type(value) is list:
        return [_map_tensors(inner, change) for inner in value]
    return value
