"""What a run settles about its devices before anything is built."""

from __future__ import annotations

import logging

import torch.distributed as dist

from ibdistill.config import consistency
from ibdistill.config.sections import Config
from ibdistill.ops import implementation
from ibdistill.runtime import distributed, hardware
from ibdistill.runtime.distributed import World

logger = logging.getLogger("ibdistill")


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
