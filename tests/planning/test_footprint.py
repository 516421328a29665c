"""Memory, traffic and operations as predicted from shapes, against what DeepSpeed and torch do on a CPU.

Model states and traffic: 1, 2 and 4 ranks over gloo, see workers/footprints.py. Activations: the running sum
of torch's own allocations, from its profiler's memory events. Operations: torch's FlopCounterMode.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from harness import ROOT, output_of, steps, tiny
from plan import checkpoints, costs, traces
from torch.utils.flop_counter import FlopCounterMode
from workers import footprints as worker
from workers.footprints import allocated_peak

from ibdistill.config import sections
from ibdistill.config.load import load_settings
from ibdistill.data import tokenizers
from ibdistill.models import forward as models_forward
from ibdistill.models import presets
from ibdistill.models import student as models_student
from ibdistill.objectives import distillation
from ibdistill.objectives import weights as objectives_weights
from ibdistill.ops import linear
from ibdistill.ops.head_loss.aligned import AlignedStream, AlignedTeacher, Side, aligned_loss
from ibdistill.ops.head_loss.api import Stream
from ibdistill.ops.head_loss.reference import head_loss_reference
from ibdistill.planning import dryrun, footprint, memory_check
from ibdistill.planning.footprint import Zero
from ibdistill.planning.head_loss_memory import aligned_bytes, head_loss_bytes
from ibdistill.runtime import deepspeed_fixes, hardware
from ibdistill.training.prepare import prepare

BOTH = ("predict", "explain")
MODELS = {"demo-student": "fp32", "t5-mini": "bf16", "demo-teacher-decoder": "bf16"}
"""The students of the tests in this process; those of the worker are smaller."""
STAGES = ("zero0", "zero1", "zero2", "zero3")
PLACED = [(ranks, name) for ranks in (1, 2, 4) for name in worker.students(ranks)]
CASES = [(ranks, name, stage) for ranks, name in PLACED for stage in STAGES]
CASES += [(2, name, "small") for name in worker.STUDENTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the worker found, in RANKS.pt."""
    made = tmp_path_factory.mktemp("footprints")
    (made / "small.json").write_text(json.dumps({"zero_optimization": worker.SMALL_ZERO3}))
    output_of(str(ROOT / "tests/workers/footprints.py"), str(made))
    return made


def settings(name: str, stage: str = "zero0", **more) -> sections.Config:
    precision = (MODELS | worker.STUDENTS)[name]
    given = {
        "student.model": name,
        "student.precision": precision,
        "student.tokenizer": "train",  # as many rows as the demo's
        "student.vocab_size": len(tokenizers.demo_tokenizer()),
        "deepspeed.config": stage,
        "objective.method": "ib+kd",
        "teacher.placement": "replica",
        "teacher.model": worker.TEACHERS.get(name, "demo-teacher"),
        "teacher.precision": precision,
    }
    return load_settings(None, given | more)


def predict(folder, name: str, stage: str):
    """The student's skeleton, its parameters' sizes, ZeRO's settings and what stage 3 gathers."""
    chosen = settings(name, str(folder / "small.json") if stage == "small" else stage)
    student, teacher = footprint.student_skeleton(chosen), footprint.teacher_skeleton(chosen)
    zero, sizes = Zero.read(chosen.deepspeed.config), footprint.student_sizes(chosen, student, teacher)
    lengths = dryrun.Lengths(**worker.LENGTHS)
    return sizes, zero, footprint.student_gathers(zero, student, lengths, BOTH, sizes)


@pytest.mark.parametrize(("ranks", "name", "stage"), CASES)
def test_model_states_and_traffic_of_the_student(folder, ranks, name, stage):
    facts = torch.load(folder / f"{ranks}.pt")[f"{name} {stage}"]
    sizes, zero, gathered = predict(folder, name, stage)
    precision = worker.STUDENTS[name]
    parts, host = footprint.student_states(sizes, precision, zero, ranks)
    states = {part: parts[part] for part in ("parameters", "gradients", "optimizer")}
    assert host == 0
    for fact in facts:
        assert sum(fact["states"].values()) == pytest.approx(sum(states.values()), rel=0.05)
        assert fact["states"]["parameters"] == pytest.approx(states["parameters"], rel=0.01)
        assert fact["states"]["optimizer"] == pytest.approx(states["optimizer"], rel=0.01)
        assert fact["buckets"] == parts["buckets"]
    of_rank_0, of_all = checkpoints.sizes_of(sizes, precision, zero, ranks)
    names = 60_000  # bytes of a rank's files that are no tensors
    assert 0 < facts[0]["saved"] - of_rank_0 < 0.01 * of_rank_0 + names
    assert 0 < sum(fact["saved"] for fact in facts) - of_all < 0.01 * of_all + ranks * names
    expected = costs.student_traffic(sizes, precision, zero, 1, gathered)
    if ranks == 1:  # nothing is gathered then, though ZeRO's stages reduce gradients all the same
        expected = {} if stage == "zero0" else expected
        expected.pop("all_gather", None)
    names = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}
    for fact in facts:
        found = {
            names.get(name, name): size for name, size in fact["sent"].items() if size > 64
        }  # norms, flags
        assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("ranks", "name"), PLACED)
