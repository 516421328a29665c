"""What DeepSpeed really allocates and sends; run by test_footprint.

Ranks are forked (see ranks.py). Facts to FOLDER/RANKS.pt: case -> what each rank found.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

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
SHARED = [
    ("cot", False, "fp32", 1, (1400, 60, 1500)),
    ("cot", True, "bf16", 1, (1400, 60, 1500)),
    ("cot+kd", False, "bf16", 3, (701, 33, 129)),
    ("cot+ib", False, "fp32", 1, (1400, 60, 1500)),
]
"""Method, checkpointing, precision, questions and lengths of micro-batches whose sequences two ranks share.
In those of one question the second rank has nearly all of the targets, or with `cot+ib` all of them."""
EXCHANGE = dist.all_to_all_single
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
if __name__ == "__main__":  # before DeepSpeed's backend starts, which takes references to them
    for collective in COLLECTIVES:
        count(*collective)

from ibdistill.config import sections  # noqa: E402
from ibdistill.config.load import load_settings  # noqa: E402
from ibdistill.data import tokenizers  # noqa: E402
from ibdistill.models import sequence_parallel  # noqa: E402
from ibdistill.models.student import load_student  # noqa: E402
from ibdistill.objectives import distillation, teacher_answers, weights  # noqa: E402
from ibdistill.planning import dryrun, footprint  # noqa: E402
from ibdistill.runtime import distributed, hardware  # noqa: E402
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
    factors = weights.step_weights(settings.objective, {"predict": 6, "explain": 18, "explained": 2})
    seen = []
    module.vid.bias.register_hook(lambda gradient: seen.append(buckets(built.optimizer)))
    signal, facts = loaded(batch), {}
    # ZeRO-3 records its order of modules in the first step, and goes by it from the third on
    for _ in range(3 if built.zero_optimization_stage() == 3 else 2):
        SENT.clear()
        loss, _ = built(batch, factors, signal, 24)
        built.backward(loss, scale_wrt_gas=False)
        facts["states"] = states(built)
        built.step()
        facts["sent"] = dict(SENT)
    facts["buckets"], facts["saved"] = max(seen), saved(built, folder)
    built.destroy()
    return facts


def shared_settings(method: str, checkpointing: bool, precision: str) -> sections.Config:
    """A run whose sequences two ranks share."""
    given = {"student.model": "demo-teacher-decoder", "student.precision": precision}
    given |= {"student.gradient_checkpointing": checkpointing, "objective.method": method}
    given |= {"data.packing": "on", "optim.sequence_parallel": 2, "objective.estimator": "paper"}
    if "kd" in method:
        given |= {"teacher.placement": "replica", "teacher.precision": precision}
        given["teacher.model"] = "demo-student-decoder"
    return load_settings(None, given)


def exchange_elsewhere(received, parts, taken, given, group) -> None:
    """An exchange in memory that torch does not count, because gloo's threads hold it for a while longer."""

    def beside(tensor):
        return torch.from_numpy(np.empty(tensor.shape, f"i{tensor.itemsize}")).view(tensor.dtype)

    EXCHANGE(out := beside(received), beside(parts).copy_(parts), taken, given, group)
    received.copy_(out)


def shared_activations(
    method: str, checkpointing: bool, precision: str, questions: int, lengths: tuple[int, int, int]
) -> int:
    """The most bytes that torch gives out in a forward and backward pass over this rank's part."""
    settings = shared_settings(method, checkpointing, precision)
    objective, dtype = settings.objective, hardware.DTYPES[precision]
    sequence_parallel.start(2, whole_questions=weights.whole_questions(settings))
    model = load_student(settings.student, tokenizers.demo_tokenizer(), 0)
    module = distillation.Distillation(model, objective).to(dtype)
    whole = dryrun.Lengths(questions, *lengths).batch(model, weights.streams_of(objective), packed=True)
    batch, signal = sequence_parallel.part_of(whole), None
    if wanted := weights.wanted(objective):
        torch.set_default_dtype(dtype)
        signal = dryrun.teacher_answer(batch, wanted, footprint.teacher_skeleton(settings).head)
        torch.set_default_dtype(torch.float32)
        for tensor in signal.tensors():
            tensor.normal_()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    factors = weights.step_weights(objective, {"rationale": 160, "answer": 20, "explained": 4})

    def learn() -> None:
        module(batch, factors, signal, 360)[0].backward()

    learn()  # libraries warm up
    with mock.patch.object(dist, "all_to_all_single", exchange_elsewhere):
        found = allocated_peak(learn)
    sequence_parallel.start(1)
    return found


def allocated_peak(run: Callable[[], None]) -> int:
    """The most that torch's allocator gave out at once while it ran, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


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
    for case in SHARED if world.size == 2 else ():
        facts[case] = distributed.gather_objects(shared_activations(*case))
    if world.rank == 0:
        torch.save(facts, folder / f"{world.size}.pt")
    dist.barrier()


if __name__ == "__main__":
    from ranks import run

    run(main, Path(sys.argv[1]), ranks=(1, 2, 4))
