"""`python reasoners.py FOLDER`: the full gradients of one real training step of methods with the reason
stream, on 1 and 2 forked ranks, to FOLDER/CASE_zeroS_Rranks.pt; run by test_reasoning_runs.

FOLDER holds what the case `chat` reads: `student`, `teacher` and `talks`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ranks
import torch
from one_step import gradients_of_step

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.runtime import distributed
from ibdistill.training.prepare import prepare

TAUGHT = {"objective.method": "cot+ib+kd", "teacher.precision": "fp32"}
CASES = {
    "streams": {"objective.method": "dss+cot", "student.model": "demo-student"},
    "teacher": TAUGHT | {"student.model": "demo-student-decoder", "teacher.model": "demo-teacher"},
    "infonce": {
        "objective.method": "cot+ib",
        "objective.estimator": "infonce",
        "student.model": "demo-student-decoder",
    },
    "chat": TAUGHT | {"data.task": "jsonl", "data.format": "chat", "data.system": "answer ."},
}
"""`teacher` has vid and distillation from a T5, whole on every rank or in ZeRO-3; `chat` too, from a model of
the student's template, on conversations of several turns."""
_BOTH = [("streams", 0), ("streams", 3), ("teacher", 0), ("teacher", 3)]
RUNS = {
    1: [*_BOTH, ("infonce", 0), ("chat", 0)],
    2: [*_BOTH, ("infonce", 1), ("infonce", 2), *(("chat", stage) for stage in range(4))],
}
"""Number of ranks -> (case, ZeRO stage)."""


def main(folder: Path) -> None:
    world = distributed.init()
    for case, stage in RUNS[world.size]:
        name = f"{case}_zero{stage}_{world.size}ranks"
        settings = CASES[case] | {
            "data.max_question_tokens": 128,
            "data.max_label_tokens": 16,
            "data.max_rationale_tokens": 64,
            "student.dropout": 0.0,
            "optim.batch_size": 8,
            # InfoNCE is over the questions of one forward pass of all ranks
            "optim.micro_batch_size": 8 // world.size if case == "infonce" else 2,
            "optim.clip_norm": 0.0,
            "deepspeed.config": f"zero{stage}",
            "run.dir": str(folder / name),
        }
        if case == "chat":
            names = {"student.model": "student", "teacher.model": "teacher", "data.path": "talks"}
            settings |= {setting: str(folder / name) for setting, name in names.items()}
        else:
            settings["data.subsample"] = 64
        if "teacher.model" in settings:
            settings["teacher.placement"] = "zero3" if stage else "replica"
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