def test_the_teachers_share_and_traffic(folder, ranks, name):
    chosen = settings(name)
    teacher = footprint.teacher_skeleton(chosen)
    lengths = dryrun.Lengths(**worker.LENGTHS)
    gathered = footprint.teacher_gathers(teacher, lengths, BOTH)
    found = torch.load(folder / f"{ranks}.pt")
    for placement in worker.PLACEMENTS:
        asked = dataclasses.replace(chosen.teacher, placement=placement)
        parts, _ = footprint.teacher_states(
            teacher.sizes(), teacher.head, asked, ranks, ranks, wants_head=True
        )
        expected = 0
        if placement == "zero3":
            expected = costs.teacher_traffic(teacher.head, asked.precision, 1, gathered, targets=True)
        for fact in found[f"{name} teacher {placement}"]:
            assert fact["bytes"] == pytest.approx(parts["teacher"], rel=0.05)
            if ranks == 1:  # there is nobody to send anything to
                continue
            assert sum(fact["sent"].values()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("case", worker.SHARED, ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}-{case[3]}")
def test_the_activations_peak_of_ranks_that_share_sequences(folder, case):
    """Of the rank that holds most, within 5 %."""
    *asked, questions, lengths = case
    planned = traces.Traces(worker.shared_settings(*asked), *lengths, device="cpu")
    found = torch.load(folder / "2.pt")[case]
    assert max(found) == pytest.approx(planned.living(asked[1], questions), rel=0.05)
    assert max(found) > 1.02 * min(found) or questions > 1 or asked[1]  # the targets lie on one of them


def activation_bytes(config, student, teacher, lengths, device):
    """The most bytes that the forward and backward pass of a micro-batch hold beside the model states."""
    objective = config.objective
    wanted = objectives_weights.wanted(objective) if teacher else None
    head = teacher.head if teacher else (0, 0)
    living = dryrun.student_step(student, lengths, objective, wanted=wanted, teacher_head=head, device=device)
    inside = head_loss_bytes(
        *(lengths.targets(objectives_weights.streams_of(objective)), lengths.questions, student.head),
        config.student.precision,
        mi=objectives_weights.mi_settings(objective) is not None,
        teacher=head if wanted and wanted.targets else None,
        device=device,
    )
    return max(living.peak, living.at_head + inside)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("method", "checkpointing"),
    [
        *[("dss", False), ("dss", True), ("ib", False), ("ib+kd", False)],
        *[("cot", False), ("dss+cot", False), ("cot+ib+kd", False)],
    ],
)
def test_the_activations_peak(monkeypatch, name, method, checkpointing):
    """Within 25 %; measured by the running sum of torch's allocations (profiler)."""
    for depth in ("num_layers", "num_decoder_layers"):  # instead of 4, which say the same
        monkeypatch.setitem(presets.PRESETS["t5-mini"], depth, 2)
    given = {"objective.method": method, "student.gradient_checkpointing": checkpointing}
    if "kd" not in method:
        given |= {"teacher.placement": "none"}
    chosen = settings(name, **given)
    lengths = dryrun.Lengths(questions=2, question=90, label=5, rationale=40)
    student, teacher = footprint.student_skeleton(chosen), footprint.teacher_skeleton(chosen)
    predicted = activation_bytes(chosen, student, teacher, lengths, "cpu")

    model = models_student.load_student(chosen.student, tokenizers.demo_tokenizer(), 0)
    wanted, width = objectives_weights.wanted(chosen.objective), teacher.head[1] if teacher else 0
    dtype = hardware.DTYPES[MODELS[name]]
    module = distillation.Distillation(model, chosen.objective, teacher_width=width).to(dtype)
    batch, signal = lengths.batch(model, objectives_weights.streams_of(chosen.objective)), None
    if wanted:
        torch.set_default_dtype(dtype)
        signal = dryrun.teacher_answer(batch, wanted, teacher.head)
        torch.set_default_dtype(torch.float32)
        for tensor in signal.tensors():
            tensor.normal_()
    counts = {"predict": 20, "explain": 160, "rationale": 160, "answer": 20, "explained": 4}
    arguments = batch, objectives_weights.step_weights(chosen.objective, counts), signal, 360
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def learn():
        module(*arguments)[0].backward()

    learn()  # libraries warm up
    assert allocated_peak(learn) == pytest.approx(predicted, rel=0.25)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "theirs", "shared", "divergence"),
    [
        (200, 8000, 6000, 6000, "forward"),
        (700, 8000, 6000, 5000, "jsd"),
        (37, 9000, 6000, 1000, "reverse"),
        (60, 4000, 15000, 2000, "forward"),
    ],
)
def test_the_peak_of_the_loss_across_vocabularies(
    monkeypatch, rows, vocabulary, theirs, shared, divergence, precision
):
    """Within 5 % of torch's own allocations, which huge pages are not among."""
    monkeypatch.setattr(
        linear, "empty_in_huge_pages", lambda shape, x, dtype: x.new_empty(shape, dtype=dtype)
    )
    width, wide, dtype = 64, 48, hardware.DTYPES[precision]
    hidden, weight = (torch.randn(n, width, dtype=dtype).requires_grad_() for n in (rows, vocabulary))
    labels, place = torch.randint(shared, (rows,)), torch.arange(rows)
    spans = torch.stack([place, place + 1, place, place + 1, labels, torch.zeros_like(place)], 1)
    cu = torch.tensor([0, rows], dtype=torch.int32)
    target = AlignedStream(torch.randn(rows, wide, dtype=dtype), labels, cu, spans)
    sides = tuple(Side.of(torch.arange(shared), n) for n in (vocabulary, theirs))
    head = torch.randn(theirs, wide, dtype=dtype)
    teacher = AlignedTeacher(target, None, (sides,), head, divergence=divergence)

    def learn():
        aligned_loss(Stream(hidden, labels, cu), weight, None, target, teacher)

    learn()
    shapes = rows, (vocabulary, width), (theirs, wide)
    predicted = aligned_bytes(*shapes, precision, device="cpu", divergence=divergence, shared=shared)
    assert allocated_peak(learn) == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("elements", [10_000, 4_000_000])
