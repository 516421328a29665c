"""Checks f and h: our steps against a plain transformers loop, the products' floor and the planner.

Both learn from the same ragged micro-batches and start from the same weights. The plain loop is what a
careful script does: transformers' model with torch's attention, bf16 under autocast with weights in fp32, the
losses from full logits, fused AdamW. Its KD takes the teacher's full logits. The floor is the time that the
step's products with weights would take, without padding, at the measured rate of a large square product.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from accept import inputs, jobs
from accept.lines import Context
from ibdistill.config.sections import Config
from ibdistill.data.batches import Batch
from ibdistill.models.operations import operations_per_token
from ibdistill.runtime import hardware
from ibdistill.training.job import Job

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools/, where the planner is
from plan.accelerators import ACCELERATORS
from plan.planner import Planner

WARM, STEPS = 3, 10
LEAST_SPEED = 1.0
"""Of the plain loop's."""
LEAST_MEMORY, MOST_MEMORY = 0.9, 1.1
"""The planner's memory as a share of what was measured: near a GPU's limit it decides which runs start."""
CARDS = {"A100": "a100-80g", "H100": "h100-80g", "H200": "h200-141g", "L40S": "l40s-48g", "L4": "l4-24g"}
"""Part of a device's name -> the planner's name for it; the first that fits counts."""


class Measured(NamedTuple):
    """A variant's figures."""

    seconds: float
    """Of a step, the median."""
    bytes: int
    """The most memory that tensors had."""


def t5(context: Context) -> None:
    """T5-base, 64 questions, method dss: no teacher."""
    compare(context, "t5", "", "dss", 8 if context.small else 64, micro=8 if context.small else 64)


def qwen2(context: Context) -> None:
    """Qwen2.5-0.5B beside a teacher of the shape of Qwen2.5-7B, 32 questions, method kd."""
    compare(context, "qwen2", "qwen2-large", "kd", 8 if context.small else 32, micro=8)


def compare(context: Context, student: str, teacher: str, method: str, batch: int, micro: int) -> None:
    """Measure both loops, the floor and the planner's prediction, and compare them."""
    more = {"optim__batch_size": batch, "optim__micro_batch_size": micro, "student__dropout": 0.0}
    more["objective__method"] = method
    if teacher:
        more = inputs.with_teacher(context, teacher, "replica", method, **more)
    config = inputs.settings(context, f"speed-{student}", student, **more)
    with jobs.job_of(config) as job:
        batches = [[b.to(context.device) for _, b in step_batches(job, step)] for step in range(WARM + STEPS)]
        ours = measured(context, lambda: jobs.step_seconds(context, job, WARM + STEPS))
        question, target = operations_per_token(job.engine.module.model)
    tokens = [
        (int(b.attention_mask.sum()), sum(len(labels) for labels in b.labels.values()))
        for step in batches[WARM:]
        for b in step
    ]
    inputs_, targets = np.sum(tokens, 0) / STEPS
    total = float(inputs_ + (targets if student == "t5" else 0))
    operations = question * (total - targets) + target * targets
    dtype = torch.float32 if context.small else torch.bfloat16
    floor = operations / hardware.measured_peak(context.device, dtype)
    message = f"{1e3 * ours.seconds:.1f} ms per step, {total / ours.seconds:.0f} tokens/s, "
    message += (
        f"{ours.bytes / 2**30:.2f} GiB; products alone {1e3 * floor:.1f} ms ({floor / ours.seconds:.0%})"
    )
    context.info("ours", message, **ours._asdict(), floor=floor)
    plain = plain_loop(context, config, student, teacher, batches)
    if plain is None:
        context.info("plain", "out of memory")
    else:
        message = f"{1e3 * plain.seconds:.1f} ms per step, {plain.bytes / 2**30:.2f} GiB"
        context.info("plain", message, **plain._asdict())
        ratio, memory = plain.seconds / ours.seconds, ours.bytes / plain.bytes
        message = (
            f"{ratio:.2f} times the plain loop's speed (at least {LEAST_SPEED:g}), {memory:.2f} of its memory"
        )
        # on a CPU a tiny model's step is all overhead
        context.verdict("ours against plain", ratio >= LEAST_SPEED or context.small, message)
    planned(context, config, ours)


