"""What the workers share. They run as scripts, so that this folder is on their path."""

from __future__ import annotations

import torch
from deepspeed.utils import safe_get_full_grad

from ibdistill import train
from ibdistill.training.job import Job


def gradients_of_step(job: Job) -> dict[str, torch.Tensor]:
    """Take one step; parameter -> its full gradient over all ranks. Collective."""
    gradients: dict[str, torch.Tensor] = {}
    step = job.engine.step

    def keep_gradients_and_step() -> None:
        if job.engine.is_gradient_accumulation_boundary():
            for name, parameter in job.engine.module.named_parameters():
                gradients[name] = safe_get_full_grad(parameter).clone()
        step()

    job.engine.step = keep_gradients_and_step
    train.train_step(job)
    job.engine.step = step
    return gradients
