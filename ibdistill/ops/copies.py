"""Copies to a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device.

    From pinned memory the copy is made in the order of the device's work, while the host goes on; from other
    memory, as `torch.tensor(..., device=...)` makes it, the host waits. The allocator of pinned memory keeps
    the source until the copy is made.
    """
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
