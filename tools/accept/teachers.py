"""Check d: the placements of a teacher in one process, and that overlapping changes nothing."""

from __future__ import annotations

import math

import torch

from accept import inputs, jobs
from accept.lines import Context

STEPS = 20
CACHED = 2e-2
"""How far a loss may be off, relatively, whose teacher answers from a cache: the cache keeps an answer in its
form (`teacher.cache_form`), so not to the last bit."""
OVERLAP_FIRST, OVERLAP_LATER = 1e-5, 2e-2
"""How far overlapping may move a loss, relatively: at the first step, where the weights are the same, only by
another order of additions, and later by what steps in bf16 make of that."""


def placements(context: Context) -> None:
    """Twenty steps without a teacher, with one in the job, and with its cache being written and then read."""
    steps = 6 if context.small else STEPS
    for student in ("t5", "qwen2"):
        with jobs.job_of(inputs.settings(context, f"{student}-none", student)) as job:
            judge(context, f"{student}, no teacher", jobs.losses(job, steps))
        first = None
        # the third run finds in the cache what the second has written
        cache = str(context.folder(f"cache-{student}"))
        for run, more in (
            ("replica", {}),
            ("filling", {"teacher__cache": cache}),
            ("reading", {"teacher__cache": cache}),
        ):
            overrides = inputs.with_teacher(context, f"{student}-teacher", "replica", **more)
            overrides |= {"optim__batch_size": 8, "data__subsample": 64}
            config = inputs.settings(context, f"{student}-{run}", student, **overrides)
            with jobs.job_of(config) as job:
                losses = jobs.losses(job, steps)
                judge(context, f"{student}, {run}", losses)
                if run == "filling":
                    job.teacher_answers.flush()
            first = first or losses
            error = max(abs(a / b - 1) for a, b in zip(losses, first, strict=True))
            if run != "replica":
                context.verdict(
                    f"{student}, {run} as replica",
                    error < CACHED,
                    f"losses differ by {error:.1e}, at most {CACHED:.0e}",
                )


def judge(context: Context, case: str, losses: list[float]) -> None:
    """Losses are finite and fall."""
    holds = all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    context.verdict(case, holds, f"loss {losses[0]:.4f}, then {losses[-1]:.4f}", losses=losses)


def overlap(context: Context) -> None:
    """Losses with the teacher on a stream of its own equal those without, for a slow teacher, while memory
    that was freed is filled with other numbers."""
    results = {}
    for overlaps in (False, True):
        more = {"optim__batch_size": 16, "optim__micro_batch_size": 8, "student__dropout": 0.0}
        overrides = inputs.with_teacher(context, "qwen2-teacher", "replica", "kd", **more)
        with jobs.job_of(inputs.settings(context, f"overlap-{overlaps}", "qwen2", **overrides)) as job:
            answers = job.teacher_answers
            if not overlaps:
                answers._stream = None
            answer = answers._answer

            def slow(*arguments, answer=answer):
                torch.cuda._sleep(20_000_000)  # about 10 ms
                return answer(*arguments)

            answers._answer = slow
            losses = []
            for _ in range(STEPS):
                losses += jobs.losses(job, 1)
                overwrite_free_blocks(context)
            results[overlaps] = losses
    errors = [abs(a / b - 1) for a, b in zip(results[True], results[False], strict=True)]
    holds = errors[0] < OVERLAP_FIRST and max(errors) < OVERLAP_LATER
    message = (
        f"losses differ by {errors[0]:.1e} at the first step ({OVERLAP_FIRST:.0e}) and at most "
        f"{max(errors):.1e} ({OVERLAP_LATER:.0e})"
    )
    context.verdict("on and off", holds, message, **{f"overlap {k}": v for k, v in results.items()})


def overwrite_free_blocks(context: Context) -> None:
    """Overwrite the allocator's free blocks, in all sizes that a batch's tensors have, with other ids."""
    blocks = [
        torch.full((2**power,), 3, dtype=torch.int64, device=context.device)
        for power in range(6, 18)
        for _ in range(8)
    ]
    del blocks
