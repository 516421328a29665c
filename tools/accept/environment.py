"""Check a: what the machine has, and that a Triton kernel runs at all."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from importlib import metadata
from pathlib import Path

import torch

from accept.lines import Context

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "datasets", "peft", "flash-attn", "bitsandbytes")
BACKENDS = {0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN", 4: "overridden"}
"""What torch's choice of an attention kernel means, by its number (torch/nn/attention)."""
SHAPES = {
    "T5-base, encoder, biased": (8, 12, 12, 128, 128, 64, "bias", False),
    "T5-base, decoder, causal": (8, 12, 12, 96, 96, 64, "none", True),
    "T5-base, cross, masked": (8, 12, 12, 96, 128, 64, "mask", False),
    "Qwen2.5-0.5B, causal, grouped": (8, 14, 2, 256, 256, 64, "none", True),
    "Qwen2.5-7B, causal, grouped": (4, 28, 4, 256, 256, 128, "none", True),
    "Qwen2.5-0.5B, decoding": (8, 14, 2, 1, 256, 64, "mask", False),
}
"""Name -> batch, query heads, key heads, queries, keys, head size, what is added, causal."""


def check(context: Context) -> None:
    """Versions, compiler, headers, devices; the attention kernel of six shapes; one Triton launch."""
    context.info("system", f"{platform.platform()}, Python {platform.python_version()}")
    context.info("packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    _devices(context)
    compiler = next((path for path in map(shutil.which, ("gcc", "clang", "cc")) if path), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler and header.is_file():
        context.info("compiler", f"{compiler}, {header}")
    else:
        absent = "a C compiler" if not compiler else f"{header} (the package python3-dev)"
        context.info("compiler", f"{absent} is missing: Triton cannot run, and the lean torch path is taken")
    for name, shape in SHAPES.items():
        context.info(f"attention, {name}", attention_backend(context, shape))
    _triton(context)


def _devices(context: Context) -> None:
    if context.device.type != "cuda":
        context.not_run("devices", "this is a CPU")
        return
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        context.info(
            f"GPU {index}",
            f"{p.name}, {p.total_memory / 2**30:.1f} GiB, capability {p.major}.{p.minor}, "
            f"{p.multi_processor_count} processors",
        )
    versions = {"CUDA": torch.version.cuda, "HIP": torch.version.hip, "cuDNN": torch.backends.cudnn.version()}
    if torch.distributed.is_nccl_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    versions["driver"] = _driver()
    context.info("libraries", ", ".join(f"{name} {text}" for name, text in versions.items() if text))


def _driver() -> str:
    """The driver's version as nvidia-smi tells it, or an empty text."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        run = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (run.stdout.splitlines() or [""])[0]


def attention_backend(context: Context, shape: tuple) -> str:
    """The kernel that torch's attention takes for a shape of `SHAPES` in bf16 training."""
    batch, heads, key_heads, queries, keys, size, added, causal = shape
    make = {"device": context.device, "dtype": torch.bfloat16}
    query = torch.randn(batch, heads, queries, size, **make, requires_grad=True)
    key, value = (torch.randn(batch, key_heads, keys, size, **make, requires_grad=True) for _ in range(2))
    mask = None
    if added == "bias":
        mask = torch.randn(batch, heads, queries, keys, **make, requires_grad=True)
    elif added == "mask":
        mask = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=context.device)
    grouped = {"enable_gqa": heads != key_heads}
    chosen = torch._fused_sdp_choice(query, key, value, mask, 0.0, causal, **grouped)
    return BACKENDS.get(int(chosen), f"number {chosen}")


def _triton(context: Context) -> None:
    from ibdistill.ops.vid.api import vid_loss
    from ibdistill.ops.vid.reference import vid_loss_reference

    if context.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        context.not_run("a Triton kernel", "on a CPU it needs TRITON_INTERPRET=1")
        return
    generator = torch.Generator().manual_seed(0)
    sizes = ((5, 8), (5, 16), (16, 8), (16,), (16,))  # student, teacher, W, b, g
    tensors = [torch.randn(size, generator=generator).to(context.device) for size in sizes]
    got = vid_loss(*tensors, impl="triton")
    expected = vid_loss_reference(*(t.double() for t in tensors))
    error = abs(got.item() / expected.item() - 1)
    context.verdict("a Triton kernel", error < 1e-3, f"relative error {error:.1e} of vid, at most 1e-3")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(none)"