def test_the_updates_peak_in_bf16_without_zero(make_job, monkeypatch, elements):
    """Less than the largest parameter at once, and all of them."""
    monkeypatch.setattr(deepspeed_fixes, "STEP_ELEMENTS", elements)
    job = make_job(**{"student.precision": "bf16", "deepspeed.config": "zero0"})
    sizes = [(p.numel(), True) for p in job.engine.module.parameters()]
    steps(job, 1)
    for parameter in job.engine.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    predicted = footprint.step_buffers(sizes, "bf16", Zero.read("zero0"), 1)
    assert allocated_peak(job.engine.optimizer.step) == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("method", "checkpointing"), [("ib+kd", False), ("ib+kd", True), ("cot+kd", False)])
def test_operations_of_the_blocks(name, method, checkpointing):
    given = {"student.gradient_checkpointing": checkpointing, "objective.method": method}
    chosen = settings(name, **{"student.dropout": 0.1}, **given)
    lengths = dryrun.Lengths(questions=3, question=50, label=4, rationale=30)
    student, teacher = footprint.student_skeleton(chosen), footprint.teacher_skeleton(chosen)
    predicted = costs.operations(student, lengths, chosen.objective, teacher, checkpointing=checkpointing)
    model = models_student.load_student(chosen.student, tokenizers.demo_tokenizer(), 0)
    batch = lengths.batch(model, objectives_weights.streams_of(chosen.objective))
    with FlopCounterMode(display=False) as counter:
        states = models_forward.states(model, batch)
        sum(hidden.sum() for hidden in states.targets.values()).backward()
    assert counter.get_total_flops() == pytest.approx(predicted.student, rel=0.02)
    # a teacher that is asked for question states only reads no targets, and that of cot+kd is asked for more
    for streams in (batch.streams, ()) if method == "ib+kd" else (batch.streams,):
        forward = costs.forward_operations(student.model, lengths, streams)
        with FlopCounterMode(display=False) as counter:
            models_forward.states(model, batch, targets=bool(streams))
        assert counter.get_total_flops() == pytest.approx(forward, rel=0.02)


