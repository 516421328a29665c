"""What a run settles about its devices before anything is built."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import torch.distributed as dist

from ibdistill.config import consistency
from ibdistill.config.sections import Config
from ibdistill.models import families, presets, sequence_parallel
from ibdistill.models.architectures import DECODER_ONLY, FAMILIES
from ibdistill.ops import implementation
from ibdistill.runtime import distributed, hardware
from ibdistill.runtime.distributed import World

logger = logging.getLogger("ibdistill")


def start_sequence_parallel(config: Config) -> None:
    """Form the groups of ranks that share sequences. Collective.

    Reads configurations only. Raises ValueError for a model whose sequences or heads they cannot share.
    """
    ranks, models = config.optim.sequence_parallel, {"student.model": config.student.model}
    if config.teacher.placement == "replica":
        models["teacher.model"] = config.teacher.model
    for setting, name in models.items() if ranks > 1 else ():
        shape = SimpleNamespace(**presets.PRESETS[name]) if name in presets.PRESETS else None
        kind = "llama" if shape and presets.is_decoder_only(name) else "t5"
        if shape is None:
            shape = families.load_config(name, setting)
            kind = shape.model_type
        if FAMILIES[kind].family != DECODER_ONLY:
            raise ValueError(
                f"optim.sequence_parallel is {ranks}, and {setting} {name!r:.100} is an encoder-decoder "
                "model; only decoder-only models' sequences are shared, so leave it out"
            )
        heads = shape.num_attention_heads
        kv_heads = getattr(shape, "num_key_value_heads", None) or heads
        sequence_parallel.check_heads(setting, name, heads, kv_heads, ranks)
    sequence_parallel.start(ranks)


def settle_precision(config: Config, world: World) -> None:
    """Replace `student.precision` auto by one precision for all ranks: bf16 if every device multiplies in
    bf16, else fp32. Collective."""
    multiplies = distributed.gather_objects(hardware.multiplies_bf16(world.device))
    consistency.settle_precision(config, multiplies_bf16=all(multiplies))


def warn_of_slow_losses() -> None:
    """Log the first rank where Triton cannot compile, which slows every step. Collective."""
    troubles = distributed.gather_objects(implementation.compilation_trouble())
    rank = next((rank for rank, trouble in enumerate(troubles) if trouble), None)
    if rank is not None and dist.get_rank() == 0:
        logger.warning(
            "rank %d computes the losses in torch, which is slower than in Triton: %s", rank, troubles[rank]
        )
