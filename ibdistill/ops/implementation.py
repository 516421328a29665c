"""Which implementation of an operation runs: Triton on a GPU, else torch with bounded memory."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sysconfig
import tempfile
from functools import cache
from pathlib import Path

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
    return compilation_trouble() if example.device.type == "cuda" else None


@cache
def compilation_trouble() -> str | None:
    """Why Triton cannot compile what launches its kernels on a GPU; None if it can. Probed once, in 0.1 s.

    Triton calls the C compiler that CC names, else gcc, else clang, on a file that includes Python.h. Without
    either its first kernel would end the run.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler (Debian, Ubuntu: apt-get install gcc python3-dev; or set CC)"
    # as Triton does, which works around the folder that Debian adds
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    include = sysconfig.get_paths(scheme=scheme)["include"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("#include <Python.h>\nint probe(void) { return PY_VERSION_HEX; }\n")
        command = [compiler, str(source), "-shared", "-fPIC", f"-I{include}", "-o", f"{folder}/probe.so"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"the C compiler {compiler} cannot be run ({error}); set CC to another"
    if done.returncode == 0:
        return None
    if not Path(include, "Python.h").is_file():
        return f"{include} has no Python.h (Debian, Ubuntu: apt-get install python3-dev)"
    return f"the C compiler {compiler} fails ({done.stderr.strip()[-200:]}); set CC to another"


@cache
def _log_choice(op: str, reason: str | None) -> None:
    if reason is None:
        logger.info("%s: the Triton implementation", op)
    else:
        logger.info("%s: the torch implementation (%s)", op, reason)


@cache
def log_plain_form(kind: str, name: str) -> None:
    """Log once per process that an estimator, for instance, has no fused form."""
    message = "head loss: the %s %r has no fused form; torch.func differentiates its plain form"
    logger.info(message, kind, name)
