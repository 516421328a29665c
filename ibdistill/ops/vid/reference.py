"""The loss of variational information distillation in plain torch: the truth for tests."""

from __future__ import annotations

import torch
from torch import Tensor


def vid_loss_reference(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor, log_variance: Tensor
) -> Tensor:
    """The value of `vid_loss`, with its arguments: 0-d, in the common dtype of the arguments."""
    residual = teacher.detach() - (student @ weight.T + bias)
    return 0.5 * (residual**2 * torch.exp(-log_variance) + log_variance).mean(-1).sum()
