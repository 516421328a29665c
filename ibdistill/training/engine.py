"""The student's DeepSpeed engine: ZeRO from a file, everything else from the run's settings.

The file in `deepspeed.config` says how states are sharded and offloaded, and nothing else.
Batch sizes, precision, clipping, optimizer and schedule stand in the recipe alone; a file that
sets one of them too is refused (`config.zero_file`).

The loss that the engine sees is already divided by the global token counts of the step
(`objectives.weights`), so its gradient has to be *summed* over ranks and micro-batches.
DeepSpeed averages over ranks; `train.train_step` multiplies by the world size to undo that, and
asks the engine not to divide by the number of micro-batches. Ranks that share a sequence
(`models.sequence_parallel`) are to DeepSpeed like any others.
"""

from __future__ import annotations

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from torch import nn
from transformers import get_scheduler

from ibdistill.config.sections import DeepSpeedConfig, OptimConfig
from ibdistill.config.zero_file import read_ds_config, readers, split_batch
from ibdistill.runtime import deepspeed_fixes
from ibdistill.runtime.distributed import World


def build_engine(
    module: nn.Module, precision: str, optim: OptimConfig, zero_file: DeepSpeedConfig, world: World
) -> deepspeed.DeepSpeedEngine:
    """The engine around the student and its loss, with optimizer and schedule as `optim` describes them.

    `precision`: `student.precision`, fp32 or bf16. Raises ValueError as `split_batch` and `read_ds_config`.
    """
    ds_config = read_ds_config(zero_file.config)
    zero = ds_config.setdefault("zero_optimization", {"stage": 0})
    micro_batch_size, accumulation = split_batch(optim, readers(optim, world.size))
    bf16 = precision == "bf16"
    unsharded_fp32 = zero["stage"] == 0 and not bf16
    ds_config |= {
        "train_batch_size": micro_batch_size * accumulation * world.size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # here DeepSpeed clips before it could see a NaN; `guard_fp32_steps` does both in this case
        "gradient_clipping": 0.0 if unsharded_fp32 else optim.clip_norm,
        "bf16": {"enabled": bf16},
        # torch's fused AdamW is vectorised on the CPU too; DeepSpeed's would be compiled at first use
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    # the timer waits for the device before and after each micro-batch, and so for the teacher's stream too
    ds_config.setdefault("timers", deepspeed_fixes.NO_THROUGHPUT_TIMER)
    optimizer = _optimizer(module, optim)
    if unsharded_fp32:
        deepspeed_fixes.guard_fp32_steps(optimizer, optim.clip_norm)
    try:
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=lambda inner: _schedule(inner, optim),
            config=ds_config,
            dist_init_required=False,
        )
    except (DeepSpeedConfigError, AssertionError) as error:  # what it finds in the file only now
        raise ValueError(
            f"deepspeed.config {zero_file.config}: DeepSpeed refuses the file: {error}"
        ) from error
    deepspeed_fixes.take_bf16_steps_in_parts(engine)
    if world.size == 1 and zero["stage"] == 0:
        # there is nobody to sum with, and DeepSpeed would copy all gradients into one buffer and back
        engine.enable_backward_allreduce = False
    return engine


def _optimizer(module: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW without decay on norms, biases, embeddings and vid's map.

    Relative position biases learn at `optim.relative_bias_lr_scale` times the rate of the others.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = optim.relative_bias_lr_scale if "relative_attention_bias" in name else 1.0
        # under ZeRO-3 a partitioned parameter keeps its shape in ds_shape
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
