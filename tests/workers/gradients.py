"""Full gradients of one real training step for ZeRO 0 to 3; run through the launcher by test_distributed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from one_step import gradients_of_step

from ibdistill import config, distributed
from ibdistill.job import prepare


def main(folder: Path, micro_batch_size: int, model: str) -> None:
    world = distributed.init()
    settings = {
        "data.subsample": 64,
        "data.max_label_tokens": 16,
        "data.max_rationale_tokens": 48,
        "student.model": model,
        "student.dropout": 0.0,
        "objective.method": "ib",
        "objective.beta": 0.3,
        "objective.mi_gradient": "both",
        "optim.batch_size": 8,
        "optim.micro_batch_size": micro_batch_size,
        "optim.clip_norm": 0.0,
    }
    for stage in range(4):
        name = f"zero{stage}_{world.size}ranks"
        settings |= {"deepspeed.config": f"zero{stage}", "run.dir": str(folder / name)}
        job = prepare(config.load(None, settings), world)
        gradients = gradients_of_step(job)
        if world.rank == 0:
            torch.save(gradients, folder / f"{name}.pt")
        job.engine.destroy()
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[-3]), int(sys.argv[-2]), sys.argv[-1])
