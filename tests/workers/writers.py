"""Two ranks with a sharded teacher that writes, then scores; run by test_rationale_writing.

Texts to FOLDER/texts-TEMPERATURE, what there is to know about the scoring to FOLDER/facts.pt. The teacher
that scores is the one that has written greedily.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ibdistill.config.load import load_settings

SETTINGS = {
    "data.subsample": 5,
    "data.max_label_tokens": 32,
    "data.max_rationale_tokens": 64,
    "teacher.precision": "fp32",
    "teacher.rationales": "all",
    "teacher.write_batch_size": 2,
    "teacher.max_unparsed": 1.0,
}
SAMPLED = {"teacher.temperature": 1.5, "data.max_label_tokens": 8, "data.max_rationale_tokens": 24}
"""What is sampled seldom ends by itself."""


def main(folder: Path, expert: str) -> None:
    from teachers import checksum

    from ibdistill import train
    from ibdistill.data import loading
    from ibdistill.runtime import distributed
    from ibdistill.runtime.distributed import StopRequest
    from ibdistill.teacher import writing
    from ibdistill.training.prepare import prepare

    world = distributed.init()
    linear = torch.nn.functional.linear
    shared = SETTINGS | {"teacher.model": expert, "teacher.placement": "zero3"}
    loaded = load_settings(None, shared | SAMPLED | {"teacher.rationale_cache": f"{folder}/texts-1.5"})
    records = loading.load(loaded.data, needs_rationale=False).train
    writing.write(loaded, records, world, StopRequest())

    training = {"objective.method": "ib+kd", "optim.batch_size": 4, "student.dropout": 0.0}
    jobs = []
    for name in ("wrote", "never"):  # the second one finds its texts in the cache
        settings = shared | training | {"run.dir": f"{folder}/{name}"}
        settings |= {"teacher.rationale_cache": f"{folder}/texts-0.0", "data.label_source": "teacher"}
        jobs.append(prepare(load_settings(None, settings), world))
    before = checksum(jobs[0].teacher_answers.teacher)
    error = 0.0
    for _ in range(4):
        answers = []
        for job in jobs:
            rows, batch = job.micro_batches()[0]
            answers.append(job.teacher_answers.of(rows, batch).tensors())
        differences = [float((a - b).abs().max()) for a, b in zip(*answers, strict=True)]
        error = max(error, *differences)
        train.train_step(jobs[0])
        jobs[1].state.step += 1
    coordinator = jobs[0].teacher_answers.teacher._scorer.optimizer.param_coordinator
    facts = {
        "complete": coordinator.is_complete_trace(),
        "unchanged": before == checksum(jobs[0].teacher_answers.teacher),
        "same_teacher": jobs[0].teacher_answers.teacher is not None,
        "error": error,
        "linear_replaced": torch.nn.functional.linear is not linear,
    }
    facts = distributed.gather_objects(facts)
    if world.rank == 0:
        torch.save(facts, folder / "facts.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    from ranks import run

    run(main, Path(sys.argv[1]), sys.argv[2], ranks=(2,))
