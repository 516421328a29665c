"""The DeepSpeed file of a run: ZeRO, offload and monitoring, but nothing that a setting of the run decides.

DeepSpeed itself ignores keys that it does not know, so a misspelt `zero_optimization` would
train without ZeRO. Here every key must be one that DeepSpeed reads: on the first level one of
`_OTHER`, and inside `zero_optimization` a field of DeepSpeed's own configuration class.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

from ibdistill.config.fields import shown
from ibdistill.config.sections import Config, OptimConfig

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

_ZERO = "zero_optimization"
_OWNED = {
    "train_batch_size": "optim.batch_size",
    "train_micro_batch_size_per_gpu": "optim.micro_batch_size",
    "gradient_accumulation_steps": "optim.micro_batch_size",
    "managed_gradient_accumulation": "optim.micro_batch_size",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "the section optim",
    "scheduler": "optim.schedule",
    "bf16": "student.precision",
    "bfloat16": "student.precision",
    "fp16": "student.precision",
    "amp": "student.precision",
    "torch_autocast": "student.precision",
    "steps_per_print": "run.log_every",
    "zero_force_ds_cpu_optimizer": "the engine, which always takes torch's AdamW",
}
"""Key of a DeepSpeed file -> the setting that owns it."""
_OBJECTS = """
    activation_checkpointing aio autotuning checkpoint comet comms_logger compile compression_training
    csv_monitor curriculum_learning data_efficiency data_types datastates_ckpt eigenvalue elasticity
    expert_parallel flops_profiler hybrid_engine nebula pipeline progressive_layer_drop quantize_training
    sparse_attention tensor_parallel tensorboard timers wandb weight_quantization zero_optimization
""".split()
_FLAGS = """
    dataloader_drop_last disable_allgather disable_python_gc dump_state graph_harvesting memory_breakdown
    prescale_gradients sparse_gradients use_data_before_expert_parallelism wall_clock_breakdown
    zero_allow_untested_optimizer
""".split()
_TEXTS = (
    "communication_data_type gradient_allreduce_op log_level seq_parallel_communication_data_type".split()
)
_NUMBERS = "gradient_predivide_factor vocabulary_size".split()
_OTHER: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(_OBJECTS, (dict, "an object")),
    **dict.fromkeys(_FLAGS, (bool, "true or false")),
    **dict.fromkeys(_TEXTS, (str, "a string")),
    **dict.fromkeys(_NUMBERS, ((int, float), "a number")),
}
"""Each further first-level key that DeepSpeed reads -> the type of its value, and that type in words."""


def readers(optim: OptimConfig, ranks: int) -> int:
    """How many micro-batches are read at a time: one by each group of `optim.sequence_parallel` ranks.

    Raises ValueError if the ranks do not divide into such groups.
    """
    if ranks % optim.sequence_parallel:
        raise ValueError(
            f"optim.sequence_parallel is {optim.sequence_parallel}, which does not divide the {ranks} ranks; "
            "take a divisor, or another number of ranks"
        )
    return ranks // optim.sequence_parallel


def split_batch(optim: OptimConfig, world_size: int) -> tuple[int, int]:
    """(questions per micro-batch at most, micro-batches per step) of one rank.

    Where the global batch does not divide evenly, some micro-batches hold one question less. With
    `optim.tokens_per_batch` a micro-batch counts as 1, since its questions vary. `world_size`: ranks, or
    groups of them that read one micro-batch (`readers`). Raises ValueError if a micro-batch would be empty.
    """
    if optim.tokens_per_batch:
        per_forward = world_size * (optim.tokens_per_forward or optim.tokens_per_batch)
        return 1, -(-optim.tokens_per_batch // per_forward)
    batch = optim.batch_size
    micro = optim.micro_batch_size or -(-batch // world_size)
    count = -(-batch // (micro * world_size))
    if batch < world_size:
        raise ValueError(
            f"optim.batch_size is {batch}, which leaves some of the {world_size} ranks without a question; "
            "raise it, or take fewer ranks"
        )
    if batch < count * world_size:  # only micro-batches of 1 cannot hold less
        raise ValueError(
            f"optim.micro_batch_size is {micro}, and optim.batch_size {batch} does not divide by the "
            f"{world_size} ranks, so some would be left without a question; set optim.micro_batch_size 2, "
            f"which does not change what is learned, or take another number of ranks"
        )
    return micro, count


def settle_ds_config(config: Config, world_size: int) -> None:
    """Replace `deepspeed.config` auto by the file it stands for; raises ValueError as `read_ds_config`."""
    if config.deepspeed.config == "auto":
        config.deepspeed.config = "zero2" if world_size > 1 else "zero0"
    read_ds_config(config.deepspeed.config)


def zero_stage(config: Config) -> int:
    """The ZeRO stage of the run's DeepSpeed file."""
    return read_ds_config(config.deepspeed.config)[_ZERO]["stage"]


