"""Teachers and students of every supported type, loaded from folders in bf16, on 2 forked ranks;
run by test_teacher_families.

FOLDER/MODELTYPE holds a model of each type. What each rank found goes to FOLDER/facts.pt:
(PLACEMENT, MODELTYPE) -> how far the sharded teacher's answer is from the replica's on the same rank, and
("student", MODELTYPE) -> what the collected copy of a ZeRO-3 student has.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from feature_tables import random_features
from workers import ranks

from ibdistill.config.load import load_settings
from ibdistill.config.sections import TeacherConfig
from ibdistill.data import batches, tokenizers
from ibdistill.models import families, forward
from ibdistill.objectives.teacher_answers import TeacherAnswer, Wanted
from ibdistill.runtime import distributed
from ibdistill.runtime.distributed import World
from ibdistill.teacher.teacher import SHARDED, Teacher
from ibdistill.training.prepare import prepare

STUDENTS = ("gemma", "llama", "qwen2", "t5")
IN_ALL_PLACEMENTS = ("llama", "gemma3_text", "mixtral", "t5", "bart")
"""What a placement does (whose ranks share, where a share lies) is no type's own; all types are in ZeRO-3."""
ROWS = 420


def placements(kind: str) -> tuple[str, ...]:
    return SHARDED if kind in IN_ALL_PLACEMENTS else ("zero3",)


def answer_of(placement: str, folder: Path, world: World) -> tuple[TeacherAnswer, dict[str, Any]]:
    """The answer of a teacher that is loaded in this placement, and its buffers. Collective."""
    tokenizer = tokenizers.load_tokenizer(str(folder), "teacher.model")
    config = TeacherConfig(model=str(folder), placement=placement)
    teacher = Teacher(config, Wanted(questions=True, targets=True), tokenizer, ROWS, world)
    features = random_features(3, seed=world.rank)  # other questions on each rank
    batch = batches.collate(features, range(3), ("predict", "explain"), **teacher.layout)
    answer = teacher(batch)
    buffers = {name: buffer.clone() for name, buffer in teacher._scorer.model.named_buffers()}
    teacher.close()
    return answer, buffers


def compare_teachers(folder: Path, world: World) -> dict[str, Any]:
    """Its sharded placements against the replica. Collective."""
    replica, buffers = answer_of("replica", folder, world)
    facts = {}
    for placement in placements(folder.name):
        answer, shared = answer_of(placement, folder, world)
        pairs = list(zip(answer.tensors(), replica.tensors(), strict=True))
        facts[placement] = {
            "same_dtypes": all(a.dtype == b.dtype == torch.bfloat16 for a, b in pairs),
            "error": max(float((a.float() - b.float()).abs().max()) for a, b in pairs),
            "spread": float(replica.questions.float().std()),
            "same_buffers": shared.keys() == buffers.keys()
            and all(shared[n].dtype == b.dtype and torch.equal(shared[n], b) for n, b in buffers.items()),
        }
    return facts


def collected_student(folder: Path, world: World) -> dict[str, Any]:
    """A ZeRO-3 student's copy for decoding against the student itself and against the folder. Collective."""
    settings = {
        "data.subsample": 16,
        "data.max_question_tokens": 128,
        "data.max_label_tokens": 16,
        "data.max_rationale_tokens": 64,
        "run.dir": str(folder.parent / f"run-{folder.name}"),
        "student.model": str(folder),
        "student.dropout": 0.0,
        "student.precision": "bf16",
        "optim.batch_size": 4,
        "deepspeed.config": "zero3",
    }
    job = prepare(load_settings(None, settings), world)
    batch = job.micro_batches()[0][1]
    module = job.engine.module
    with torch.no_grad(), deepspeed.zero.GatheredParameters(list(module.parameters())):
        expected = forward.states(module.model, batch).targets
    with torch.no_grad(), job.whole() as model:
        found = forward.states(model, batch).targets
        dtypes = {str(p.dtype) for p in model.parameters()}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loaded = families.load_model(str(folder), job.tokenizer, setting="student.model")
    theirs = dict(loaded.named_buffers())
    job.board.close()
    job.engine.destroy()
    return {
        "dtypes": dtypes,
        "error": max(float((found[s] - expected[s]).abs().max()) for s in expected),
        "buffers": buffers.keys() == theirs.keys()
        and all(buffers[n].dtype == b.dtype and torch.equal(buffers[n], b) for n, b in theirs.items()),
    }


def main(folder: Path) -> None:
    world = distributed.init()
    facts: dict[tuple[str, str], Any] = {}
    for kind in families.FAMILIES:
        found = compare_teachers(folder / kind, world)
        facts |= {(placement, kind): fact for placement, fact in found.items()}
    for kind in STUDENTS:
        facts["student", kind] = collected_student(folder / kind, world)
    everyone = distributed.gather_objects(facts)
    if world.rank == 0:
        torch.save({case: [rank[case] for rank in everyone] for case in facts}, folder / "facts.pt")
    torch.distributed.barrier()


if __name__ == "__main__":
    ranks.run(main, Path(sys.argv[-1]), ranks=(2,))