def test_operations_of_the_head():
    chosen = settings("demo-student", **{"objective.method": "dss", "teacher.placement": "none"})
    student = footprint.student_skeleton(chosen)
    lengths = dryrun.Lengths(questions=3, question=50, label=4, rationale=30)
    rows, width = student.head
    weight = torch.randn(rows, width, requires_grad=True)
    streams = []
    for n in (lengths.label, lengths.rationale):
        hidden = torch.randn(3 * n, width, requires_grad=True)
        streams.append(Stream(hidden, torch.zeros(3 * n, dtype=torch.long), torch.arange(4) * n))
    factors = objectives_weights.step_weights(
        chosen.objective, {"predict": 12, "explain": 90, "explained": 3}
    )
    weights = distillation.pair_weights(("predict", "explain"), factors)
    with FlopCounterMode(display=False) as counter:
        head_loss_reference(*streams, weight, weights=weights)[0].backward()
    assert counter.get_total_flops() == costs.operations(student, lengths, chosen.objective).head


def test_what_cannot_fit_is_refused_before_anything_is_loaded(world, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("ibdistill.training.build_student.load_student", refuse)
    monkeypatch.setattr(memory_check, "free_memory", lambda device, ranks: 30 * 2**30)
    chosen = tiny(tmp_path / "run") | {
        "student.model": "meta-llama/Llama-3.1-8B",
        "student.precision": "bf16",
        "student.tokenizer": "train",
    }
    message = (
        r"needs 119\.\d+ GiB on a rank before any activation \(parameters 14\.96, gradients 14\.96, optim"
    )
    with pytest.raises(ValueError, match=message):
        prepare(load_settings(None, chosen), world)
    with pytest.raises(AssertionError, match="a model was loaded"):
        prepare(load_settings(None, chosen | {"run.check_memory": False}), world)


def test_the_refusal_names_what_would_fit(world, monkeypatch):
    monkeypatch.setattr(memory_check, "free_memory", lambda device, ranks: 3 * 2**30)
    monkeypatch.setattr(memory_check.distributed, "gather_objects", lambda value: [value] * 4)
    four = type(world)(rank=0, size=4, local_rank=0, device=torch.device("cuda"))
    given = {"student.tokenizer": "train", "objective.method": "kd", "teacher.model": "google/t5-v1_1-xxl"}
    given |= {"deepspeed.config": "zero2", "student.precision": "fp32"}
    chosen = load_settings(None, given | {"student.model": "t5-mini", "teacher.placement": "replica"})
    with pytest.raises(ValueError, match=r"teacher 20\.74\), and 3\.00 GiB are free") as refused:
        memory_check.check(chosen, four)
    text = str(refused.value)
    assert "--deepspeed.config zero2_offload --teacher.placement cpu_offload" not in text  # 5 GiB of the host
    assert "Nothing fits 4 ranks; use more" in text
    monkeypatch.setattr(memory_check, "free_memory", lambda device, ranks: 8 * 2**30)
    with pytest.raises(ValueError, match=r"would fit: --deepspeed\.config \S+ --teacher\.placement zero3"):
        memory_check.check(chosen, four)


def test_a_teacher_that_only_writes_is_not_added_to_the_student(world, monkeypatch):
    given = {"student.tokenizer": "train", "student.model": "t5-v1_1-small", "teacher.rationales": "all"}
    given |= {"teacher.placement": "replica", "teacher.model": "google/t5-v1_1-small"}
    given |= {"deepspeed.config": "zero0", "student.precision": "fp32", "teacher.precision": "fp32"}
    chosen = load_settings(None, given)
    student = 16 * sum(n for n, _ in footprint.student_skeleton(chosen).sizes())
    monkeypatch.setattr(memory_check, "free_memory", lambda device, ranks: student + 1000)
    memory_check.check(chosen, world)
    both = dataclasses.replace(chosen, objective=dataclasses.replace(chosen.objective, method="kd"))
    with pytest.raises(ValueError, match="Nothing fits 1 ranks|would fit"):
        memory_check.check(both, world)
