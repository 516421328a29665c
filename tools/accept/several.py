"""Checks over several GPUs: each starts ranks by DeepSpeed's launcher and reads what they write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from accept import inputs
from accept.lines import Context
from accept.models import LEAST_COSINE
from ibdistill.runtime.distributed import free_port

WORKER = Path(__file__).parents[1] / "accept_ranks.py"
TRAIN = Path(__file__).parents[2] / "ibdistill" / "train.py"
STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
PLACEMENTS = ("replica", "zero3", "cpu_offload")
ALL_END = 60.0
"""Seconds within which all ranks end after one was killed."""
LENGTH_OFF = 1e-2
"""How far the length of the gradients over ranks may be off one rank's, relatively. It tells a sum from a
mean, which the cosine does not."""
CONFIDENCE_OFF = 1e-2
"""How far mean confidences may lie apart where only the order of additions differs."""


def launch(
    context: Context, ranks: int, arguments: Sequence[str], name: str, timeout: float = 600
) -> int | None:
    """Run a script on so many ranks; its exit code, or None where it did not end."""
    process, _ = begin(context, ranks, arguments, name)
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_all(process)


def begin(context: Context, ranks: int, arguments: Sequence[str], name: str) -> tuple[subprocess.Popen, Path]:
    """Start a script on so many ranks; its launcher and its log."""
    log = context.out / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    command += ["--master_port", str(free_port()), *arguments]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return process, log


def end_all(launcher: subprocess.Popen) -> None:
    """End a launcher and what it started, if it is still there."""
    try:
        children = psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    for process in (launcher, *children):
        try:
            process.kill()
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    launcher.wait()


def work(context: Context, ranks: int, what: str, name: str) -> Path | None:
    """Let `accept_ranks.py` do something on so many ranks; the folder of its results, or None."""
    target = context.folder(name)
    small = ["--small"] if context.small else []
    code = launch(context, ranks, [str(WORKER), str(context.out), what, str(target), *small], name)
    if code != 0:
        context.verdict(name, False, f"exit code {code}, must be 0; see logs/{name}.log")
        return None
    return target


def gradients(context: Context) -> None:
    """The gradients of one step under every stage and placement equal those of one rank, whole."""
    inputs.model_folder(context, "t5"), inputs.model_folder(context, "t5-teacher")
    inputs.records_folder(context)
    one = work(context, 1, "truth", "gradients_1")
    many = work(context, context.gpus, "stages", f"gradients_{context.gpus}") if one else None
    if not many:
        return
    truth = torch.load(one / "zero0-replica.pt")
    for path in sorted(many.glob("*.pt")):
        got = torch.load(path)
        cosine = torch.nn.functional.cosine_similarity(got.double(), truth.double(), dim=0).item()
        length = (got.norm() / truth.norm()).item()
        bound = 1 - 1e-9 if context.small else LEAST_COSINE
        holds = cosine > bound and abs(length - 1) < LENGTH_OFF
        context.verdict(
            path.stem, holds, f"cosine {cosine:.6f} (> {bound:g}), length {length:.4f} of one rank's"
        )


def resumed(context: Context) -> None:
    """A run under each stage is stopped, continued, and compared with one that was not."""
    for stage in STAGES[:4]:
        scores = {}
        for name, starts in (("whole", (8,)), ("resumed", (4, 8))):
            folder = context.folder("runs") / f"{stage}-{name}"
            more = {"optim.schedule": "constant", "run.allow_config_change": True}
            for steps in starts:  # the second start goes on from the first one's checkpoint
                given = train_arguments(context, folder, stage, more | {"optim.max_steps": steps})
                scores[name] = final_scores(context, context.gpus, given, folder, f"{stage}_{name}_{steps}")
                if scores[name] is None:
                    return
        same_scores(context, stage, scores)


def killed(context: Context) -> None:
    """One rank is killed in the middle of a run: all others end soon."""
    folder = context.folder("runs") / "killed"
    arguments = train_arguments(context, folder, "zero2", {"optim.max_steps": 100_000})
    process, log = begin(context, context.gpus, [str(TRAIN), *arguments], "killed")
    try:
        deadline = time.monotonic() + 300
        while "step 3/" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        ranks = [p for p in children if "train.py" in str(p.cmdline())]
        ranks = [p for p in ranks if not p.children()]
        if process.poll() is not None or not ranks:
            context.verdict("begins", False, "the run did not come to its third step; see logs/killed.log")
            return
        start = time.monotonic()
        ranks[-1].send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(ranks, timeout=2 * ALL_END)
        seconds = time.monotonic() - start
        message = (
            f"{len(ranks)} ranks, {len(alive)} left after {seconds:.1f} s, all must end in {ALL_END:.0f} s"
        )
        context.verdict("all ranks end", not alive and seconds < ALL_END, message)
    finally:
        end_all(process)


def evaluation(context: Context) -> None:
    """All ranks together score a split that they cannot share evenly as one rank does."""
    scores = {}
    for ranks in (1, context.gpus):
        folder = context.folder("runs") / f"evaluation-{ranks}"
        # no step is large enough to change a token, so both runs evaluate the same weights
        more = {"optim.max_steps": 1, "optim.lr": 1e-12, "run.test_limit": 45}
        arguments = train_arguments(context, folder, "zero0", more)
        name = f"{ranks} ranks"
        scores[name] = final_scores(context, ranks, arguments, folder, f"evaluation_{ranks}")
        if scores[name] is None:
            return
    same_scores(context, "45 questions", scores)


def final_scores(
    context: Context, ranks: int, arguments: list[str], folder: Path, name: str
) -> dict[str, float] | None:
    """The test scores of a run of train.py; None, and a failed case, if it does not end well."""
    code = launch(context, ranks, [str(TRAIN), *arguments], name)
    if code != 0:
        context.verdict(name, False, f"exit code {code}, must be 0; see logs/{name}.log")
        return None
    return json.loads((folder / "result.json").read_text())["test"]["jsonl"]


def same_scores(context: Context, case: str, scores: dict[str, dict[str, float]]) -> None:
    """The accuracies are equal, and the confidences differ by no more than another order of additions
    explains."""
    (first, a), (second, b) = scores.items()
    apart = abs(a["confidence"] - b["confidence"])
    bound = 1e-5 if context.small else CONFIDENCE_OFF
    message = f"{first} against {second}: accuracy {a['accuracy']:.4f} and {b['accuracy']:.4f}, confidence "
    message += f"{a['confidence']:.6f} and {b['confidence']:.6f} (apart by {bound:g} at most)"
    context.verdict(case, a["accuracy"] == b["accuracy"] and apart <= bound, message)


def bandwidth(context: Context) -> None:
    """The bus bandwidth of an all-reduce of a quarter of a GiB, in the planner's own words."""
    folder = work(context, context.gpus, "bandwidth", "bandwidth")
    if folder:
        rate = json.loads((folder / "bandwidth.json").read_text())["gbs"]
        context.info(
            "all-reduce", f"{rate:.1f} GB/s on {context.gpus} ranks: plan with --rates.link_gbs {rate:.1f}"
        )


