"""`python gradients.py FOLDER`: the full gradients of one real training step for ZeRO 0 to 3, on 1, 2 and 4
forked ranks, to FOLDER/MODEL_zeroS_Rranks.pt; run by test_distributed."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import ranks
import torch
from one_step import gradients_of_step

from ibdistill.config.load import load_settings
from ibdistill.runtime import distributed
from ibdistill.training.prepare import prepare

MODELS = ("demo-student", "demo-student-decoder")
"""On four ranks the first alone: what four ranks do otherwise than two is no model's own."""


def main(folder: Path) -> None:
    world = distributed.init()
    settings = {
        "data.subsample": 64,
        "data.max_label_tokens": 16,
        "data.max_rationale_tokens": 48,
        "student.dropout": 0.0,
        "objective.method": "ib",
        "objective.beta": 0.3,
        "objective.mi_gradient": "both",
        "optim.batch_size": 8,
        "optim.micro_batch_size": 2,
        "optim.clip_norm": 0.0,
    }
    for model, stage in itertools.product(MODELS if world.size < 4 else MODELS[:1], range(4)):
        name = f"{model}_zero{stage}_{world.size}ranks"
        settings |= {
            "student.model": model,
            "deepspeed.config": f"zero{stage}",
            "run.dir": str(folder / name),
        }
        job = prepare(load_settings(None, settings), world)
        gradients = gradients_of_step(job)
        if world.rank == 0:
            torch.save(gradients, folder / f"{name}.pt")
        job.engine.destroy()
    torch.distributed.barrier()


if __name__ == "__main__":
    ranks.run(main, Path(sys.argv[1]), ranks=(1, 2, 4))
