"""The DeepSpeed file of a run: ZeRO and offload, nothing else."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ibdistill.config.sections import Config, OptimConfig

logger = logging.getLogger("ibdistill")


DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


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