def scaling(context: Context) -> None:
    """Tokens/s on 1, 2, 4, 8 GPUs, with 64 questions for all together and with 16 each."""
    sizes = [n for n in (1, 2, 4, 8) if n <= context.gpus]
    rates = {}
    for ranks in sizes:
        folder = work(context, ranks, "speed", f"speed_{ranks}")
        if not folder:
            return
        rates[ranks] = json.loads((folder / "speed.json").read_text())
    for kind in ("64 together", "16 each"):
        base = rates[1][kind]
        shares = ", ".join(f"{n}: {rates[n][kind] / (n * base):.2f}" for n in sizes)
        context.info(kind, f"tokens/s per GPU, as a share of one GPU's {base:.0f}: {shares}")


def train_arguments(context: Context, folder: Path, stage: str, more: dict[str, Any]) -> list[str]:
    """The command line of a run of T5-base, with further settings or other values."""
    values = {
        "run.dir": folder,
        "run.log_every": 1,
        "run.test_limit": 8,
        "run.report_to": [],
        "run.export": False,
        "data.task": "jsonl",
        "data.path": inputs.records_folder(context),
        "student.model": inputs.model_folder(context, "t5"),
        "student.precision": "fp32" if context.small else "bf16",
        "objective.method": "dss",
        "optim.batch_size": 8 * context.gpus if not context.small else 4,
        "optim.lr": 1e-4,
        "deepspeed.config": stage,
    }
    return [part for name, value in (values | more).items() for part in (f"--{name}", str(value))]
