"""What DeepSpeed really allocates and sends; run by test_footprint.

Ranks are forked (see ranks.py). Facts to FOLDER/RANKS.pt: case -> what each rank found.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

STUDENTS = {"demo-student": "fp32", "demo-teacher": "bf16", "demo-teacher-decoder": "bf16"}
TEACHERS = dict(zip(STUDENTS, ("demo-teacher", "t5-mini", "demo-student-decoder"), strict=True))
PLACEMENTS = ("replica", "zero3")


def students(ranks: int) -> list[str]:
    """All of them, and one on four ranks: a share's dependence on their number is no model's own."""
    return list(STUDENTS)[: 1 if ranks == 4 else None]


SMALL_ZERO3 = {
    "stage": 3,
    "reduce_bucket_size": 100_000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 500,
    "stage3_max_live_parameters": 20_000,
    "stage3_max_reuse_distance": 20_000,
}
"""With bounds that matter at this size: parameters are let go and gathered again."""
LENGTHS = {"questions": 2, "question": 12, "label": 3, "rationale": 9}
SENT: Counter = Counter()


def count(name: str, place: int, argument: str) -> None:
    """Sum the bytes of the whole tensor of a collective."""
    function = getattr(dist, name)

    def counted(*args, **kwargs):
        value = kwargs[argument] if argument in kwargs else args[place]
        tensors = value if isinstance(value, (list, tuple)) else [value]
        SENT[name] += sum(t.numel() * t.element_size() for t in tensors)
        return function(*args, **kwargs)

    setattr(dist, name, counted)


COLLECTIVES = (
    ("all_reduce", 0, "tensor"),
    ("broadcast", 0, "tensor"),
    ("reduce", 0, "tensor"),
    ("all_gather_into_tensor", 0, "output_tensor"),
    ("all_gather", 0, "tensor_list"),
    ("reduce_scatter_tensor", 1, "input"),
    ("reduce_scatter", 1, "input_list"),
)
if __name__ == "__main__":  # before DeepSpeed takes references to them
    for collective in COLLECTIVES:
        count(*collective)

from ibdistill.config import sections  # noqa: E402
from ibdistill.config.load import load_settings  # noqa: E402
from ibdistill.data import tokenizers  # noqa: E402
from ibdistill.models.student import load_student  # noqa: E402
from ibdistill.objectives import distillation, teacher_answers  # noqa: E402
from ibdistill.objectives.weights import step_weights  # noqa: E402
from ibdistill.planning import dryrun  # noqa: E402
from ibdistill.runtime import distributed  # noqa: E402
from ibdistill.teacher import teacher  # noqa: E402
from ibdistill.training import engine  # noqa: E402


def size(tensors, without=frozenset()) -> int:
    """Bytes of the storages, each once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(bytes_ for pointer, bytes_ in found.items() if pointer not in without)


def states(student_engine) -> dict[str, int]:
    """Bytes of the model states of this rank, between backward pass and step."""
    own, inner = list(student_engine.module.parameters()), student_engine.basic_optimizer
    outer = student_engine.optimizer
    parameters = [p.data for p in own] + [p.ds_tensor for p in own if hasattr(p, "ds_tensor")]
    master = [p.data for group in inner.param_groups for p in group["params"]]
    master += getattr(outer, "fp32_partitioned_groups_flat", [])
    moments = [v for state in inner.state.values() for v in state.values() if torch.is_tensor(v)]
    gradients = [p.grad for p in own if p.grad is not None]
    averaged = getattr(outer, "averaged_gradients", {})
    gradients += [g for group in averaged.values() for g in group or []]
    if getattr(outer, "grad_partitions_flat_buffer", None) is not None:
        gradients.append(outer.grad_partitions_flat_buffer)
    held = {t.untyped_storage().data_ptr() for t in parameters}
    return {
        "parameters": size(parameters),
        "gradients": size(gradients),
        "optimizer": size(master, held) + size(moments),
    }


