"""Time and memory of the head loss and of VID: Triton, lean torch, eager torch, torch.compile.

    python tools/bench/head_loss.py                               # B = 8, 16 + 64 tokens, D = 512, V = 32128
    python tools/bench/head_loss.py --dtype bfloat16 --explain 512 --V 151936
    python tools/bench/head_loss.py --entry logits
    python tools/bench/head_loss.py --entry vid --D_t 1024        # the states of all B (16 + 64) tokens
    python tools/bench/head_loss.py --tune                        # GPU: block sizes (ibdistill/ops/launch.py)

The tests of the ops run first; on a red one nothing is measured. The implementations take turns in every
round, so that what else runs on the machine hits all of them; the least time of each is reported, and beside
them that of the bare matrix products, which nobody can go below (`products`; not in the logits entry).
Peak memory is what the call allocates beyond its inputs, without and with the gradients that it returns: dh
and dW are the same for all, and for a large head most of it. On a GPU times are CUDA events and the share of
the measured copy bandwidth is that of the bytes the algorithm must move; on a CPU memory is the process's,
each call in a process of its own.
"""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from loss_implementations import Sizes, implementations, products

from ibdistill.ops.checks import check_choice
from ibdistill.ops.head_loss.api import MISettings

TESTS = Path(__file__).parents[2] / "tests/ops"
NOT_RUN = ("test_zero.py", "test_interpreted.py")
"""Tests that say nothing of the values here, or would call this tool."""


def once(function, leafs, backward: bool) -> float:
    """Seconds of one call."""

    def call():
        if not backward:
            with torch.no_grad():
                function()
        elif leafs is None:
            function()
        else:
            torch.autograd.grad(function(), leafs)

    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    call()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def peak_bytes(sizes: Sizes, name: str, backward: bool) -> tuple[int, int]:
    """Peak memory of a second call beyond what stood before it, and the size of the gradients it returns."""
    function, leafs = implementations(sizes)[name]
    outputs = sum(leaf.numel() * leaf.element_size() for leaf in leafs) if backward else 0
    for _ in range(2):
        once(function, leafs, backward)
    if sizes.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(function, leafs, backward)
        return torch.cuda.max_memory_allocated() - before, outputs
    # 5 sets the process's high-water mark back to what is resident now (Linux)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    once(function, leafs, backward)
    return resident_peak() - before, outputs


def resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and write counted."""
    a = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    times = [once(lambda: b.copy_(a), [a], False) for _ in range(10)]
    return 2 * a.numel() / min(times)


def main(
    B: int = 8,
    predict: int = 16,
    explain: int = 64,
    D: int = 512,
    V: int = 32128,
    D_t: int = 1024,
    dtype: str = "float32",
    estimator: str = "paper",
    pool: str = "max",
    entry: str = "head",
    rounds: int = 7,
    threads: int = 0,
    check: bool = True,
    tune: bool = False,
    out: str = "",
) -> None:
    """Measure and print; `estimator` none: cross entropies only. `out`: also write this CSV file."""
    check_choice("entry", entry, ("head", "logits", "vid"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mi = None if estimator == "none" else MISettings(estimator, pool)
    sizes = Sizes(B, predict, explain, D, V, D_t, getattr(torch, dtype), device, entry, mi)
    if check:
        refuse_on_red()
    if tune:
        tune_blocks(sizes, rounds)
        return
    if threads:
        torch.set_num_threads(threads)
    # for the processes that measure memory: glibc must hand freed tensors back, or the next call's are free
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    rows = []
    for backward in (False, True):
        times = measure(sizes, rounds, backward)
        for name, seconds in times.items():
            memory = (0, 0) if name == "products" else in_a_process(sizes, name, backward)
            rows.append((name, "forward + backward" if backward else "forward", seconds, *memory))
    report(rows, sizes)
    if out:
        with open(out, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["implementation", "pass", "seconds", "peak_bytes", "returned_bytes"])
            writer.writerows(rows)


def refuse_on_red() -> None:
    """Exit if a test of the ops fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(TESTS)]
    for name in NOT_RUN:
        command += ["--ignore", str(TESTS / name)]
    if subprocess.run(command).returncode != 0:
        sys.exit("the tests of the ops fail: nothing is measured")


def measure(sizes: Sizes, rounds: int, backward: bool) -> dict[str, float]:
    """Least seconds of each implementation."""
    functions = implementations(sizes)
    if sizes.entry != "logits":
        run = products(sizes)
        functions["products"] = (lambda: run(backward)), None
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function, leafs in functions.values():
        once(function, leafs, backward)
    for _ in range(rounds):
        for name, (function, leafs) in functions.items():
            times[name].append(once(function, leafs, backward))
    return {name: min(values) for name, values in times.items()}


def in_a_process(sizes: Sizes, name: str, backward: bool) -> tuple[int, int]:
    """`peak_bytes` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        1, context
    ) as pool:  # raises if the process dies, where a queue would wait forever
        return pool.submit(peak_bytes, sizes, name, backward).result()


def tune_blocks(sizes: Sizes, rounds: int) -> None:
    """Time every pair of the two numbers of `ibdistill.ops.launch`, forward and backward."""
    if sizes.device != "cuda":
        sys.exit("--tune needs a GPU: block sizes mean nothing in the interpreter")
    from ibdistill.ops import launch

    function, leafs = implementations(sizes)["triton"]
    for warps, loads in itertools.product(launch.WARPS_CHOICES, launch.LOADS_CHOICES):
        with mock.patch.object(launch, "WARPS", warps), mock.patch.object(launch, "LOADS", loads):
            times = [once(function, leafs, True) for _ in range(rounds + 2)][2:]
        print(f"IBDISTILL_WARPS={warps} IBDISTILL_LOADS={loads}: {min(times) * 1e3:.3f} ms")


def report(rows, sizes: Sizes) -> None:
    """Print the table, times and memory also as a share of eager's."""
    device = sizes.device
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{name}: {sizes}")
    print(
        f"{'':10} {'pass':20} {'ms':>9} {'of eager':>9} {'peak MiB':>9} {'of eager':>9}"
        f" {'+ returned':>10} {'of eager':>9}"
    )
    base = {row[1]: row for row in rows if row[0] == "eager"}
    for label, which, seconds, peak, returned in rows:
        _, _, eager_seconds, eager_peak, eager_returned = base[which]
        line = f"{label:10} {which:20} {seconds * 1e3:9.2f} {seconds / eager_seconds:9.2f}"
        if label != "products":
            own, eager_own = peak - returned, max(eager_peak - eager_returned, 1)
            line += (
                f" {own / 2**20:9.1f} {own / eager_own:9.3f} {peak / 2**20:10.1f} {peak / eager_peak:9.3f}"
            )
        print(line)
    if sizes.entry != "logits":
        width = sizes.D_t if sizes.entry == "vid" else sizes.V
        for label, which, seconds, *_ in rows:
            count = 6 if which == "forward + backward" else 2
            rate = count * sizes.tokens * sizes.D * width / seconds / 1e9
            print(f"  {label}, {which}: {rate:.0f} GFLOP/s in the products it can't avoid")
    elif device == "cuda":
        floor = sizes.tokens * sizes.V * sizes.dtype.itemsize * 4 / copy_bandwidth(device)
        print(f"  floor at the measured copy bandwidth, forward + backward: {floor * 1e3:.2f} ms")


if __name__ == "__main__":
    import fire

    fire.Fire(main)
