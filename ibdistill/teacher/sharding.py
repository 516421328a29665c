"""A frozen model in shares: ZeRO-3 for forward passes only, beside a student that trains.

Nothing global is changed. What transformers offers for this (`HfDeepSpeedConfig`) is one process-wide weak
reference, under which whichever model is loaded next is partitioned too. Therefore the model is partitioned
here, parameter by parameter, within a process group of its own:

- the first rank of the group loads the model in CPU memory (safetensors are memory-mapped, so
  most of it stays on disk until it is sent); the other ranks build the same modules without
  storage;
- one parameter at a time gets storage on the other ranks, is broadcast, and is cut into shares.

So no rank but the first of each group holds more than its share and one whole parameter.

The engine gets no optimizer, and a configuration that is written here, because a student's would bring an
optimizer, gradient buckets and clipping with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ibdistill.runtime import deepspeed_fixes, distributed

PERSISTENT_SHARE = 0.02
"""At most this share of all parameter elements is kept whole on every rank, the smallest parameters (norms,
biases) first, because gathering them one by one would cost more time than their memory is worth."""


def partition(model: nn.Module, group: dist.ProcessGroup, config: dict[str, Any]) -> nn.Module:
    """Cut each parameter into shares over `group`, in place. Collective within the group.

    `model` holds the weights on the group's first rank and is on the meta device elsewhere.

    Raises ValueError, on all ranks, if they have built different modules.
    """
    model.requires_grad_(False).eval()
    check_same_modules(distributed.gather_objects(_tensors_of(model)))
    _share_buffers(model, group)
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    deepspeed.zero.Init(
        module=_OneAtATime(model), data_parallel_group=group, config_dict_or_path=config, dtype=dtype
    )
    return model


def check_same_modules(tables: list[dict[str, tuple[str, tuple[int, ...]]]]) -> None:
    """Compare what the ranks have built before they send it to each other.

    Args:
        tables: for each rank, parameter or buffer -> dtype and shape, in the order of sending.

    Raises:
        ValueError: two ranks differ in a name, a dtype, a shape or the order. Sending all the same, they
            would wait for each other without end, or take one tensor's bytes for another's.
    """
    first = tables[0]
    for rank, table in enumerate(tables):
        if list(table.items()) == list(first.items()):
            continue
        names = [name for name in first | table if first.get(name) != table.get(name)]
        name = names[0] if names else next(a for a, b in zip(first, table, strict=True) if a != b)
        what = f"{len(names)} tensors differ, the first is" if names else "the order differs, first at"
        there, here = (_shown(found.get(name)) for found in (first, table))
        raise ValueError(
            f"the teacher that rank 0 builds is not the one that rank {rank} builds: {what} {name}, {there} "
            f"on rank 0 and {here} on rank {rank}. All nodes must see the same folder teacher.model and have "
            "the same version of transformers; or set teacher.placement replica"
        )


def _shown(found: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if found is None else f"{found[0]} {list(found[1])}"


def _tensors_of(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Parameter or buffer -> dtype and shape, in the order in which they are sent to the other ranks."""
    tensors = [*model.named_buffers(remove_duplicate=False), *model.named_parameters()]
    return {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in tensors}


def engine(module: nn.Module, config: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
    """The engine that gathers a partitioned module's parameters around each submodule's forward pass."""
    built, *_ = deepspeed.initialize(model=module, config=config, dist_init_required=False)
    built.eval()  # returns None
    return built


def inference_config(parameters: list[int], *, bf16: bool, offload: bool, world_size: int) -> dict[str, Any]:
    """A ZeRO-3 configuration for forward passes. `parameters`: the sizes of all parameters, in elements."""
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": persistence_threshold(parameters),
        # DeepSpeed's replacement of torch.nn.functional.linear is process-wide: the student would get it too
        "memory_efficient_linear": False,
    }
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world_size,
        "bf16": {"enabled": bf16},
        "zero_optimization": zero,
        "steps_per_print": None,
        "timers": deepspeed_fixes.NO_THROUGHPUT_TIMER,
    }


def persistence_threshold(sizes: list[int]) -> int:
    """The largest size such that all parameters up to it make at most PERSISTENT_SHARE of all elements.

    DeepSpeed's default (100,000 elements) would keep a tiny model whole on every rank.
    """
    budget, threshold = PERSISTENT_SHARE * sum(sizes), 0
    for size in sorted(set(sizes)):
        budget -= size * sizes.count(size)
        if budget < 0:
            break
        threshold = size
    return min(threshold, 100_000)


def node_groups(hosts: list[str]) -> list[list[int]]:
    """Ranks by host, hosts in order of their first rank. Raises ValueError if hosts have unequal numbers."""
    groups = [[rank for rank, name in enumerate(hosts) if name == host] for host in dict.fromkeys(hosts)]
    if len({len(ranks) for ranks in groups}) > 1:
        found = ", ".join(f"{hosts[ranks[0]]}: {len(ranks)}" for ranks in groups)
        raise ValueError(
            f"teacher.placement zero3_node needs the same number of ranks on every node ({found}); "
            "use zero3, or start the same number everywhere"
        )
    return groups


def held(parameter: nn.Parameter) -> list[Tensor]:
    """The tensors that this rank keeps of a parameter: itself, its share, or both if it is persistent."""
    share = getattr(parameter, "ds_tensor", None)
    return [parameter] if share is None else [parameter, share]


def broadcast(tensor: Tensor, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """The first rank's tensor on every rank's device. Other ranks may give a meta tensor. Collective."""
    real = (
        torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device).contiguous()
    )
    dist.broadcast(real, dist.get_global_rank(group, 0), group=group)
    return real


class RowShard:
    """The rows of a [V, D] tensor, cut evenly over a group; whole only while it is used."""

    def __init__(self, whole: Tensor, group: dist.ProcessGroup, device: torch.device) -> None:
        """`whole` holds values on the group's first rank and is on the meta device elsewhere. Collective."""
        self._group, self._rows = group, len(whole)
        shares = -(-len(whole) // dist.get_world_size(group))
        self._share = torch.zeros(shares, whole.shape[1], dtype=whole.dtype, device=device)
        for rank, part in enumerate(whole.detach().split(shares)):
            sent = broadcast(part, group, device)
            if rank == dist.get_rank(group):
                self._share[: len(sent)] = sent

    def gather(self) -> Tensor:
        """[V, D], a new tensor. Collective."""
        whole = self._share.new_empty(
            dist.get_world_size(self._group) * len(self._share), self._share.shape[1]
        )
        dist.all_gather_into_tensor(whole, self._share, group=self._group)
        return whole[: self._rows]

    def bytes(self) -> int:
        """The bytes that this rank holds."""
        return self._share.numel() * self._share.element_size()


class GatheredHead(nn.Module):
    """A head that is whole only while it is applied."""

    def __init__(self, weight: RowShard, bias: Tensor | None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]. Collective."""
        return nn.functional.linear(hidden, self._weight.gather(), self._bias)


class _OneAtATime(nn.Module):
    """A module whose parameters get storage when they are asked for, for `zero.Init` to cut them up."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        stored: dict[int, nn.Parameter] = {}  # tied parameters stay tied
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    if id(parameter) not in stored:
                        empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                        stored[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                    setattr(module, name, stored[id(parameter)])
                yield module._parameters[name]


def _share_buffers(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every rank the first rank's buffers (position tables and the like), on the device."""
    device = torch.device(get_accelerator().current_device_name())
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            module._buffers[name] = broadcast(buffer, group, device)