def step_batches(job: Job, step: int) -> list[tuple[np.ndarray, Batch]]:
    """The job's micro-batches of a step."""
    before, job.state.step = job.state.step, step
    try:
        return job.micro_batches()
    finally:
        job.state.step = before


def measured(context: Context, steps: Callable[[], list[float]]) -> Measured:
    """The figures of steps, the first ones left out of the time."""
    hardware.peak_memory(context.device)  # a GPU's counter begins anew
    seconds = steps()
    return Measured(float(np.median(seconds[WARM:])), hardware.peak_memory(context.device))


def plain_loop(
    context: Context, config: Config, student: str, teacher: str, batches: list[list[Batch]]
) -> Measured | None:
    """The same steps in a plain loop; None if it lacks memory."""
    kind = AutoModelForSeq2SeqLM if student == "t5" else AutoModelForCausalLM
    make = {"attn_implementation": "sdpa"}
    model = (
        kind.from_pretrained(config.student.model, dtype=torch.float32, trust_remote_code=False, **make)
        .to(context.device)
        .train()
    )
    large = None
    if teacher:
        dtype = torch.float32 if context.small else torch.bfloat16
        large = (
            kind.from_pretrained(config.teacher.model, dtype=dtype, trust_remote_code=False, **make)
            .to(context.device)
            .eval()
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, weight_decay=0.0, fused=True)
    left = iter(batches)

    def step() -> None:
        micro_batches = next(left)
        tokens = sum(len(labels) for b in micro_batches for labels in b.labels.values())
        for batch in micro_batches:
            with torch.autocast(context.device.type, torch.bfloat16, enabled=not context.small):
                loss = plain_loss(model, large, batch) / tokens
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    def steps() -> list[float]:
        return [jobs.seconds_of(context, step) for _ in batches]

    try:
        return measured(context, steps)
    except torch.cuda.OutOfMemoryError:
        return None


def plain_loss(model: nn.Module, teacher: nn.Module | None, batch: Batch) -> torch.Tensor:
    """Cross entropy, and with a teacher its forward KL, from full logits; a sum over target tokens."""
    total = torch.zeros((), device=batch.input_ids.device)
    logits = full_logits(model, batch)
    with torch.no_grad():
        targets = full_logits(teacher, batch) if teacher is not None else {}
    for stream, rows in logits.items():
        labels = batch.labels[stream]
        total = total + nn.functional.cross_entropy(rows.float(), labels, reduction="sum")
        if targets:
            width = min(rows.shape[-1], targets[stream].shape[-1])
            q, p = (x[:, :width].float().log_softmax(-1) for x in (rows, targets[stream]))
            total = total + nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    return total


def full_logits(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Stream -> [N, V] logits at its targets, of transformers' forward pass with all positions' logits."""
    logits = {}
    of_stream = len(batch.input_ids) // len(batch.labels)
    for index, stream in enumerate(batch.labels):
        rows = slice(index * of_stream, (index + 1) * of_stream)
        arguments = {"input_ids": batch.input_ids[rows], "attention_mask": batch.attention_mask[rows]}
        if batch.decoder_input_ids:
            arguments["decoder_input_ids"] = batch.decoder_input_ids[stream]
        full = model(**arguments, use_cache=False).logits.flatten(0, 1)
        logits[stream] = full[batch.positions[stream]]
    return logits


def planned(context: Context, config: Config, ours: Measured) -> None:
    """The planner's memory and seconds of this run beside what was measured; check h."""
    name = torch.cuda.get_device_name() if context.device.type == "cuda" else "H100"
    gpu = next((planner_name for part, planner_name in CARDS.items() if part in name), None)
    # the bytes are the same on every card, the seconds are not
    planner = Planner(config, ACCELERATORS[gpu or "h100-80g"], 1, 1, question=66, label=2, rationale=66)
    placement = config.teacher.placement
    choice = planner.choice(placement, "zero0", False, config.optim.micro_batch_size)
    memory, seconds = choice.bytes / ours.bytes, choice.step / ours.seconds
    message = f"{memory:.2f} of the measured memory ({LEAST_MEMORY} to {MOST_MEMORY}), "
    message += f"{seconds:.2f} of the measured seconds" if gpu else f"which knows no {name}"
    if context.small:
        context.info("planner", "its figures are a GPU's", planned=choice.bytes)
    else:
        context.verdict("planner", LEAST_MEMORY <= memory <= MOST_MEMORY, message)
