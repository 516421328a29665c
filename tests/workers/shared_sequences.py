"""`python shared_sequences.py FOLDER`: the first step of runs whose ranks share sequences, on 1 and 4 forked
ranks or on those of the launcher, to FOLDER/CASE_zeroS_RANKSxSHARED.pt; run by test_sequence_parallel."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import ranks
import torch
from one_step import gradients_of_step

from ibdistill.config.load import load_settings
from ibdistill.runtime import distributed
from ibdistill.teacher.answers import TeacherAnswers
from ibdistill.teacher.teacher import Teacher
from ibdistill.training import on_policy
from ibdistill.training.job import Job
from ibdistill.training.prepare import prepare

CASES = {
    "cot": {"objective.method": "cot"},
    "own": {"objective.method": "cot+kd", "on_policy.share": 0.5, "on_policy.max_tokens": 24},
    "ib+kd": {"objective.method": "ib+kd", "objective.estimator": "vid"},
    # each question's states on one rank:
    "paper": {"objective.method": "cot+ib+kd", "objective.estimator": "paper", "objective.kd_later": 1.0},
    "normalized": {
        "objective.method": "ib+kd",
        "objective.estimator": "normalized",
        "objective.pool": "mean",
        "objective.mi_pair": "teacher",
    },
    "infonce": {
        "objective.method": "ib+kd",
        "objective.estimator": "infonce",
        "optim.micro_batch_size": 0,  # it takes all questions at once
    },
    "k2": {
        "objective.method": "cot+kd",
        "objective.divergence": "k2",
        "objective.kd_target": "pmi",
        "on_policy.share": 0.5,
        "on_policy.max_tokens": 24,
    },
    "text": {
        "objective.method": "ib+kd",
        "objective.estimator": "vid",
        "objective.alignment": "text",
        "teacher.model": "other",
    },
    "cache": {
        "objective.method": "ib+kd",
        "objective.estimator": "vid",
        "teacher.cache": "answers",
        "teacher.cache_form": "states",
    },
}


def main(folder: Path) -> None:
    world = distributed.init()
    for shared, stage, case in plan(world.size):
        name = f"{case}_zero{stage}_{world.size}x{shared}"
        settings = json.loads((folder / "settings.json").read_text()) | CASES[case]
        if case != "cot":
            settings |= {"teacher.placement": "replica", "teacher.precision": "fp32"}
            settings["teacher.model"] = str(folder / settings.get("teacher.model", "teacher"))
        if case == "cache":
            settings["teacher.cache"] = str(folder / "answers" / name)
        settings |= {"deepspeed.config": f"zero{stage}", "run.dir": str(folder / name)}
        settings["optim.sequence_parallel"] = shared
        job = prepare(load_settings(None, settings), world)
        if on_policy.is_due(job):
            on_policy.refresh(job)
        exchange = torch.distributed.all_to_all_single
        honest = TeacherAnswers.of
        with (
            mock.patch.object(torch.distributed, "all_to_all_single", side_effect=exchange) as counted,
            mock.patch.object(TeacherAnswers, "of", autospec=True, side_effect=honest) as asked,
        ):
            gradients = gradients_of_step(job)
        if case == "cache":
            check_what_is_read(job, [call.args[1:] for call in asked.call_args_list])
        interval = job.meter.close_interval()
        if world.rank == 0:
            found = {"gradients": gradients, "terms": interval.terms, "gradient norms": interval.gradients}
            found["tokens"] = [interval.tokens, interval.targets]
            found["exchanged"] = sum(call.args[1].nbytes for call in counted.call_args_list)
            found["positions"] = interval.positions // world.size
            torch.save(found, folder / f"{name}.pt")
        job.engine.destroy()
    torch.distributed.barrier()


def check_what_is_read(job: Job, asked: list[tuple]) -> None:
    """The answers about these records and batches are in the cache, and are those of the teacher."""
    job.teacher_answers.end_epoch()
    for indices, batch in asked:
        with mock.patch.object(Teacher, "__call__", side_effect=AssertionError("the teacher is asked")):
            read = job.teacher_answers.of(indices, batch).tensors()
        answer = job.teacher_answers.teacher(batch).tensors()
        assert all(torch.equal(*pair) for pair in zip(read, answer, strict=True)) and asked


def plan(size: int) -> list[tuple[int, int, str]]:
    """(ranks of a group, ZeRO stage, case) of each run on so many ranks."""
    if size == 1:
        return [(1, 0, case) for case in CASES]
    if size == 2:
        cases = [(2, 0, "cot"), (2, 1, "own"), (2, 2, "ib+kd"), (2, 3, "ib+kd")]
        cases += [(2, 1, "paper"), (2, 3, "normalized"), (2, 2, "k2"), (2, 0, "text"), (2, 1, "cache")]
        return cases
    return [(2, 3, "cot"), (4, 2, "ib+kd"), (4, 3, "paper"), (2, 2, "infonce")]


if __name__ == "__main__":
    ranks.run(main, Path(sys.argv[-1]), ranks=(1, 4))
