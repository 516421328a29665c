"""A checkpoint's weights and AdamW moments, read into an engine with other ranks or other ZeRO settings.

Each ZeRO stage keeps a rank's share in flat tensors, in which stretches of parameters lie one behind the
other, and so do its files. Both are described alike here (`_Flat`), and each rank copies what overlaps its
own share out of memory-mapped files. Together the ranks read each fp32 weight and moment once, no rank holds
more than its share, and nothing is written, so this takes no space on a disk. Values are copied and not
computed: they are bit for bit those of the checkpoint.

DeepSpeed's universal checkpoint was the alternative. It knows no stage 0, to which a run on one rank falls
back; it first writes all states again, three files per parameter; and under ZeRO-3 each rank then reads
every parameter whole.

Frozen weights are those of the model that the run began with, and are in the engine already.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _Span(NamedTuple):
    """A stretch of a flattened parameter, and where in a flat tensor it lies."""

    name: str
    start: int
    """Its first element in the parameter."""
    offset: int
    """Its first element in the flat tensor."""
    numel: int


class _Flat(NamedTuple):
    """fp32 weights with their optimizer state, in a file or in the engine."""

    weights: Tensor
    state: dict[str, Any]
    """AdamW's `step`, `exp_avg` and `exp_avg_sq`; empty before its first step."""
    spans: list[_Span]


def read(engine: deepspeed.DeepSpeedEngine, folder: Path) -> dict[str, Any]:
    """Copy a checkpoint's states into this rank's share of the engine, which `refresh` is to follow; returns
    what the checkpoint's file of the model holds. Communicates with no other rank.

    Raises ValueError for a checkpoint of another model, and for optimizers that keep their states otherwise.
    """
    own = _own(engine)
    (path,) = (p for p in folder.glob("*model_states.pt") if re.fullmatch(r"(zero_pp_rank_0_)?mp_.*", p.name))
    model = _load(path)
    stored = list(_stored(folder, model, list(_trained(engine))))
    pieces: dict[str, list[tuple[_Span, _Flat]]] = {}
    for flat in stored:
        for span in flat.spans:
            pieces.setdefault(span.name, []).append((span, flat))
    for name, numel in _trained(engine).items():
        found = sum(span.numel for span, _ in pieces.get(name, ()))
        if found != numel:
            raise ValueError(f"it is of another model: {name} has {found} elements there and {numel} here")
    if more := pieces.keys() - _trained(engine).keys():
        raise ValueError(f"it is of another model, which trains {min(more)} too")
    step = next((float(flat.state["step"]) for flat in stored if "step" in flat.state), 0.0)
    for flat in own:
        _fill(flat, pieces, step)
    schedule = engine.lr_scheduler
    schedule.load_state_dict(model["lr_scheduler"])
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, model[counter])
    return model


