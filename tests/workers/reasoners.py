"""`python reasoners.py FOLDER`: the full gradients of one real training step of methods with the reason
stream, on 1 and 2 forked ranks, to FOLDER/METHOD_zeroS_Rranks.pt; run by test_reasoning_runs."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import ranks
import torch
from one_step import gradients_of_step

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.runtime import distributed
from ibdistill.training.prepare import prepare

CASES = {
    "dss+cot": {"student.model": "demo-student"},
    "cot+ib+kd": {"student.model": "demo-student-decoder", "teacher.model": "demo-teacher"},
}
"""The second has vid and distillation from a T5, whole on every rank or in ZeRO-3."""


def main(folder: Path) -> None:
    world = distributed.init()
    for (method, own), stage in itertools.product(CASES.items(), (0, 3)):
        name = f"{method}_zero{stage}_{world.size}ranks"
        settings = own | {
            "objective.method": method,
            "data.subsample": 64,
            "data.max_label_tokens": 16,
            "data.max_rationale_tokens": 48,
            "student.dropout": 0.0,
            "optim.batch_size": 8,
            "optim.micro_batch_size": 2,
            "optim.clip_norm": 0.0,
            "deepspeed.config": f"zero{stage}",
            "run.dir": str(folder / name),
        }
        if "teacher.model" in own:
            settings |= {"teacher.placement": "zero3" if stage else "replica", "teacher.precision": "fp32"}
        job = prepare(load_settings(None, settings), world)
        gradients = gradients_of_step(job)
        if stage == 3:
            for _ in range(2):
                train.train_step(job)
            assert job.engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
        if world.rank == 0:
            torch.save(gradients, folder / f"{name}.pt")
        job.engine.destroy()
    torch.distributed.barrier()


if __name__ == "__main__":
    ranks.run(main, Path(sys.argv[1]), ranks=(1, 2))
