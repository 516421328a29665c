"""Steps with every placement of the teacher; run by test_teacher on 1, 2 and 4 forked ranks (see ranks.py).

For each case RANKS/PLACEMENT:STAGE, the stage being the student's: the gradients of one global batch and
what there is to know about the teacher, to FOLDER/PLACEMENT:STAGE.pt. With a further :STEPS the memory over
so many steps too; these have one micro-batch each. With PLACEMENT+text the teacher is that in FOLDER/other,
which has another vocabulary, and the target is pmi.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import socket
import sys
from pathlib import Path

import psutil
import ranks
import torch
from one_step import gradients_of_step

from ibdistill import train
from ibdistill.config.load import load_settings
from ibdistill.runtime import distributed
from ibdistill.training.prepare import prepare

SETTINGS = {
    "data.subsample": 64,
    "data.max_label_tokens": 16,
    "data.max_rationale_tokens": 48,
    "student.dropout": 0.0,
    "teacher.model": "demo-teacher",
    "teacher.precision": "fp32",
    "objective.method": "ib+kd",
    "objective.divergence": "jsd",
    "objective.kd_temperature": 2.0,
    "objective.kd_first": 0.8,
    "objective.kd_later": 1.0,
    "objective.kd_entropy": "student",
    "objective.beta": 0.7,
    "optim.batch_size": 8,
    "optim.micro_batch_size": 2,
    "optim.clip_norm": 0.0,
}
ALIGNED = {
    "objective.alignment": "text",
    "objective.kd_target": "pmi",
    "objective.kd_first": 0,
    "objective.kd_later": 0.0,
    "objective.kd_entropy": "none",
}


def checksum(teacher) -> list[str]:
    """Digests of what this rank keeps of the teacher: shares, or whole parameters."""
    kept = [getattr(p, "ds_tensor", p) for p in teacher._scorer.parameters()]
    return [hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for t in kept]


def in_use() -> tuple[int, int]:
    """Bytes of this process in memory, without what the allocator merely keeps; bytes of living tensors."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    tensors = {id(t): t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}
    living = sum(t.numel() * t.element_size() for t in tensors.values())
    return psutil.Process().memory_info().rss, living


def main(folder: Path, cases: list[str]) -> None:
    world = distributed.init()
    for case in [case.partition("/")[2] for case in cases if case.startswith(f"{world.size}/")]:
        linear = torch.nn.functional.linear
        placement, stage, *many = case.split(":")
        placement, _, aligned = placement.partition("+")
        if placement == "zero3_node":  # two nodes of two ranks each
            socket.gethostname = lambda: f"node{world.rank // 2}"
        settings = SETTINGS | {
            "teacher.placement": placement,
            "deepspeed.config": f"zero{stage}",
            "run.dir": str(folder / f"run-{case}"),
        }
        if aligned:
            settings |= ALIGNED | {"teacher.model": str(folder / "other")}
        if many:
            settings["optim.micro_batch_size"] = settings["optim.batch_size"] // world.size
        job = prepare(load_settings(None, settings), world)
        teacher = job.teacher_answers.teacher
        before, replaced = checksum(teacher), torch.nn.functional.linear is not linear
        gradients = gradients_of_step(job)
        train.train_step(job)  # the prefetch trace is complete from the second step on
        memory = []
        for step in range(int(many[0]) if many else 0):
            train.train_step(job)
            if step % 10 == 9:
                memory.append(in_use())
        engine = getattr(teacher._scorer, "optimizer", None)
        facts = {
            "gradients": gradients if world.rank == 0 else None,
            "unchanged": before == checksum(teacher),
            "no_gradient": all(p.grad is None for p in teacher._scorer.parameters()),
            "complete": engine and engine.param_coordinator.is_complete_trace(),
            "bytes": teacher.bytes(),
            "memory": memory,
            "linear_replaced": replaced,
            "optimized": sum(p.numel() for g in job.engine.optimizer.param_groups for p in g["params"]),
        }
        facts = distributed.gather_objects(facts)
        if world.rank == 0:
            torch.save(facts, folder / f"{case}.pt")
        job.engine.destroy()
    torch.distributed.barrier()


if __name__ == "__main__":
    folder, *cases = [a for a in sys.argv[1:] if not a.startswith("--")]
    ranks.run(main, Path(folder), cases, ranks=(1, 2, 4))
