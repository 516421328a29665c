"""Which implementation of an operation runs: Triton on a GPU, else torch with bounded memory."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor

from ibdistill.ops.checks import check_choice

IMPLEMENTATIONS = ("auto", "triton", "torch")

logger = logging.getLogger(__name__)


def on_gpu(x: Tensor) -> bool:
    """Whether the forms for a GPU run on x; a dry run puts the answer for its device in this place."""
    return x.device.type == "cuda"


def choose(op: str, impl: str, example: Tensor, missing: str | None = None) -> str:
    """The name of the implementation that runs: "triton" or "torch".

    Args:
        op: the operation's name in the log.
        impl: what the caller asks for, one of IMPLEMENTATIONS.
        example: a tensor of the call, for its device and dtype.
        missing: what this call needs and the Triton implementation does not have; None: it has everything.

    Raises:
        ValueError: impl = triton where Triton can't run, or an unknown impl.
    """
    check_choice("impl", impl, IMPLEMENTATIONS)
    if impl == "torch":
        return impl
    reason = _why_not_triton(example) or missing
    if impl == "triton" and reason is not None:
        raise ValueError(f"impl = 'triton' can't run: {reason}; use impl = 'torch' (or 'auto')")
    if impl == "auto" and reason is None and example.device.type != "cuda":
        reason = "the tensors are on a CPU, and its interpreter is for tests only"
    if impl == "auto":
        _log_choice(op, reason)
    return "triton" if reason is None else "torch"


def _why_not_triton(example: Tensor) -> str | None:
    """Why Triton cannot run on this tensor's device in its dtype; None if it can. ROCm is cuda to torch."""
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


@cache
def log_plain_form(op: str, kind: str, name: str) -> None:
    """Log once per process that an estimator, for instance, has no fused form."""
    logger.info("%s: the %s %r has no fused form; torch.func differentiates its plain form", op, kind, name)
