"""Check i: a run that SIGUSR1 stops and the same command continues ends where an undisturbed one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from accept import inputs
from accept.lines import Context
from ibdistill.runtime.distributed import EXIT_REQUEUE

TRAIN = Path(__file__).parents[2] / "ibdistill" / "train.py"
STEPS = 12
APART = 1e-4
"""How far the weights may be apart, relatively: a GPU may add in another order. A run that lost a step or its
random state is off by far more."""


def stopped(context: Context) -> None:
    """Two runs of one command on one GPU, of which the second is stopped in the middle."""
    finals = {}
    for name, signalled in (("whole", False), ("stopped", True)):
        folder = context.folder("runs") / f"resume-{name}"
        command = [sys.executable, str(TRAIN), *arguments(context, folder)]
        log = context.out / "logs" / f"resume_{name}.log"
        log.parent.mkdir(exist_ok=True)
        code = run(command, log, signal_at=STEPS // 2 if signalled else None)
        if signalled and not context.verdict(
            "stopped by SIGUSR1", code == EXIT_REQUEUE, f"exit code {code}, must be {EXIT_REQUEUE}"
        ):
            return
        code = run(command, log) if signalled else code
        if not context.verdict(f"{name} run", code == 0, f"exit code {code}, must be 0"):
            return
        finals[name] = load_file(folder / "student" / "model.safetensors")
    pairs = [(finals["whole"][k].float(), finals["stopped"][k].float()) for k in finals["whole"]]
    equal = all(torch.equal(a, b) for a, b in pairs)
    apart = (
        sum((a - b).square().sum() for a, b in pairs).sqrt() / sum(a.square().sum() for a, _ in pairs).sqrt()
    )
    message = "bit for bit" if equal else f"apart by {apart:.1e} of the weights, at most {APART:.0e}"
    context.verdict("the same weights", equal or apart < APART, message)


def arguments(context: Context, folder: Path) -> list[str]:
    """The command line of the run."""
    values = {
        "run.dir": folder,
        "run.log_every": 1,
        "run.test_limit": 8,
        "run.report_to": [],
        "data.task": "jsonl",
        "data.path": inputs.records_folder(context),
        "student.model": inputs.model_folder(context, "t5"),
        "student.precision": "fp32" if context.small else "bf16",
        "objective.method": "ib",
        "optim.batch_size": 8,
        "optim.lr": 1e-4,
        "optim.max_steps": STEPS,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def run(command: list[str], log: Path, signal_at: int | None = None, timeout: float = 300) -> int:
    """Run to the end, the exit code; with `signal_at` send SIGUSR1 once the log tells of that step."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    begin = log.stat().st_size if log.exists() else 0
    with log.open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        deadline = time.monotonic() + timeout
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
            if signal_at is not None and f"step {signal_at}/" in log.read_text()[begin:]:
                process.send_signal(signal.SIGUSR1)
                signal_at = None
        if process.poll() is None:
            process.kill()
        return process.wait()
