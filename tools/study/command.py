"""Runs, tabulates and draws a study: arms x numbers of labels x seeds.

    python tools/study.py run    STUDY.yaml OUT      run what is not finished, then report
    python tools/study.py report STUDY.yaml OUT      table.md, study.png and study.json of the finished runs
    python tools/study.py grid   STUDY.yaml OUT      grids for slurm/sweep.sh; `report` once they are done
    python tools/study.py speed  STUDY.yaml OUT      what one run of each arm costs, for equal compute
    python tools/study.py paper  --help              the paper's tables 1 and 2

Further `--section.field value` go to all arms, `data.path` to the models too. `--seeds 0 1` (or `0,1`)
replaces the seeds of all arms. A study is a YAML file:

    recipe: demo                      # each run is `ibdistill/train.py` with this recipe and
    settings: {optim.max_steps: 900}  # these settings, in rising precedence with an arm's own
    models:                           # trained first; {pretrain} in a setting is the exported student
      pretrain: {recipe: demo_pretrain}  # and {run} an arm's own run folder
      teacher: {recipe: demo_teacher, student.model: "{pretrain}"}
    variants: 2                       # of each model, with seeds 0 and 1; seed s of an arm uses s mod 2,
                                      # and {pretrain+1} is the other one
    seeds: [1, 2, 3]
    labels: [300]                     # data.subsample, drawn anew for each seed
    baseline: dss
    arms:
      dss: {objective.method: dss}
      vid: {seeds: [1, 2], objective.method: ib, ...}
      kd: {labels: {300: [1, 2, 3], 150: [1]}, ranks: 2, note: "...", objective.method: kd, ...}
    comparisons: [[kd@150, dss@300]]  # further paired differences, arm@labels, announced before the run
    folders: {base: org/model}        # {base} stands for it anywhere above; --set base=FOLDER replaces it
    quick: {arms: [dss], seeds: [1], settings: {...}}  # what --quick runs; its settings reach the models

Each run is one process of one thread. As many run side by side as there are GPUs, or else cores (`--jobs`);
a run starts as soon as the models that it names are there.
Runs with `ranks` go through DeepSpeed's launcher, one at a time, at the end. A run's folder is named after a
digest of its settings and of those of the models that it starts from: a run whose configuration has changed
is another run; a run that is finished is not repeated, and its checkpoints are removed.
`timeout 30m python tools/study.py run ...` runs a piece of a study: the run under way saves, and the same
command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ibdistill.config import fields
from ibdistill.config.load import to_yaml
from ibdistill.runtime.version import commit
from study import arms, folders, unfinished
from study.arms import ROOT, Run, Study, resolved, result


def execute(study: Study, out: Path, jobs: int) -> list[str]:
    """Run what is not finished, and return the names of the runs that failed.

    Each starts as soon as there is room and the models that it needs are there, in the study's order; those
    whose model failed are left out. Runs over several ranks come last, one at a time.
    """
    failed: list[str] = []
    todo = unfinished.of(study, out)
    missing, running = {run.name for run in todo}, 0
    total, done = len(todo), 0
    start, changed = time.perf_counter(), threading.Condition()
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    children: set[subprocess.Popen] = set()

    def following(part: list[Run]) -> Run | None:
        """The next run that can start, out of `part`; None: there is none, and none that could make one."""
        nonlocal running
        with changed:
            while True:
                for run in part:
                    if not run.needs & missing:
                        part.remove(run)
                        running += 1
                        return run
                if not part or not running:
                    return None
                changed.wait()

    def one(run: Run) -> None:
        nonlocal done, running
        slot, code = slots.get(), None
        try:
            code = _start(run, out, slot, children)
        finally:
            slots.put(slot)
            with changed:
                running -= 1
                if code == 0:
                    missing.discard(run.name)
                changed.notify_all()
        with changed:
            done += 1
            if code:
                failed.append(run.name)
            word = f"failed with exit code {code}, see {out / 'logs' / run.name}.log" if code else "done"
            print(f"{time.perf_counter() - start:6.0f} s  {done}/{total}  {run.name}: {word}", flush=True)

    def work(part: list[Run]) -> None:
        while run := following(part):
            one(run)

    for ranks in sorted({run.ranks for run in todo}):
        part, workers = [run for run in todo if run.ranks == ranks], jobs if ranks == 1 else 1
        with ThreadPoolExecutor(workers) as pool:
            try:
                for worker in [pool.submit(work, part) for _ in range(workers)]:
                    worker.result()
            except BaseException:
                with changed:
                    part.clear()  # no worker starts another one
                    changed.notify_all()
                for child in list(children):
                    child.terminate()  # it saves, and goes on from there next time
                raise
    return failed


def first_error(log: Path) -> str:
    """The first line of a log that names an error, at most 300 characters of it; else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"(^|\W)error: |^\w*(\.\w+)*(Error|Exception)\b", line)]
    return (named or lines[-1:] or ["its log is empty"])[0][:300]


