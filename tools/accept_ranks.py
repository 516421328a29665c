"""What the ranks of tools/accept.py's checks do; `accept/several.py` starts it. Not for use by hand.

deepspeed --num_gpus N tools/accept_ranks.py OUT truth|stages|bandwidth|speed TARGET [--small]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accept import inputs, jobs
from accept.lines import Context
from accept.several import PLACEMENTS, STAGES
from deepspeed.utils import safe_get_full_grad

from ibdistill import train


def gradients(context: Context, target: Path, cases: list[tuple[str, str]]) -> None:
    """Write the gradients of the first step, as one fp32 vector per case, to TARGET/STAGE-PLACEMENT.pt."""
    for stage, placement in cases:
        overrides = inputs.with_teacher(context, "t5-teacher", placement, "ib+kd")
        overrides |= {"deepspeed__config": stage, "optim__batch_size": 16, "optim__clip_norm": 0.0}
        overrides |= {"student__precision": "fp32", "teacher__precision": "fp32", "run__check_memory": False}
        name = f"{stage}-{placement}"
        with jobs.job_of(inputs.settings(context, f"{target.name}-{name}", "t5", **overrides)) as job:
            parts, step = [], job.engine.step

            def keep_and_step(job=job, parts=parts, step=step) -> None:
                if job.engine.is_gradient_accumulation_boundary():
                    for parameter in job.engine.module.parameters():
                        parts.append(safe_get_full_grad(parameter).float().flatten().cpu())
                step()

            job.engine.step = keep_and_step
            train.train_step(job)
            job.engine.step = step
            if job.world.rank == 0:
                torch.save(torch.cat(parts), target / f"{name}.pt")


def bandwidth(context: Context, target: Path) -> None:
    """Write the bus bandwidth of an all-reduce: 2 (n - 1) / n times the bytes, over the best time."""
    world = jobs.world()
    size = (1 << 20 if context.small else 1 << 28) // 4
    tensor = torch.ones(size, device=world.device)
    best = float("inf")
    for _ in range(10):
        jobs.wait(context)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        jobs.wait(context)
        best = min(best, time.perf_counter() - start)
    if world.rank == 0:
        rate = 2 * (world.size - 1) / world.size * 4 * size / best / 1e9
        (target / "bandwidth.json").write_text(json.dumps({"gbs": rate}))


def speed(context: Context, target: Path) -> None:
    """Write tokens/s of all ranks together, with 64 questions per step and with 16 per rank."""
    world, rates = jobs.world(), {}
    for kind, batch in (("64 together", 64), ("16 each", 16 * world.size)):
        run = f"{target.name}-{batch}"
        config = inputs.settings(context, run, "t5", optim__batch_size=batch, deepspeed__config="zero2")
        with jobs.job_of(config) as job:
            jobs.step_seconds(context, job, 3)
            job.meter.close_interval()
            seconds = sum(jobs.step_seconds(context, job, 10))
            rates[kind] = job.meter.close_interval().tokens / seconds
    if world.rank == 0:
        (target / "speed.json").write_text(json.dumps(rates))


def main() -> None:
    """Do what the command line says."""
    out, what, target = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    context = Context(out, what, "--small" in sys.argv)
    if what == "truth":
        gradients(context, target, [("zero0", "replica")])
    elif what == "stages":
        stages = ("zero2", "zero3") if context.small else STAGES
        cases = [(stage, "replica") for stage in stages]
        cases += [("zero2", placement) for placement in PLACEMENTS[1 : 2 if context.small else None]]
        gradients(context, target, cases)
    elif what == "bandwidth":
        bandwidth(context, target)
    else:
        speed(context, target)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if not a.startswith("--local_rank")]
    main()
