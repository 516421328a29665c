"""Counts what makes the host wait for a GPU. Meta tensors stand for those on a GPU, so none is needed.

Like a GPU's, a meta tensor is on another device than the host's, and the host cannot know its values. Fake
CUDA tensors would be closer, but cannot be indexed where torch is built without CUDA.
"""

from __future__ import annotations

import contextlib
import itertools
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = "meta"
ROOT = Path(__file__).parents[1] / "ibdistill"
_FACTORIES = (torch.tensor, torch.as_tensor, Tensor.new_tensor)
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "equal", "is_nonzero"}


class Syncs:
    """The places in the package at which the host waited, in order, as FILE:LINE OPERATION."""

    def __init__(self) -> None:
        self.places: list[str] = []

    def note(self, operation: str) -> None:
        ours = [f for f in traceback.extract_stack() if str(ROOT) in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "outside"
        self.places.append(f"{where} {operation}")


def _on_gpu(value) -> bool:
    return isinstance(value, Tensor) and value.device.type == GPU


class _Factories(TorchFunctionMode):
    """Numbers of the host that become a tensor on the GPU: a copy from pageable memory, which blocks.

    The copy itself happens where a dispatch mode does not see it.
    """

    def __init__(self, syncs: Syncs) -> None:
        self.syncs = syncs

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _FACTORIES:
            like = args[0] if function is Tensor.new_tensor else None
            if GPU in str(kwargs.get("device", "")) or (_on_gpu(like) and not _on_gpu(args[1])):
                self.syncs.note(function.__name__)
        if function is Tensor.__bool__ and _on_gpu(args[0]):
            self.syncs.note("bool")
            return False  # a model goes on, whatever it asked
        return function(*args, **kwargs)


class _Reads(TorchDispatchMode):
    """Values that the host reads, operations whose result's size it has to know, and blocking copies."""

    def __init__(self, syncs: Syncs, pinned: set[int]) -> None:
        super().__init__()
        self.syncs, self.pinned = syncs, pinned

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__.split(".")[0]
        on_gpu = any(map(_on_gpu, args))
        if name in _READS and on_gpu:
            self.syncs.note(name)
        if name == "repeat_interleave" and on_gpu and kwargs.get("output_size") is None:
            self.syncs.note(name)
        if name in ("index", "index_put", "index_put_") and on_gpu:
            for index in args[1]:
                if _on_gpu(index) and index.dtype in (torch.bool, torch.uint8):
                    self.syncs.note(f"{name} by a mask")
        if name == "_to_copy" and (_on_gpu(args[0]) or GPU in str(kwargs.get("device", ""))):
            target = torch.device(kwargs.get("device") or args[0].device)
            crosses = target.type != args[0].device.type
            waits = not kwargs.get("non_blocking") or target.type == "cpu"
            if crosses and (waits or id(args[0]) not in self.pinned):
                self.syncs.note("a blocking copy")
        if name == "copy_" and args[0].device.type != args[1].device.type:
            self.syncs.note("copy_ between devices")
        return function(*args, **kwargs)


@contextlib.contextmanager
def counted() -> Iterator[Syncs]:
    """Within this context syncs with the device GPU are noted."""
    syncs, pinned, kept = Syncs(), set(), []

    def pin(tensor: Tensor, *_) -> Tensor:
        pinned.add(id(tensor))
        kept.append(tensor)  # so that no other tensor gets its id
        return tensor

    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(torch.cuda, "device", lambda *_: contextlib.nullcontext()))
        enter(mock.patch.object(Tensor, "pin_memory", pin))
        enter(_Reads(syncs, pinned))
        enter(_Factories(syncs))
        yield syncs


@contextlib.contextmanager
def no_kernels() -> Iterator[list[str]]:
    """Within this context Triton's kernels of the losses are noted by name, and none runs."""
    from ibdistill.ops.head_loss import triton_group, triton_plan, triton_teacher
    from ibdistill.ops.vid import triton as vid_triton

    names: list[str] = []

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: names.append(self.name)

    with contextlib.ExitStack() as stack:
        for module in (triton_plan, triton_group, triton_teacher, vid_triton):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                stack.enter_context(mock.patch.object(module, name, Launch(name)))
        yield names


def offsets(lengths: list[int]) -> list[int]:
    return [0, *itertools.accumulate(lengths)]
