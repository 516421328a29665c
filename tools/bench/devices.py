"""The device of a benchmark, chosen once for all its variants: how it is named, timed and asked for memory.

No benchmark has been run on a GPU yet: what is done there has only been tested with a faked `torch.cuda`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import torch


def choose() -> torch.device:
    """The first GPU, or else the CPU. `distributed.init` gives a single process the same one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def name(device: torch.device) -> str:
    """What a benchmark prints about its device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def wait(device: torch.device) -> None:
    """Let the device end what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    action: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of an action with all that it starts on the device, and without what was started before.

    `clock`: what is read; `time.process_time` gives the CPU time of all threads of this process.
    """
    wait(device)
    start = clock()
    action()
    wait(device)
    return clock() - start


def held_bytes(device: torch.device) -> int:
    """Bytes in use: of torch's tensors on a GPU, else the resident set of this process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def restart_peak(device: torch.device) -> None:
    """Let `peak_bytes` begin with what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most bytes that `held_bytes` would have given since `restart_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    """Bytes of an entry in this process's status file: VmRSS, or VmHWM, which is its high-water mark."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
