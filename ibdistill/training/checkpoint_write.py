"""One rank's files of a checkpoint, written by a thread beside the steps that follow.

The states are copied to the host's memory first, on a GPU's side through pinned memory, and the step goes on
once that is done. The copies take as many bytes as the files until these are written. Where they would take
more than half of the memory that is free for a rank, the file is written before the step goes on, so no run
needs more memory than without them.

DeepSpeed's decoupled engine was the alternative. It needs its own file writer to be compiled, prints the
errors of its process instead of handing them over, and its marker `latest` says nothing about other ranks.
"""

from __future__ import annotations

import copy
import logging
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibdistill.planning.memory_check import free_memory
from ibdistill.runtime import distributed
from ibdistill.runtime.files import checksum
from ibdistill.runtime.hardware import GIB, ToHost

logger = logging.getLogger("ibdistill")


class Writing:
    """The files of a checkpoint that this rank writes; `save` stands in for DeepSpeed's function."""

    def __init__(self, write: Any, *, beside: bool) -> None:
        """`write(state, path)` writes a file; `beside`: it does so in a thread. Collective."""
        self._write, self._beside = write, beside
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
            self._write(state, path)
            self.checksums[Path(path).name] = checksum(Path(path))
        except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in a RuntimeError
            self.errors.append(f"{path}: {error}")

    def _copy_fits(self, state: Any, path: str) -> bool:
        sizes: dict[str, int] = {}
        _map_tensors(state, lambda tensor: sizes.setdefault(_key(tensor), tensor.nbytes))
        size, free = sum(sizes.values()), free_memory(torch.device("cpu"), self._on_node)
        if size > free / 2:
            logger.warning(
                "%s is written before the next step: a copy of its %.2f GiB would take more than half of the "
                "%.2f GiB of memory that are free for this rank",
                Path(path).name,
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
