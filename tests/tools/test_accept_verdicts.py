"""Each check of tools/accept.py can fail: its measurements are faked, within what is required and beyond."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accept import budgets, inputs, jobs, lines, losses, models, resume, several, speed, teachers

PASSED, FAILED = lines.PASSED, lines.FAILED


def context(folder: Path, small: bool = False) -> lines.Context:
    return lines.Context(folder, "check", small)


def verdicts(folder: Path) -> list[str]:
    return [x["status"] for x in lines.read_lines(folder) if x["status"] in (PASSED, FAILED)]


@pytest.fixture
def faked_jobs(monkeypatch) -> SimpleNamespace:
    """Runs are not built; gets the job that each of them is."""
    job = SimpleNamespace(teacher_answers=SimpleNamespace(flush=lambda: None))
    job.engine = SimpleNamespace(module=SimpleNamespace(model=None))
    monkeypatch.setattr(jobs, "job_of", lambda config: contextlib.nullcontext(job))
    monkeypatch.setattr(jobs, "step_seconds", lambda context, job, steps: [0.5] * steps)
    monkeypatch.setattr(jobs, "wait", lambda context: None)
    monkeypatch.setattr(inputs, "settings", lambda *_, **given: SimpleNamespace(**given))
    monkeypatch.setattr(inputs, "with_teacher", lambda *_, **given: given)
    return job


@pytest.mark.parametrize(
    ("ours", "again", "repeatable", "holds"),
    [
        (1 + 1.9e-5, None, True, True),
        (1 + 2.1e-5, None, True, False),  # twice plain torch's error is 2e-5
        (float("nan"), float("nan"), False, False),
        (1 + 1.9e-5, 1 + 1.8e-5, True, False),
        (1 + 1.9e-5, 1 + 1.8e-5, False, True),
    ],
)
def test_b_values_and_gradients(tmp_path, ours, again, repeatable, holds):
    one = torch.ones(3, dtype=torch.float64)
    results = [[x * one] for x in (1.0, 1 + 1e-5, ours, ours if again is None else again)]
    found = losses.judge(context(tmp_path), "case", *results, torch.float32, repeatable=repeatable)
    assert found == holds and verdicts(tmp_path) == [PASSED if holds else FAILED]


@pytest.mark.filterwarnings("ignore:called a synchronizing")
@pytest.mark.parametrize(("waits", "kernels"), [(4, 9000), (5, 9001)])
def test_c_host_waits_and_kernels(tmp_path, monkeypatch, faked_jobs, waits, kernels):
    def step(job):
        for _ in range(waits):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    event = SimpleNamespace(
        start_ns=lambda: 0,
        duration_ns=lambda: 1,
        device_resource_id=lambda: 7,
        device_type=lambda: torch.autograd.DeviceType.CUDA,
    )
    seen = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: [event] * kernels))
    profiled = SimpleNamespace(export_chrome_trace=lambda path: None, profiler=seen)
    monkeypatch.setattr(budgets, "profile", lambda activities: contextlib.nullcontext(profiled))
    monkeypatch.setattr(budgets.train, "train_step", step)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    budgets.syncs(context(tmp_path))
    assert verdicts(tmp_path) == [PASSED if waits <= 4 else FAILED] * 4


@pytest.mark.parametrize(
    ("last", "off", "expected"),
    [
        (1.0, 0.019, [PASSED] * 6),
        (1.0, 0.021, [PASSED, PASSED, PASSED, FAILED, PASSED, FAILED]),
        (3.0, 0.0, [FAILED, FAILED, FAILED, PASSED, FAILED, PASSED]),
    ],
)
def test_d_losses_beside_a_teacher_and_its_cache(tmp_path, monkeypatch, faked_jobs, last, off, expected):
    """For each student: no teacher, replica, filling and as replica, reading and as replica."""
    calls = iter(range(8))
    losses_ = lambda *_: [2.0, last * (1 + off * (next(calls) % 4 > 1))]  # noqa: E731
    monkeypatch.setattr(jobs, "losses", losses_)
    teachers.placements(context(tmp_path))
    assert verdicts(tmp_path) == expected * 2


@pytest.mark.parametrize(("first", "later", "holds"), [(9e-6, 0.019, 1), (1.1e-5, 0.0, 0), (0.0, 0.021, 0)])
def test_d_overlap(tmp_path, monkeypatch, faked_jobs, first, later, holds):
    factors = iter([1.0] * teachers.STEPS + [1 + first, 1 + later] + [1.0] * teachers.STEPS)
    faked_jobs.teacher_answers._answer = None
    monkeypatch.setattr(jobs, "losses", lambda *_: [2.0 * next(factors)])
    monkeypatch.setattr(teachers, "overwrite_free_blocks", lambda context: None)
    teachers.overlap(context(tmp_path))
    assert verdicts(tmp_path) == [PASSED if holds else FAILED]


@pytest.mark.parametrize(
    ("loss", "turned", "expected"),
    [
        (1 + 9e-5, 0.04, [PASSED, PASSED]),
        (1 + 2e-4, 0.0, [FAILED, PASSED]),  # fp32, bf16
        (1 + 2e-2, 0.0, [FAILED, FAILED]),
        (1.0, 0.05, [FAILED, FAILED]),  # cosine 0.9988
    ],
)
def test_e_models_against_fp64(tmp_path, monkeypatch, loss, turned, expected):
    def computed(context, name, model, device):
        is_truth = next(model.parameters()).dtype == torch.float64
        gradient = torch.tensor([1.0, 0.0 if is_truth else turned], dtype=torch.float64)
        return (1.0 if is_truth else loss), gradient

    model = SimpleNamespace(from_config=lambda *_, **given: torch.nn.Linear(1, 1))
    for kind in ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM"):
        monkeypatch.setattr(models, kind, model)
    monkeypatch.setattr(inputs, "configuration", lambda *_, **given: None)
    monkeypatch.setattr(models, "loss_and_gradients", computed)
    models.gradients(context(tmp_path))
    assert verdicts(tmp_path) == expected * 2


@pytest.mark.parametrize(("plain", "holds"), [(0.51, True), (0.49, False)])
def test_f_speed_against_a_plain_loop(tmp_path, monkeypatch, faked_jobs, plain, holds):
    batch = SimpleNamespace(attention_mask=torch.ones(2, 3), labels={"predict": torch.ones(2)})
    batch.to = lambda device: batch
    monkeypatch.setattr(speed, "step_batches", lambda job, step: [(None, batch)])
    monkeypatch.setattr(speed, "measured", lambda context, run: speed.Measured(0.5, 2**30))
    monkeypatch.setattr(speed, "operations_per_token", lambda model: (1e9, 1e9))
    monkeypatch.setattr(speed.hardware, "measured_peak", lambda device, dtype: 1e12)
    monkeypatch.setattr(speed, "plain_loop", lambda *_: speed.Measured(plain, 2**30))
    monkeypatch.setattr(speed, "planned", lambda *_: None)
    speed.t5(context(tmp_path))
    assert verdicts(tmp_path) == [PASSED if holds else FAILED]


@pytest.mark.parametrize(("share", "holds"), [(0.89, 0), (0.91, 1), (1.09, 1), (1.11, 0)])
def test_h_the_planners_memory(tmp_path, monkeypatch, share, holds):
    choice = SimpleNamespace(bytes=share * 2**30, step=0.5)
    planner = SimpleNamespace(choice=lambda *_: choice)
    monkeypatch.setattr(speed, "Planner", lambda *_, **given: planner)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    config = SimpleNamespace(
        teacher=SimpleNamespace(placement="none"), optim=SimpleNamespace(micro_batch_size=8)
    )
    speed.planned(context(tmp_path), config, speed.Measured(0.5, 2**30))
    assert verdicts(tmp_path) == [PASSED if holds else FAILED]


@pytest.mark.parametrize(("compiled", "retries"), [(0, 0), (1, 0), (0, 1)])
def test_g_ragged_steps(tmp_path, monkeypatch, faked_jobs, compiled, retries):
    counts = iter([7, 7 + compiled])
    counters = iter([{"num_alloc_retries": n, "reserved_bytes.all.peak": 0} for n in (2, 2 + retries)])
    monkeypatch.setattr(budgets, "compilations", lambda cache: next(counts))
    monkeypatch.setattr(budgets, "allocator", lambda context: next(counters))
    budgets.ragged(context(tmp_path))
    assert verdicts(tmp_path) == [FAILED if wrong else PASSED for wrong in (compiled, retries)]


@pytest.mark.parametrize(
    ("codes", "apart", "expected"),
    [
        ([0, 85, 0], 0.9e-4, [PASSED] * 4),
        ([0, 85, 0], 1.1e-4, [PASSED, PASSED, PASSED, FAILED]),
        ([0, 0, 0], 0.0, [PASSED, FAILED]),  # it ended before the signal, or did not stop
        ([0, 85, 1], 0.0, [PASSED, PASSED, FAILED]),
    ],
)
def test_i_stop_and_resume(tmp_path, monkeypatch, codes, apart, expected):
    weights, codes = iter([1.0, 1.0 + apart]), iter(codes)
    monkeypatch.setattr(resume, "arguments", lambda context, folder: [])
    monkeypatch.setattr(resume, "run", lambda command, log, signal_at=None: next(codes))
    monkeypatch.setattr(resume, "load_file", lambda path: {"w": torch.tensor([next(weights)]).double()})
    resume.stopped(context(tmp_path))
    assert verdicts(tmp_path) == expected


@pytest.mark.parametrize(("length", "turned", "holds"), [(1.009, 0.04, 1), (1.02, 0.0, 0), (1.0, 0.05, 0)])
def test_j_gradients_over_ranks(tmp_path, monkeypatch, length, turned, holds):
    for name, gradient in (("truth/zero0-replica", [1.0, 0.0]), ("stages/zero3-replica", [length, turned])):
        path = tmp_path / f"{name}.pt"
        path.parent.mkdir()
        torch.save(torch.tensor(gradient), path)
    for name in ("model_folder", "records_folder"):
        monkeypatch.setattr(inputs, name, lambda *_: None)
    monkeypatch.setattr(several, "work", lambda context, ranks, what, name: tmp_path / what)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    several.gradients(context(tmp_path))
    assert verdicts(tmp_path) == [PASSED if holds else FAILED]
