"""The check before a run loads anything: it refuses a run that cannot fit, and names settings that would."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

import torch

from ibdistill.config.sections import Config
from ibdistill.config.zero_file import DS_CONFIGS
from ibdistill.objectives import weights
from ibdistill.objectives.teacher_answers import Wanted
from ibdistill.planning import footprint
from ibdistill.planning.dryrun import Skeleton
from ibdistill.planning.evaluation_memory import copied_bytes, sampling
from ibdistill.planning.footprint import PLACED, Zero
from ibdistill.runtime import distributed
from ibdistill.runtime.distributed import World
from ibdistill.runtime.hardware import GIB


def certain_bytes(
    config: Config, student: Skeleton | None, teacher: Skeleton | None, ranks: int, on_node: int, device: str
) -> tuple[dict[str, int], int]:
    """Bytes that a run needs whatever its batches are: by part on the device, and in the host's memory."""
    parts, host = {}, 0
    if student is not None:
        zero, sizes = Zero.read(config.deepspeed.config), footprint.student_sizes(config, student, teacher)
        if device == "cpu":  # there the part of a bucket that is never written takes no memory
            bucket = min(zero.reduce_bucket, sum(n for n, t in sizes if t))
            zero = dataclasses.replace(zero, reduce_bucket=bucket)
        in_4bit = student.frozen_linear if config.student.load_in_4bit else 0
        precision = config.student.precision
        parts, host = footprint.student_states(sizes, precision, zero, ranks, in_4bit=in_4bit)
        parts["evaluation"] = copied_bytes(student, precision, zero.stage, in_4bit=in_4bit > 0)
        if sampled := sampling(student, config, device=device):
            parts["keys and values of sampled text"] = sampled.cache
    if teacher is not None:
        wanted = weights.wanted(config.objective) or Wanted(False, False, text=True)
        needs = wanted.targets or wanted.text
        more, hosted = footprint.teacher_states(
            teacher.sizes(), teacher.head, config.teacher, ranks, on_node, wants_head=needs
        )
        parts, host = parts | more, host + hosted
    return parts, host


def check(config: Config, world: World) -> None:
    """Raise ValueError if the model states alone, without any activation, exceed the memory. Collective.

    Reads configurations only. The message names the combinations of `deepspeed.config` and
    `teacher.placement` that would fit. A teacher that only writes is closed before the student is loaded.
    """
    together = weights.wanted(config.objective) is not None
    check_models(config, world, with_student=True, with_teacher=together)
    if not together:
        check_models(config, world, with_student=False, with_teacher=True)


def check_models(config: Config, world: World, *, with_student: bool, with_teacher: bool) -> None:
    """`check` for models that are in memory at the same time."""
    if not config.run.check_memory or not (with_student or config.teacher.placement in PLACED):
        return
    student = footprint.student_skeleton(config) if with_student else None
    teacher = footprint.teacher_skeleton(config) if with_teacher else None
    hosts = distributed.gather_objects(socket.gethostname())
    on_node = hosts.count(hosts[world.rank])
    device = world.device.type
    free = min(distributed.gather_objects(free_memory(world.device, on_node)))
    free_host = min(distributed.gather_objects(free_memory(torch.device("cpu"), on_node)))

    def fits(variant: Config) -> tuple[bool, dict[str, int], int]:
        parts, host = certain_bytes(variant, student, teacher, world.size, on_node, device)
        if device == "cpu":  # device and host are the same memory
            return sum(parts.values()) + host <= free, parts, host
        return sum(parts.values()) <= free and host <= free_host, parts, host

    enough, parts, host = fits(config)
    if enough:
        return
    alternatives = [name for name, variant in _variants(config, student, teacher) if fits(variant)[0]]
    needs = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    raise ValueError(
        f"this run needs {sum(parts.values()) / GIB:.2f} GiB on a rank before any activation ({needs}), "
        f"and {free / GIB:.2f} GiB are free"
        + (f"; and {host / GIB:.2f} GiB of the host's memory ({free_host / GIB:.2f} free)" if host else "")
        + ". "
        + (
            f"These would fit: {'; '.join(alternatives)}"
            if alternatives
            else f"Nothing fits {world.size} ranks; use more"
        )
        + ("; or lower run.eval_batch_size or on_policy.max_tokens" if config.on_policy.share else "")
        + ". (tools/plan.py plans; --run.check_memory false skips this check)"
    )


def _variants(config: Config, student: Skeleton | None, teacher: Skeleton | None) -> list[tuple[str, Config]]:
    """Every combination of ZeRO file and placement, named by the settings that choose it."""
    files = sorted(path.stem for path in DS_CONFIGS.glob("*.json")) if student else [config.deepspeed.config]
    placements = PLACED if teacher else (config.teacher.placement,)
    if config.teacher.load_in_8bit:
        placements = ("replica",)
    found = []
    for placement in placements:
        for file in files:
            names = [f"--deepspeed.config {file}"] if student else []
            names += [f"--teacher.placement {placement}"] if teacher else []
            variant = dataclasses.replace(
                config,
                deepspeed=dataclasses.replace(config.deepspeed, config=file),
                teacher=dataclasses.replace(config.teacher, placement=placement),
            )
            found.append((" ".join(names), variant))
    return found


def free_memory(device: torch.device, ranks_on_node: int) -> int:
    """Free bytes for one rank: those of its GPU, or its part of the node's free memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = next(
        line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")
    )
    return int(available.split()[1]) * 1024 // ranks_on_node