def _start(run: Run, out: Path, slot: int, children: set[subprocess.Popen]) -> int:
    """Run one run to its end, on the GPU of its slot if there are GPUs, and return its exit code."""
    import torch

    for folder in ("configs", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    recipe = out / "configs" / f"{run.name}.yaml"
    recipe.write_text(to_yaml(resolved(run, out)))
    command = [sys.executable]
    if run.ranks > 1:
        from ibdistill.runtime.distributed import free_port

        command += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(run.ranks)]
        command += ["--master_port", str(free_port())]
    command += [str(ROOT / "ibdistill/train.py"), str(recipe)]
    # each run has a process group of its own
    ours = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if torch.cuda.is_available() and run.ranks == 1:
        env["CUDA_VISIBLE_DEVICES"] = str(slot)
    start = time.perf_counter()
    with (out / "logs" / f"{run.name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=ROOT)
    children.add(process)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    children.discard(process)
    folder = out / "runs" / run.name
    _note(folder, time.perf_counter() - start, usage.ru_utime + usage.ru_stime)
    if process.returncode == 0:  # a finished run does not go on, and checkpoints are many times its weights
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return process.returncode


def _note(folder: Path, wall_seconds: float, cpu_seconds: float) -> None:
    """Note commit, machine and seconds in the run's folder; seconds of interrupted parts are added."""
    import torch

    if not folder.is_dir():
        return  # the run failed before it had a folder
    path = folder / "study.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    spent = {"process_seconds": wall_seconds}
    if not torch.cuda.is_available():
        spent["cpu_seconds"] = cpu_seconds
    notes = {name: round(before.get(name, 0) + value, 1) for name, value in spent.items()}
    path.write_text(json.dumps(notes | {"commit": commit(), "machine": machine()}))


def machine() -> str:
    """The name of the GPU, or else of the processor."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")  # not on macOS
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1] if found else platform.machine()


def write_grids(study: Study, out: Path) -> list[str]:
    """Write one grid per stage, whose runs start from earlier stages' models; returns the commands to run."""
    out.mkdir(parents=True, exist_ok=True)
    commands = []
    for stage in sorted({run.stage for run in study.models + study.runs}):
        part = [run for run in study.models + study.runs if run.stage == stage]
        lines = []
        for run in part:
            flat = fields.to_flat(resolved(run, out))
            own = {name: flat[name] for name in run.settings}
            if spaced := [f"{k} {v!r}" for k, v in own.items() if " " in _argument(v)]:
                raise ValueError(f"{study.path}: a grid takes no spaces: {', '.join(spaced)} of {run.arm}")
            lines.append(" ".join([run.name, *(f"--{k}={_argument(v)}" for k, v in own.items())]))
        path = out / f"grid-{stage}.txt"
        path.write_text("\n".join(lines) + "\n")
        commands.append(f"SWEEP_DIR={out / 'runs'} bash slurm/sweep.sh {path} {part[0].recipe}")
    return commands


def _argument(value: Any) -> str:
    """A setting's value as the command line reads it."""
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else str(value)


def slots() -> int:
    """The number of GPUs, or else of the cores that this process may use."""
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["paper"]:
        from study import paper

        return paper.main(arguments[1:], perform)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "report", "grid", "speed"))
    parser.add_argument("study", type=Path, help="YAML file")
    parser.add_argument("out", type=Path, help="folder for runs, logs and results")
    parser.add_argument(
        "--jobs", type=folders.read_jobs, help="runs side by side; default: GPUs, or else cores"
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=arms.read_seeds,
        action=arms.Seeds,
        help="seeds in place of the file's, for all arms: `0 1` or `0,1`, after STUDY.yaml and OUT",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=folders.read_folder,
        metavar="NAME=FOLDER",
        help="a folder of the study's key `folders`; may be given several times",
    )
    parser.add_argument(
        "--recorded",
        type=Path,
        metavar="FILE",
        help="a study.json: runs that have a result in it are not run",
    )
    parser.add_argument("--quick", action="store_true", help="the study's key `quick` only")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from DeepSpeed's launcher
    options, rest = parser.parse_known_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without the runs
    try:
        further = arms.further_settings(rest)
        study = arms.load(
            options.study, further, options.seeds, dict(options.set), options.quick, options.recorded
        )
        sys.exit(perform(options.action, study, options.out.resolve(), options.jobs))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def perform(action: str, study: Study, out: Path, jobs: int | None = None) -> int:
    """Do what a command says and return its exit code. Raises ValueError where nothing can be reported."""
    from study import report

    if action == "grid":
        print("\n".join(write_grids(study, out)))
        return 0
    if action == "speed":
        from study import speed

        if table := speed.measure(study, out):
            print(table)
        return 0
    failed = execute(study, out, jobs or slots()) if action == "run" else []
    for name in failed:
        log = out / "logs" / f"{name}.log"
        print(f"failed: {name}: {first_error(log)} ({log})", file=sys.stderr)
    print(report.write(study, out, {run.name: result(run, out) for run in study.models + study.runs}))
    return int(bool(failed))