def refresh(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make the model's weights anew from the fp32 weights that `read` has copied. Collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # parameters that are whole become shares
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # and small ones become whole again
    elif stage > 0:
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for narrow, wide in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            torch._foreach_copy_([parameter.data for parameter in narrow], [master.data for master in wide])


def _groups(engine: deepspeed.DeepSpeedEngine) -> list[list[torch.nn.Parameter]]:
    """The trained parameters in the optimizer's order and groups (of ZeRO-3: sub-groups)."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if isinstance(optimizer, BF16_Optimizer) or getattr(optimizer, "swap_optimizer", False):
        raise ValueError(
            "deepspeed.config keeps the optimizer's states on NVMe or accumulates gradients of bf16 in fp32, "
            "and such a run continues with the same ranks and file only"
        )
    if stage == 3 or isinstance(optimizer, FP16_UnfusedOptimizer):
        return optimizer.fp16_groups
    return optimizer.bit16_groups if stage else [group["params"] for group in optimizer.param_groups]


def _trained(engine: deepspeed.DeepSpeedEngine) -> dict[str, int]:
    """The elements of each trained parameter, in the optimizer's order."""
    parameters = [parameter for group in _groups(engine) for parameter in group]
    return {engine.param_names[p]: getattr(p, "ds_numel", p.numel()) for p in parameters}


def _own(engine: deepspeed.DeepSpeedEngine) -> list[_Flat]:
    """This rank's share."""
    optimizer, stage, groups = engine.optimizer, engine.zero_optimization_stage(), _groups(engine)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    names = engine.param_names
    if stage == 3:
        tensors = optimizer.fp32_partitioned_groups_flat
        spans = [_shares({names[p]: p.ds_numel for p in group}, rank, world_size) for group in groups]
    elif stage > 0:
        tensors = optimizer.single_partition_of_fp32_groups
        linked = [[(names[p], p._hp_mapping) for p in group if p._hp_mapping is not None] for group in groups]
        spans = [
            [
                _Span(name, link.lp_fragment_address.start, own.start, own.numel)
                for name, link in group
                for own in [link.get_hp_fragment_address()]
            ]
            for group in linked
        ]
    else:
        wrapped = isinstance(optimizer, FP16_UnfusedOptimizer)
        tensors = [tensor for group in (optimizer.fp32_groups if wrapped else groups) for tensor in group]
        spans = [[_Span(name, 0, 0, numel)] for name, numel in _trained(engine).items()]
    state = getattr(optimizer, "optimizer", optimizer).state
    return [_Flat(tensor, state[tensor], own) for tensor, own in zip(tensors, spans, strict=True)]


def _stored(folder: Path, model: Mapping[str, Any], order: list[str]) -> Iterator[_Flat]:
    """All that a checkpoint's files hold. `order`: the trained parameters in the optimizer's order, which
    files without ZeRO number but do not name."""
    shards = {int(re.search(r"pp_rank_(\d+)_", p.name)[1]): p for p in folder.glob("*optim_states.pt")}
    if not shards:
        saved, weights = model["optimizer"], model["module"]
        if "fp32_groups" in saved:  # of bf16
            masters = [master for group in saved["fp32_groups"] for master in group]
            saved, weights = saved["optimizer_state_dict"], dict(zip(order, masters, strict=False))
        for i, name in enumerate(order):
            if name in weights:
                span = _Span(name, 0, 0, weights[name].numel())
                yield _Flat(weights[name], saved["state"].get(i, {}), [span])
    reached: Counter[str] = Counter()
    for rank, path in sorted(shards.items()):
        saved = _load(path)["optimizer_state_dict"]
        if "fp32_flat_groups" in saved:  # ZeRO-3
            tensors, states = saved["fp32_flat_groups"], saved["optimizer_state_dict"]["state"]
            shapes = [{name: shape.numel() for name, shape in g.items()} for g in model["param_shapes"]]
            spans = [_shares(group, rank, len(shards)) for group in shapes]
        else:
            tensors, states = saved["single_partition_of_fp32_groups"], saved["base_optimizer_state"]["state"]
            spans = []
            for group in saved["param_slice_mappings"]:
                spans.append([_Span(name, reached[name], a.start, a.numel) for name, a in group.items()])
                reached.update({name: address.numel for name, address in group.items()})
        for i, (tensor, own) in enumerate(zip(tensors, spans, strict=True)):
            yield _Flat(tensor, states.get(i, {}), own)


def _shares(numels: Mapping[str, int], rank: int, world_size: int) -> list[_Span]:
    """What ZeRO-3 gives a rank of these parameters: of each an equal share, the last ones padded."""
    spans, offset = [], 0
    for name, numel in numels.items():
        share = -(-numel // world_size)
        start = min(rank * share, numel)
        spans.append(_Span(name, start, offset, min(share, numel - start)))
        offset += share
    return spans


def _fill(flat: _Flat, pieces: Mapping[str, list[tuple[_Span, _Flat]]], step: float) -> None:
    """Copy a checkpoint's values into a flat tensor of the engine and its optimizer state."""
    weights = flat.weights.detach()
    for moment in _MOMENTS:
        flat.state.setdefault(moment, torch.zeros_like(weights)).zero_()
    flat.state["step"] = torch.tensor(step, device=weights.device)
    for span in flat.spans:
        for piece, source in pieces[span.name]:
            start = max(span.start, piece.start)
            numel = min(span.start + span.numel, piece.start + piece.numel) - start
            for kind in ("weights", *_MOMENTS) if numel > 0 else ():
                there = source.weights.detach() if kind == "weights" else source.state.get(kind)
                here = weights if kind == "weights" else flat.state[kind]
                if there is not None:
                    there = there.view(-1).narrow(0, piece.offset + start - piece.start, numel)
                    here.view(-1).narrow(0, span.offset + start - span.start, numel).copy_(there)


def _load(path: Path) -> dict[str, Any]:
    # the run's own file, which holds DeepSpeed's objects and which DeepSpeed itself would load in this way
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
