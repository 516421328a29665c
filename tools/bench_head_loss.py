"""Time and memory of the head loss: Triton, lean torch, eager torch, torch.compile.

    python tools/bench_head_loss.py                               # B = 8, 16 + 64 tokens, D = 512, V = 32128
    python tools/bench_head_loss.py --dtype bfloat16 --explain 512 --V 151936
    python tools/bench_head_loss.py --entry logits

The tests of the head loss run first; on a red one nothing is measured. The implementations take turns in
every round, so that what else runs on the machine hits all of them; the least time of each is reported.
Peak memory is what the call allocates beyond inputs and outputs (the outputs, dh and dW, are the same for
all). On a GPU times are CUDA events and the share of the measured copy bandwidth is that of the bytes the
algorithm must move; on a CPU memory is the process's, each call in a process of its own.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from ibdistill.ops.head_loss import MISettings, Stream, Weights, head_loss, logits_loss
from ibdistill.ops.head_loss_reference import head_loss_reference

TESTS = Path(__file__).parents[1] / "tests/ops"


def make(B: int, predict: int, explain: int, D: int, V: int, dtype: torch.dtype, device: str):
    """Streams and head, all with gradients."""
    generator = torch.Generator().manual_seed(0)
    streams = []
    for length in (predict, explain):
        hidden = torch.randn(B * length, D, generator=generator).to(device, dtype).requires_grad_()
        labels = torch.randint(V, (B * length,), generator=generator).to(device)
        streams.append(Stream(hidden, labels, torch.arange(0, B * length + 1, length, dtype=torch.int32)))
    weight = (0.05 * torch.randn(V, D, generator=generator)).to(device, dtype).requires_grad_()
    return *streams, weight


def eager(
    predict: Stream, explain: Stream, weight, *, weights: Weights, mi: MISettings | None, B: int, given: bool
):
    """What a trainer writes: one product, cross entropies, pool, cross entropy. Equal lengths, no loops."""
    losses, pooled = [], []
    for stream in (predict, explain):
        logits = stream.hidden if given else stream.hidden @ weight.T
        losses.append(torch.nn.functional.cross_entropy(logits, stream.labels, reduction="sum"))
        if mi is not None:
            p = torch.softmax(logits, -1).view(B, -1, logits.shape[-1])
            pooled.append(p.max(1).values if mi.pool == "max" else p.mean(1))
    total = weights.ce_predict * losses[0] + weights.ce_explain * losses[1]
    if mi is None:
        return total
    target, estimate = pooled[0].detach(), pooled[1]
    if mi.estimator == "paper":
        return total + weights.mi * torch.nn.functional.cross_entropy(estimate, target, reduction="sum")
    target, estimate = target / target.sum(-1, keepdim=True), estimate / estimate.sum(-1, keepdim=True)
    return total - weights.mi * (target * estimate.log()).sum()


def implementations(case, mi, entry: str, B: int) -> dict:
    """Name -> a function that computes the total."""
    predict, explain, weight = case
    weights = Weights(1 / len(predict.labels), 1 / len(explain.labels), 0.1 / B)
    given = entry == "logits"
    if given:
        predict, explain = (
            s._replace(hidden=(s.hidden @ weight.T).detach().requires_grad_()) for s in (predict, explain)
        )

    def ours(impl):
        if given:
            return lambda: logits_loss(predict, explain, weights=weights, mi=mi, impl=impl)[0]
        return lambda: head_loss(predict, explain, weight, weights=weights, mi=mi, impl=impl)[0]

    def plain(function):
        return lambda: function(predict, explain, weight, weights=weights, mi=mi, B=B, given=given)

    torch._dynamo.reset()
    out = {"eager": plain(eager), "compile": plain(torch.compile(eager)), "torch": ours("torch")}
    if not given:
        out["twin"] = lambda: head_loss_reference(predict, explain, weight, weights=weights, mi=mi)[0]
    if weight.device.type == "cuda":
        out["triton"] = ours("triton")
    leafs = [predict.hidden, explain.hidden] + ([] if given else [weight])
    return {name: (function, leafs) for name, function in out.items()}


def once(function, leafs, backward: bool) -> float:
    """Seconds of one call."""
    cuda = leafs[0].device.type == "cuda"
    if cuda:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        events[0].record()
    start = time.perf_counter()
    if backward:
        torch.autograd.grad(function(), leafs)
    else:
        with torch.no_grad():
            function()
    if not cuda:
        return time.perf_counter() - start
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def peak_bytes(arguments, mi, entry: str, name: str, backward: bool, queue) -> None:
    """Peak memory of a second call beyond what stood before it and the gradients that it returns."""
    case = make(*arguments)
    function, leafs = implementations(case, mi, entry, arguments[0])[name]
    once(function, leafs, False)
    outputs = sum(leaf.numel() * leaf.element_size() for leaf in leafs) if backward else 0
    if leafs[0].device.type == "cuda":
        once(function, leafs, backward)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(function, leafs, backward)
        queue.put(torch.cuda.max_memory_allocated() - before - outputs)
        return
    once(function, leafs, backward)
    # 5 sets the process's high-water mark back to what is resident now (Linux)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_peak()
    once(function, leafs, backward)
    queue.put(resident_peak() - before - outputs)


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
    dtype: str = "float32",
    estimator: str = "paper",
    pool: str = "max",
    entry: str = "head",
    rounds: int = 7,
    threads: int = 0,
    check: bool = True,
    out: str = "",
) -> None:
    """Measure and print; `estimator` none: cross entropies only. `out`: also write this CSV file."""
    if check:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            str(TESTS),
            "--ignore",
            str(TESTS / "test_kernel_report.py"),
        ]
        if subprocess.run(command).returncode != 0:
            sys.exit("the head loss's tests fail: nothing is measured")
    if threads:
        torch.set_num_threads(threads)
    # for the processes that measure memory: glibc must hand freed tensors back, or the next call's are free
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mi = None if estimator == "none" else MISettings(estimator, pool)
    arguments = (B, predict, explain, D, V, getattr(torch, dtype), device)
    functions = implementations(make(*arguments), mi, entry, B)
    rows = []
    for backward in (False, True):
        times = {name: [] for name in functions}
        for function, leafs in functions.values():
            once(function, leafs, backward)
        for _ in range(rounds):
            for name, (function, leafs) in functions.items():
                times[name].append(once(function, leafs, backward))
        for name in functions:
            queue = multiprocessing.get_context("spawn").SimpleQueue()
            process = multiprocessing.get_context("spawn").Process(
                target=peak_bytes, args=(arguments, mi, entry, name, backward, queue)
            )
            process.start()
            memory = queue.get()
            process.join()
            rows.append((name, "forward + backward" if backward else "forward", min(times[name]), memory))
    report(rows, arguments, device, mi, entry)
    if out:
        with open(out, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["implementation", "pass", "seconds", "peak_bytes"])
            writer.writerows(rows)


def report(rows, arguments, device: str, mi: MISettings | None, entry: str) -> None:
    """Print the table, times and memory also as a share of eager's."""
    B, predict, explain, D, V, dtype, _ = arguments
    n = B * (predict + explain)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{name}: {entry} entry, {mi}, B = {B}, {predict} + {explain} tokens, D = {D}, V = {V}, {dtype}")
    print(f"{'':10} {'pass':20} {'ms':>9} {'of eager':>9} {'peak MiB':>9} {'of eager':>9}")
    base = {row[1]: row for row in rows if row[0] == "eager"}
    for label, which, seconds, memory in rows:
        _, _, eager_seconds, eager_memory = base[which]
        print(
            f"{label:10} {which:20} {seconds * 1e3:9.2f} {seconds / eager_seconds:9.2f} {memory / 2**20:9.1f}"
            f" {memory / eager_memory:9.3f}"
        )
    if entry == "head":
        for label, which, seconds, _ in rows:
            products = 6 if which == "forward + backward" else 2
            rate = products * n * D * V / seconds / 1e9
            print(f"  {label}, {which}: {rate:.0f} GFLOP/s in the products it can't avoid")
    elif device == "cuda":
        floor = n * V * dtype.itemsize * 4 / copy_bandwidth(device)
        print(f"  floor at the measured copy bandwidth, forward + backward: {floor * 1e3:.2f} ms")


if __name__ == "__main__":
    import fire

    fire.Fire(main)
