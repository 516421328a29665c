"""What a run settles about its devices before anything is built."""

from __future__ import annotations

import logging
import socket
from types import SimpleNamespace

import torch.distributed as dist

from ibdistill.config import consistency, zero_file
from ibdistill.config.fields import shown
from ibdistill.config.sections import Config
from ibdistill.config.teacher_consistency import needs_answers
from ibdistill.models import families, presets, sequence_parallel
from ibdistill.objectives.weights import whole_questions
from ibdistill.ops import implementation
from ibdistill.runtime import distributed, hardware, nodes
from ibdistill.runtime.distributed import World
from ibdistill.training.checkpoint_write import check_local_folder

logger = logging.getLogger("ibdistill")


def start_sequence_parallel(config: Config) -> None:
    """Form the groups of ranks that share sequences. Collective.

    Reads configurations only. Raises ValueError for a model whose sequences or heads they cannot share.
    """
    ranks, models = config.optim.sequence_parallel, {"student.model": config.student.model}
    if config.teacher.placement == "replica" and needs_answers(config.objective):
        models["teacher.model"] = config.teacher.model
    for setting, name in models.items() if ranks > 1 else ():
        preset = presets.PRESETS.get(name)
        config_of = SimpleNamespace(**{"model_type": "t5"} | preset) if preset else None
        sequence_parallel.check_model(setting, name, config_of or families.load_config(name, setting), ranks)
    sequence_parallel.start(ranks, whole_questions=whole_questions(config))


def check_node(config: Config, world: World) -> None:
    """Raise ValueError, on all ranks, for what a node of the run lacks. Collective."""

    def check() -> None:
        check_local_folder(config.run)
        if zero_file.offloads_to_nvme(config):
            from deepspeed.git_version_info import installed_ops
            from deepspeed.ops.op_builder import AsyncIOBuilder

            if not (installed_ops.get("async_io") or AsyncIOBuilder().is_compatible()):
                raise ValueError(
                    f"deepspeed.config is {shown(config.deepspeed.config)}, which offloads to nvme, and "
                    f"{socket.gethostname()} lacks libaio or a compiler, with which DeepSpeed reads and "
                    "writes there: install them (Debian, Ubuntu: apt-get install libaio-dev g++), or take "
                    "the device cpu"
                )

    nodes.run_on_each(world, check)


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
