"""Which implementation of an op runs: Triton on a GPU, else lean torch."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor

from ibdistill.ops.head_loss.arguments import check_choice

IMPLEMENTATIONS = ("auto", "triton", "torch")

logger = logging.getLogger(__name__)


def choose(op: str, impl: str, example: Tensor, lacks: str | None = None) -> str:
    """triton or torch. `lacks`: what of this call the Triton implementation can't do; None: it can do all.

    Raises ValueError for impl = triton where it can't run, and for an unknown impl.
    """
    check_choice("impl", impl, IMPLEMENTATIONS)
    if impl == "torch":
        return impl
    reason = _why_not_triton(example) or lacks
    if impl == "triton" and reason is not None:
        raise ValueError(f"impl = 'triton' can't run: {reason}; use impl = 'torch' (or 'auto')")
    if impl == "auto" and reason is None and example.device.type != "cuda":
        reason = "the tensors are on a CPU, and its interpreter is for tests only"
    if impl == "auto":
        _log_choice(op, reason)
    return "triton" if reason is None else "torch"


def _why_not_triton(example: Tensor) -> str | None:
    """None if Triton can run on this tensor's device in its dtype, else why not. ROCm is cuda to torch."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if example.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are not on a GPU, and TRITON_INTERPRET=1 is not set"
    if example.dtype == torch.float64:
        return "it has no float64"
    return None


@cache
def _log_choice(op: str, reason: str | None) -> None:
    if reason is None:
        logger.info("%s: the Triton implementation", op)
    else:
        logger.info("%s: the torch implementation (%s)", op, reason)
