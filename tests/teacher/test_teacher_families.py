"""Models from folders, in bf16 and over two ranks: every supported type in ZeRO-3, some in every sharded
placement."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from harness import ROOT, launch
from workers import teacher_families as worker

from ibdistill.models.families import FAMILIES
from ibdistill.teacher import sharding


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict[tuple[str, str], list[dict]]:
    """What each of two ranks found (see workers/teacher_families.py)."""
    folder = tmp_path_factory.mktemp("families")
    for kind in FAMILIES:
        tiny_models.save(folder / kind, kind)
    worker, log = str(ROOT / "tests/workers/teacher_families.py"), folder / "log"
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    assert launch([worker, str(folder)], log=log, env=env) == 0, log.read_text()[-4000:]
    return torch.load(folder / "facts.pt")


@pytest.mark.parametrize(
    ("placement", "kind"), [(placement, kind) for kind in FAMILIES for placement in worker.placements(kind)]
)
def test_a_sharded_teacher_answers_as_a_replica_does(facts, placement, kind):
    """The answers equal bit for bit on both ranks: one loaded the folder, the other built empty modules."""
    for rank in facts[placement, kind]:
        assert rank["same_dtypes"] and rank["same_buffers"], rank
        assert rank["error"] == 0.0 and rank["spread"] > 0.01, rank


@pytest.mark.parametrize("kind", worker.STUDENTS)
def test_the_copy_of_a_zero3_student_computes_what_the_student_computes(facts, kind):
    """The copy has the buffers of the folder, in their own dtype, beside weights in bf16."""
    for rank in facts["student", kind]:
        assert rank["dtypes"] == {"torch.bfloat16"} and rank["buffers"] and rank["error"] == 0.0, rank


TABLE = {"inv_freq": ("float32", (4,)), "weight": ("bfloat16", (3, 2))}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            TABLE | {"inv_freq": ("bfloat16", (4,))},
            r"1 tensors differ, the first is inv_freq, float32 \[4\] on",
        ),
        (
            TABLE | {"weight": ("bfloat16", (3, 1))},
            r"weight, bfloat16 \[3, 2\] on rank 0 and bfloat16 \[3, 1\]",
        ),
        ({"weight": TABLE["weight"]}, r"inv_freq, float32 \[4\] on rank 0 and absent on rank 1"),
        (TABLE | {"bias": ("bfloat16", (3,))}, r"bias, absent on rank 0 and bfloat16 \[3\] on rank 1"),
        (dict(reversed(TABLE.items())), "the order differs, first at inv_freq"),
    ],
)
def test_ranks_that_build_different_modules_are_told_before_they_send(other, message):
    sharding.check_same_modules([TABLE, dict(TABLE)])
    with pytest.raises(ValueError, match=rf"rank 0 builds .* that rank 1 builds: .*{message}"):
        sharding.check_same_modules([TABLE, other])
