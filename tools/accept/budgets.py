"""Checks c and g: how often the host waits for the device, how many kernels a step starts, and whether
steps with lengths that never occurred before compile or allocate again."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from accept import inputs, jobs
from accept.lines import Context
from ibdistill import train
from ibdistill.training.job import Job

SYNCS = 4
"""Waits of the host per step that are accepted: one for the gradients' norm is needed, and DeepSpeed reads
the overflow and the norm again."""
KERNELS = {"t5": 9000, "qwen2": 9000}
"""Kernels per step of one micro-batch that are accepted. Counted on fake tensors, not on a GPU."""
STEPS = 3


def syncs(context: Context) -> None:
    """Three steps each of T5-base and Qwen2.5-0.5B beside a teacher, after warming up."""
    for student in ("t5", "qwen2"):
        overrides = inputs.with_teacher(context, f"{student}-teacher", "replica", "ib", optim__batch_size=8)
        config = inputs.settings(context, f"budget-{student}", student, **overrides)
        with jobs.job_of(config) as job:
            jobs.step_seconds(context, job, 3)
            if context.device.type == "cuda":
                places = waits(job)
                count = sum(places.values()) / STEPS
                worst = "; ".join(f"{n / STEPS:g} at {place}" for place, n in places.most_common(6))
                message = f"{count:g} per step, at most {SYNCS}: {worst}"
                context.verdict(f"{student}, host waits", count <= SYNCS, message)
            else:
                context.not_run(f"{student}, host waits", "a CPU has none")
            profiled(context, student, job)


def waits(job: Job) -> Counter[str]:
    """Place in the code -> how often it waited for the device in `STEPS` steps."""
    places: Counter[str] = Counter()

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        if "synchronizing CUDA operation" in str(message):
            places[place_of([(f.filename, f.lineno) for f in traceback.extract_stack()[:-1]])] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(STEPS):
                train.train_step(job)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return places


def place_of(frames: list[tuple[str, int]]) -> str:
    """FILE:LINE of the innermost frame that is neither torch's nor that of the machinery of warnings."""
    path, line = [f for f in frames if "torch/" not in f[0] and Path(f[0]).name != "warnings.py"][-1]
    return f"{Path(path).name}:{line}"


def profiled(context: Context, student: str, job: Job) -> None:
    """One profiled step: kernels, how long the device works, and how long on two streams at once."""
    on_gpu = context.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as step:
        train.train_step(job)
        jobs.wait(context)
    trace = context.out / f"step_{student}.json.gz"
    step.export_chrome_trace(str(trace))
    spans = [
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.device_resource_id())
        for event in step.profiler.kineto_results.events()
        if not on_gpu or event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    if not on_gpu:
        context.info(f"{student}, operations", f"{len(spans)} in a step, nested ones counted; {trace.name}")
        return
    busy, both = overlapping(spans)
    message = f"{len(spans)} per step, at most {KERNELS[student]}; the device works {busy / 1e6:.1f} ms, "
    message += f"{both / 1e6:.1f} ms of it on two streams at once; {trace.name}"
    context.verdict(f"{student}, kernels", len(spans) <= KERNELS[student], message)


def overlapping(spans: list[tuple[int, int, int]]) -> tuple[int, int]:
    """Time in which something runs, and in which at least two streams do. `spans`: start, end, stream."""
    changes = sorted(
        [(start, 1, stream) for start, _, stream in spans] + [(end, -1, s) for _, end, s in spans]
    )
    running: Counter[int] = Counter()
    busy = both = before = 0
    for moment, change, stream in changes:
        streams = sum(n > 0 for n in running.values())
        busy += (moment - before) * (streams > 0)
        both += (moment - before) * (streams > 1)
        running[stream] += change
        before = moment
    return busy, both


def ragged(context: Context) -> None:
    """Two hundred steps in plain shuffling, each with lengths of its own."""
    steps, warm = (24, 4) if context.small else (200, 20)
    config = inputs.settings(context, "ragged", "t5", optim__batch_size=8, objective__method="ib")
    cache = context.out / "work" / "triton"
    with jobs.job_of(config) as job:
        jobs.step_seconds(context, job, warm)
        compiled, before = compilations(cache), allocator(context)
        seconds = 1e3 * np.array(jobs.step_seconds(context, job, steps - warm))
        new, after = compilations(cache) - compiled, allocator(context)
    low, middle, high, most = np.percentile(seconds, [5, 50, 95, 100])
    context.info("steps", f"{low:.1f} / {middle:.1f} / {high:.1f} / {most:.1f} ms (5, 50, 95, 100 %)")
    context.verdict("compilations after the first steps", new == 0, f"{new}, must be 0")
    if before is not None:
        retries = after["num_alloc_retries"] - before["num_alloc_retries"]
        grown = (after["reserved_bytes.all.peak"] - before["reserved_bytes.all.peak"]) / 2**20
        context.verdict("allocator's retries", retries == 0, f"{retries}; {grown:.0f} MiB more were reserved")


def compilations(cache: Path) -> int:
    """How many kernels Triton has compiled into its cache."""
    return sum(1 for _ in cache.rglob("*.ttir")) if cache.exists() else 0


def allocator(context: Context) -> dict[str, int] | None:
    """The allocator's counters, or None on a CPU."""
    return torch.cuda.memory_stats() if context.device.type == "cuda" else None