def offloads_to_nvme(config: Config) -> bool:
    """Whether the run's DeepSpeed file moves states to a disk."""
    zero = read_ds_config(config.deepspeed.config)[_ZERO]
    parts = (zero.get(part) or {} for part in ("offload_optimizer", "offload_param"))
    return any(part.get("device") == "nvme" for part in parts)


def read_ds_config(name: str) -> dict[str, Any]:
    """The content of the DeepSpeed file that `deepspeed.config` names; its ZeRO stage is filled in as 0.

    Raises ValueError if the file is missing or malformed, has a key that a setting of the run
    owns or that DeepSpeed does not know, or a value that DeepSpeed refuses.
    """
    path = Path(name) if name.endswith(".json") else DS_CONFIGS / f"{name}.json"
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_object)
    except OSError as error:
        shipped = ", ".join(sorted(file.stem for file in DS_CONFIGS.glob("*.json")))
        raise ValueError(
            f"deepspeed.config is {shown(name)}, but {shown(str(path))} cannot be read ({error.strerror}); "
            f"shipped: {shipped}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {shown(content)}; it must be an object with the key {_ZERO!r}")
    for key, value in content.items():
        _check_key(path, key, value)
    zero = content.setdefault(_ZERO, {})
    stage = zero.setdefault("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise ValueError(f"{path}: {_ZERO}.stage is {shown(stage)}; it must be 0, 1, 2 or 3")
    _check_zero(path, zero)
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError if it has a key twice, of which JSON readers take the last alone."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {shown(twice)} is given twice; give it once")
    return content


def _check_key(path: Path, key: str, value: Any) -> None:
    """Raise ValueError unless a first-level key is DeepSpeed's alone and its value has the right type."""
    if key in _OWNED:
        raise ValueError(f"{path} sets {key!r}; that belongs to {_OWNED[key]}. Remove it from the file")
    if key not in _OTHER:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        if key in _names(DeepSpeedZeroConfig):
            raise ValueError(f"{path}: {key!r} stands on the first level; put it inside {_ZERO!r}")
        raise ValueError(f"{path}: {_unknown(key, [*_OTHER, *_OWNED])}")
    wanted, words = _OTHER[key]
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{path}: {key} is {shown(value)}; it must be {words}")


def _check_zero(path: Path, zero: dict[str, Any]) -> None:
    """Raise ValueError unless DeepSpeed's class of ZeRO settings has all keys and takes all values."""
    import pydantic
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    _check_names(path, _ZERO, zero, DeepSpeedZeroConfig)
    try:
        DeepSpeedZeroConfig(**zero)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join([_ZERO, *map(str, first["loc"])])
        raise ValueError(f"{path}: {where} is {shown(first['input'])}: {first['msg']}") from error
    for part in ("offload_optimizer", "offload_param"):
        given = zero.get(part) or {}
        if given.get("device") == "nvme" and not given.get("nvme_path"):
            raise ValueError(
                f"{path}: {_ZERO}.{part}.device is 'nvme' without nvme_path; give the folder of the disk, or "
                "take the device cpu"
            )


def _check_names(path: Path, where: str, values: dict[str, Any], model: type) -> None:
    """Raise ValueError if an object, or one inside it, has a key that its pydantic model does not have."""
    inner = {
        name: choice
        for field_name, field in model.model_fields.items()
        for name in (field_name, field.alias)
        for choice in (field.annotation, *get_args(field.annotation))
        if hasattr(choice, "model_fields")
    }
    for key, value in values.items():
        if key not in _names(model):
            raise ValueError(f"{path}: {_unknown(key, _names(model), f'{where}.')}")
        if key in inner and isinstance(value, dict):
            _check_names(path, f"{where}.{key}", value, inner[key])


def _names(model: type) -> set[str]:
    """The names and aliases of a pydantic model's fields."""
    return {
        name for key, field in model.model_fields.items() for name in (key, field.alias) if name is not None
    }


def _unknown(key: str, known: Collection[str], where: str = "") -> str:
    near = difflib.get_close_matches(key[:80], known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{where}{shown(key)[1:-1]} is no key that DeepSpeed knows{hint}"
