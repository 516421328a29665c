"""The student's DeepSpeed engine: ZeRO from a file, everything else from the run's settings.

The file in `deepspeed.config` says how states are sharded and offloaded and nothing else.
Batch sizes, precision, clipping, optimizer and schedule have one home each, in the recipe;
a file that sets them too is refused rather than reconciled.

The loss that the engine sees is already divided by the global token counts of the step
(`objectives`), so its gradient has to be *summed* over ranks and micro-batches. DeepSpeed
averages over ranks; `train.train_step` multiplies by the world size to undo that, and asks
the engine not to divide by the number of micro-batches.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn
from transformers import get_scheduler

from ibdistill.config.sections import DS_CONFIGS, Config, OptimConfig
from ibdistill.runtime.distributed import World

logger = logging.getLogger("ibdistill")

# `deepspeed.initialize` imports Muon, whose decorators load TorchInductor: a second of every start, for an
# optimizer that runs here don't have. Imported now, without the decorators, it is ready and not compiled.
with mock.patch.object(deepspeed.runtime.compiler, "compile", lambda **_: lambda function: function):
    import deepspeed.runtime.zero.muon.muon_optimizer

STEP_ELEMENTS = 4_000_000

# key of a DeepSpeed file -> the setting that owns it
_OWNED = {
    "train_batch_size": "optim.batch_size",
    "train_micro_batch_size_per_gpu": "optim.micro_batch_size",
    "gradient_accumulation_steps": "optim.micro_batch_size",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "the section optim",
    "scheduler": "optim.schedule",
    "bf16": "student.precision",
    "bfloat16": "student.precision",
    "fp16": "student.precision",
    "amp": "student.precision",
    "torch_autocast": "student.precision",
}


def split_batch(optim: OptimConfig, world_size: int) -> tuple[int, int]:
    """(questions a micro-batch, micro-batches a step) of one rank.

    Raises ValueError if the global batch does not divide evenly.
    """
    batch, micro = optim.batch_size, optim.micro_batch_size
    if micro == 0:
        if batch % world_size:
            raise ValueError(f"optim.batch_size is {batch}; it must be a multiple of the {world_size} ranks")
        return batch // world_size, 1
    if batch % (micro * world_size):
        raise ValueError(
            f"optim.batch_size is {batch}; it must be a multiple of optim.micro_batch_size x ranks "
            f"= {micro} x {world_size} = {micro * world_size}"
        )
    return micro, batch // (micro * world_size)


def settle_ds_config(config: Config, world_size: int) -> None:
    """Replace `deepspeed.config` auto by the file it stands for; raises ValueError as `read_ds_config`."""
    if config.deepspeed.config == "auto":
        config.deepspeed.config = "zero2" if world_size > 1 else "zero0"
    read_ds_config(config.deepspeed.config)


def read_ds_config(name: str) -> dict[str, Any]:
    """The content of a ZeRO file. Raises ValueError if it is missing, malformed or says too much."""
    path = Path(name) if name.endswith(".json") else DS_CONFIGS / f"{name}.json"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in DS_CONFIGS.glob("*.json")))
        raise ValueError(f"deepspeed.config is {name!r}, but {path} does not exist; shipped: {shipped}")
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    for key in content:
        if key in _OWNED:
            raise ValueError(f"{path} sets {key!r}; that belongs to {_OWNED[key]}. Remove it from the file")
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    return content


def zero_stage(config: Config) -> int:
    """The ZeRO stage of the run's DeepSpeed file."""
    return read_ds_config(config.deepspeed.config).get("zero_optimization", {}).get("stage", 0)


def build_engine(module: nn.Module, config: Config, world: World) -> deepspeed.DeepSpeedEngine:
    """The engine around the student and its loss. Its optimizer and schedule come from `config.optim`."""
    ds_config = read_ds_config(config.deepspeed.config)
    zero = ds_config.setdefault("zero_optimization", {"stage": 0})
    micro_batch_size, accumulation = split_batch(config.optim, world.size)
    bf16 = config.student.precision == "bf16"
    unsharded_fp32 = zero["stage"] == 0 and not bf16
    ds_config |= {
        "train_batch_size": config.optim.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed clips here before it could see a NaN; `_guard` does both in this case
        "gradient_clipping": 0.0 if unsharded_fp32 else config.optim.clip_norm,
        "bf16": {"enabled": bf16},
        # torch's fused AdamW is vectorised on the CPU too; DeepSpeed's would be compiled at first use
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    optimizer = _optimizer(module, config.optim)
    if unsharded_fp32:
        _guard(optimizer, config.optim.clip_norm)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=lambda inner: _schedule(inner, config.optim),
        config=ds_config,
        dist_init_required=False,
    )
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):  # which is bf16's too
        engine.optimizer.step = partial(_step_in_parts, engine.optimizer)
    if world.size == 1 and zero["stage"] == 0:
        # there is nobody to sum with, and DeepSpeed would copy all gradients into one buffer and back
        engine.enable_backward_allreduce = False
    return engine


