"""Runs the checks one after the other, each in a process of its own, and writes the report.

A process per check keeps an illegal memory access or a lack of memory from spoiling what comes after it, and
lets a check that hangs be ended.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from accept import report
from accept.checks import CHECKS, Check, named
from accept.lines import FAILED, FILE, NOT_RUN, Context, read_lines, write_line

EXIT_FAILED, EXIT_INCOMPLETE = 1, 4
ENTRY = Path(__file__).parents[1] / "accept.py"
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "MASTER_PORT")
"""What DeepSpeed's launcher leaves in the environment; a check's own processes must not see it."""


def from_command_line(arguments: Sequence[str]) -> int:
    """Run what the command line says; the exit code. Raises ValueError for what the user can mend."""
    parser = argparse.ArgumentParser(prog="accept.py", description="Accept ibdistill on the GPUs here.")
    parser.add_argument("out", type=Path, help="a new or empty folder for the report")
    parser.add_argument("--minutes", type=float, default=10.0, help="checks that do not fit are left out")
    parser.add_argument("--dry-run-on-cpu", action="store_true", help="small forms of the checks, on the CPU")
    parser.add_argument("--check", help="run this check alone, in this process")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # older launchers pass it
    given = parser.parse_args(arguments)
    if not given.minutes > 0:
        raise ValueError(f"--minutes is {given.minutes}; it must be above 0")
    if not given.dry_run_on_cpu and not torch.cuda.is_available():
        raise ValueError(
            "torch sees no CUDA device here, and nothing is accepted without one. Install a CUDA build of "
            "torch on a machine with a GPU, or see the small forms with --dry-run-on-cpu"
        )
    out = given.out.resolve()
    if given.check:
        out.mkdir(parents=True, exist_ok=True)
        return run_here(named(given.check), Context(out, given.check, given.dry_run_on_cpu))
    if (out / FILE).exists():
        raise ValueError(f"{out} holds {FILE} of an earlier acceptance; name another folder")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    return conduct(out, given.minutes, given.dry_run_on_cpu)


def run_here(check: Check, context: Context) -> int:
    """Run one check in this process. What it raises becomes a failed case."""
    try:
        check.function()(context)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        context.verdict("the check itself", False, f"it ended with {reason[:500]}")
    failed = [x for x in read_lines(context.out) if x["check"] == check.name and x["status"] == FAILED]
    sys.stdout.flush()
    return EXIT_FAILED if failed else 0


def conduct(out: Path, minutes: float, on_cpu: bool, checks: Sequence[Check] = CHECKS) -> int:
    """Run the checks as far as the minutes go; write the report; the exit code."""
    start, ranks = time.monotonic(), Context(out, "", on_cpu).gpus
    for check in checks:
        left = 60 * minutes - (time.monotonic() - start)
        reason = ""
        if on_cpu and not check.on_cpu:
            reason = "it has no form for a CPU"
        elif check.ranks > ranks:
            reason = f"it needs {check.ranks} GPUs, and {ranks} can be seen"
        elif left < 60 * check.minutes:
            reason = f"the {minutes:g} minutes are spent; --minutes gives it more"
        if reason:
            values = {"too few GPUs": check.ranks > ranks}
            write_line(out, check=check.name, case="all", status=NOT_RUN, message=reason, values=values)
        else:
            run_apart(check, out, on_cpu)
        report.write(out, on_cpu)  # after every check, so that there is one whatever comes
    shutil.rmtree(out / "work", ignore_errors=True)
    text, code = report.summary(read_lines(out), on_cpu)
    print(f"\n{text}\nthe report is {out / report.FILE}", flush=True)
    return code


def run_apart(check: Check, out: Path, on_cpu: bool) -> None:
    """Run a check in a process of its own; where it dies without a word, say so for it."""
    log, limit = out / "logs" / f"{_slug(check.name)}.log", 180 * check.minutes + 120
    command = [sys.executable, str(ENTRY), str(out), "--check", check.name]
    command += ["--dry-run-on-cpu"] * on_cpu
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHERS}
    environment["TRITON_CACHE_DIR"] = str(out / "work" / "triton")  # compilations are counted there
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS repeats its results with it
    print(f"\n{check.name} ...", flush=True)
    start = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        _end(process)
    seconds = round(time.monotonic() - start, 1)
    mine = [line for line in read_lines(out) if line["check"] == check.name]
    for line in mine:
        print(f"  {line['status']:8} {line['case']}: {line['message']}", flush=True)
    told = any(line["status"] == FAILED for line in mine)
    message = ""
    if code is None:
        message = f"it had not ended after {limit:.0f} s; the end of {log.name}: {_tail(log)}"
    elif code not in (0, EXIT_FAILED) or (code and not told):
        ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        message = f"its process died {ended}; the end of {log.name}: {_tail(log)}"
    elif not mine:
        message = "it ended without a word"
    if message:
        write_line(out, check=check.name, case="the check itself", status=FAILED, message=message, values={})
    values = {"seconds": seconds}
    write_line(out, check=check.name, case="time", status="info", message=f"{seconds} s", values=values)


def _end(process: subprocess.Popen) -> None:
    """End what is left of a check: its process group, and ranks that it started in groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-5:])[-600:]


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