def buckets(outer) -> int:
    """Bytes of the buffers in which gradients wait for their reduction."""
    found = []
    for bucket in getattr(outer, "ipg_buckets", {}).values():
        buffer = bucket.buffer
        found += buffer if isinstance(buffer, list) else [buffer]
    return size([b for b in found if b is not None])


def saved(built, folder: Path) -> int:
    """Bytes of this rank's files of a checkpoint."""
    written = []

    def write(state_dict, path) -> None:
        torch.save(state_dict, buffer := io.BytesIO())
        written.append(buffer.tell())

    built.checkpoint_engine.save = write
    built._copy_recovery_script = lambda save_path: None
    built.save_checkpoint(str(folder), tag="checkpoint", save_latest=False)
    return sum(written)


def measure(name: str, stage: str, loaded: teacher.Teacher, world, folder: Path) -> dict:
    """Some steps with a teacher: the states, what the last step sent, and what a checkpoint writes."""
    settings = load_settings(
        None,
        {
            "student.model": name,
            "student.precision": STUDENTS[name],
            "deepspeed.config": stage,
            "objective.method": "ib+kd",
            "teacher.placement": "replica",
            "teacher.model": TEACHERS[name],
            "optim.batch_size": LENGTHS["questions"] * world.size,
        },
    )
    student = load_student(settings.student, tokenizers.demo_tokenizer(), 0)
    batch = batch_for(student)
    module = distillation.Distillation(student, settings.objective, teacher_width=loaded.width)
    built = engine.build_engine(module, settings.student.precision, settings.optim, settings.deepspeed, world)
    weights = step_weights(settings.objective, {"predict": 6, "explain": 18, "explained": 2})
    seen = []
    module.vid.bias.register_hook(lambda gradient: seen.append(buckets(built.optimizer)))
    signal, facts = loaded(batch), {}
    # ZeRO-3 records its order of modules in the first step, and goes by it from the third on
    for _ in range(3 if built.zero_optimization_stage() == 3 else 2):
        SENT.clear()
        loss, _ = built(batch, weights, signal, 24)
        built.backward(loss, scale_wrt_gas=False)
        facts["states"] = states(built)
        built.step()
        facts["sent"] = dict(SENT)
    facts["buckets"], facts["saved"] = max(seen), saved(built, folder)
    built.destroy()
    return facts


def batch_for(model):
    return dryrun.Lengths(**LENGTHS).batch(model, ("predict", "explain"))


def measure_teacher(loaded: teacher.Teacher, student: str) -> dict:
    """What a teacher keeps, and what its second answer sent."""
    settings = sections.StudentConfig(model=student, precision=STUDENTS[student])
    batch = batch_for(load_student(settings, tokenizers.demo_tokenizer(), 0))
    for _ in range(2):
        SENT.clear()
        loaded(batch)
    return {"bytes": loaded.bytes(), "sent": dict(SENT)}


def main(folder: Path) -> None:
    world = distributed.init()
    facts = {}
    tokenizer, wanted = tokenizers.demo_tokenizer(), teacher_answers.Wanted(questions=True, targets=True)
    small = [str(folder / "small.json")] if world.size == 2 else []
    for name in students(world.size):
        for placement in ("zero3", "replica"):
            asked = sections.TeacherConfig(
                placement=placement, model=TEACHERS[name], precision=STUDENTS[name]
            )
            loaded = teacher.Teacher(asked, wanted, tokenizer, len(tokenizer), world)
            facts[f"{name} teacher {placement}"] = distributed.gather_objects(measure_teacher(loaded, name))
            for stage in ("zero0", "zero1", "zero2", "zero3", *small) if placement == "replica" else ():
                case = f"{name} {Path(stage).stem}"
                facts[case] = distributed.gather_objects(measure(name, stage, loaded, world, folder))
            loaded.close()
    if world.rank == 0:
        torch.save(facts, folder / f"{world.size}.pt")
    dist.barrier()


if __name__ == "__main__":
    from ranks import run

    run(main, Path(sys.argv[1]), ranks=(1, 2, 4))