def _optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW; no decay on norms, biases, embeddings and vid's map; relative position biases at their rate."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = optim.relative_bias_lr_scale if "relative_attention_bias" in name else 1.0
        # under ZeRO-3 the shape of a partitioned parameter is in ds_shape
        decays = len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and id(parameter) not in embeddings
        is_vid = name.startswith("vid.")
        decay = optim.weight_decay if decays and not is_vid else 0.0
        groups.setdefault((scale, decay, is_vid), []).append(parameter)
    param_groups = [
        {"params": parameters, "lr": optim.lr * scale, "weight_decay": decay}
        for (scale, decay, _), parameters in groups.items()
    ]
    return torch.optim.AdamW(
        param_groups, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps, fused=True
    )


def _schedule(optimizer: torch.optim.Optimizer, optim: OptimConfig) -> torch.optim.lr_scheduler.LRScheduler:
    name = "constant_with_warmup" if optim.schedule == "constant" else optim.schedule
    return get_scheduler(name, optimizer, optim.warmup_steps, optim.max_steps)


def _guard(optimizer: torch.optim.Optimizer, clip_norm: float) -> None:
    """Clip, and skip a non-finite step, as the ZeRO optimizers do by themselves.

    Without ZeRO and in fp32 DeepSpeed steps on whatever the gradients are. It does look at
    the optimizer's `overflow` and `_global_grad_norm`, so those are what we set.
    """

    def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        optimizer._global_grad_norm = norm
        optimizer.overflow = not bool(norm.isfinite())
        if optimizer.overflow:
            for parameter in parameters:
                parameter.grad = None
        elif clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)

    optimizer.register_step_pre_hook(before_step)


def step_elements(trained: int) -> int:
    """How many gradients a step in bf16 without ZeRO has in fp32 at once, if no parameter is larger."""
    return max(STEP_ELEMENTS, trained // 32)  # few enough parts that their launches cost nothing


def _step_in_parts(wrapper: FP16_UnfusedOptimizer) -> None:
    """A step of DeepSpeed's optimizer for bf16 without ZeRO, with few gradients in fp32 at a time.

    Its own copies all of them to fp32 first: 4 bytes a parameter beside the 16 of the model states, which
    was the peak of a whole step. The arithmetic is the same but for the order in which the norm is summed.
    """
    groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
    pairs = [pair for narrow, wide in groups for pair in zip(narrow, wide, strict=True)]
    elements = step_elements(sum(master.numel() for _, master in pairs))
    norm = _norm([p.grad for p, _ in pairs if p.grad is not None], elements)
    wrapper.overflow = not math.isfinite(norm)
    if wrapper.overflow:
        wrapper._skip_invalid_grad_norm()
        return
    wrapper._global_grad_norm = norm
    wrapper._update_scale(False)
    for part in _parts(pairs, elements):
        for parameter, master in part:
            # without a gradient it still decays
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        wrapper.unscale_and_clip_grads(norm)
        wrapper.optimizer.step()  # passes over what has no gradient
        for parameter, master in part:
            master.grad = None
            parameter.data.copy_(master.data)


def _norm(gradients: Sequence[Tensor], elements: int) -> float:
    """Of all of them together, in fp32, by way of one scratch: a copy of each would fragment a CPU's heap."""
    pieces = [piece for gradient in gradients for piece in gradient.flatten().split(elements)]
    wide = torch.empty(max(map(len, pieces)), device=pieces[0].device)
    norms = wide.new_empty(len(pieces))
    for piece, norm in zip(pieces, norms, strict=True):
        torch.linalg.vector_norm(wide[: len(piece)].copy_(piece), out=norm)
    return float(torch.linalg.vector_norm(norms))


def _parts(
    pairs: Sequence[tuple[nn.Parameter, Tensor]], elements: int
) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
    """In their order, as many together as have so many elements; at least one."""
    part, size = [], 0
    for pair in pairs:
        if part and size + pair[1].numel() > elements:
            yield part
            part, size = [], 0
        part.append(pair)
        size += pair[1].numel()
    yield part
