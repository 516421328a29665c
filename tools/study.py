"""A study: arms x label counts x seeds, run, tabulated and drawn.

    python tools/study.py run    STUDY.yaml OUT      run what is not finished, then report
    python tools/study.py report STUDY.yaml OUT      table.md, study.png and study.json of what is
    python tools/study.py grid   STUDY.yaml OUT      grids for slurm/sweep.sh; `report` once they are done
    python tools/study.py speed  STUDY.yaml OUT      what a run of each arm costs, for equal compute
    python tools/study.py paper  --help              the paper's tables 1 and 2

A study is a YAML file:

    recipe: demo                      # each run is `ibdistill/train.py` with this recipe and
    settings: {optim.max_steps: 900}  # these settings, in rising precedence with an arm's own
    models:                           # trained first; {pretrain} in a setting is the exported student
      pretrain: {recipe: demo_pretrain}
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
    comparisons: [[kd@150, dss@300]]  # further paired differences, arm@labels

One process a run and one thread a process; as many side by side as there are GPUs or else cores
(`--jobs`). Runs with `ranks` go through DeepSpeed's launcher, one at a time, at the end. A
run's folder is named after a digest of its settings and of those of the models it starts from: a
run whose configuration has changed is another run, and one that is there is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from ibdistill import config as configuration  # noqa: E402
from ibdistill import settings as settings_  # noqa: E402
from ibdistill.config import Config  # noqa: E402

_KEYS = {"recipe", "settings", "models", "variants", "seeds", "labels", "baseline", "arms", "comparisons"}
_OWN = {"seeds", "labels", "ranks", "note"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a study."""

    name: str
    """Folder below OUT/runs; ends with the digest."""
    arm: str
    """Or the model's name."""
    labels: float
    seed: int
    recipe: str
    settings: dict[str, Any]
    """Those that differ from the recipe; folders are relative to OUT."""
    ranks: int = 1
    stage: int = 0
    """Runs of a stage start from models of earlier ones."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A checked study and its runs, in the order in which they are run."""

    path: Path
    baseline: str
    comparisons: list[tuple[str, str]]
    notes: dict[str, str]
    variants: int
    runs: list[Run]
    models: list[Run] = field(default_factory=list)


def load(path: Path) -> Study:
    """Read a study. Raises ValueError that names the file, the key or setting, and what is allowed."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no study: {error}") from error
    return build(content, path)


def build(content: Any, path: Path) -> Study:
    """A study from the content of its file."""
    if not isinstance(content, dict) or not isinstance(content.get("arms"), dict) or not content["arms"]:
        raise ValueError(f"{path} must map `arms` to at least one arm; see the top of tools/study.py")
    if unknown := sorted(content.keys() - _KEYS):
        raise ValueError(f"{path}: unknown key {', '.join(unknown)}; there are {', '.join(sorted(_KEYS))}")
    arms, baseline = content["arms"], content.get("baseline", next(iter(content["arms"])))
    if baseline not in arms:
        raise ValueError(f"{path}: baseline is {baseline!r}; it must be one of the arms {', '.join(arms)}")
    variants = content.get("variants", 1)
    if not isinstance(variants, int) or variants < 1:
        raise ValueError(f"{path}: variants is {variants!r}; it must be a whole number above 0")
    models: dict[tuple[str, int], Run] = {}
    for stage, (name, own) in enumerate((content.get("models") or {}).items()):
        for variant in range(variants):
            own_ = {k: v for k, v in own.items() if k != "recipe"}
            run = _run(path, name, own_, own.get("recipe"), None, variant, models, variant, variants, stage)
            models[name, variant] = run
    runs = []
    for name, own in arms.items():
        own = own or {}
        if odd := [key for key in own if "." not in key and key not in _OWN]:
            raise ValueError(
                f"{path}: arm {name} has {', '.join(odd)}; besides section.field there are "
                f"{', '.join(sorted(_OWN))}"
            )
        settings = (content.get("settings") or {}) | {k: v for k, v in own.items() if "." in k}
        labels = own.get("labels", content.get("labels"))
        if not isinstance(labels, dict):
            seeds = own.get("seeds", content.get("seeds"))
            labels = dict.fromkeys(_numbers(path, labels, "labels", name), seeds)
        for count in _numbers(path, list(labels), "labels", name):
            for seed in _numbers(path, labels[count], "seeds", name):
                stage, variant = len(content.get("models") or {}), seed % variants
                recipe, ranks = content.get("recipe"), own.get("ranks", 1)
                which = models, variant, variants
                runs.append(_run(path, name, settings, recipe, count, seed, *which, stage, ranks))
    keys = {f"{run.arm}@{run.labels:g}" for run in runs}
    comparisons = [tuple(pair) for pair in content.get("comparisons") or []]
    for pair in comparisons:
        if len(pair) != 2 or not set(pair) <= keys:
            raise ValueError(f"{path}: comparison {list(pair)} must be two of {', '.join(sorted(keys))}")
    # all arms of a seed before the next seed: what is there of an interrupted study can be compared
    order = list(dict.fromkeys(run.seed for run in runs))
    runs.sort(key=lambda run: (run.ranks, order.index(run.seed)))
    return Study(
        path=path,
        baseline=baseline,
        comparisons=comparisons,
        notes={name: (own or {}).get("note", "") for name, own in arms.items()},
        variants=variants,
        runs=runs,
        models=list(models.values()),
    )


def _numbers(path: Path, values: Any, key: str, arm: str) -> list:
    kind = int if key == "seeds" else (int, float)
    if not isinstance(values, list) or not values or not all(isinstance(v, kind) for v in values):
        raise ValueError(f"{path}: {key} of arm {arm} is {values!r}; it must be a list of numbers")
    return values


def _run(
    path: Path,
    arm: str,
    settings: dict[str, Any],
    recipe: str | None,
    labels: float | None,
    seed: int,
    models: dict[tuple[str, int], Run],
    variant: int,
    variants: int,
    stage: int,
    ranks: int = 1,
) -> Run:
    """A run with its models' folders filled in, its settings checked."""

    def filled(value: Any) -> Any:
        if not isinstance(value, str) or not (match := re.fullmatch(r"\{(\w+)(\+\d+)?\}", value)):
            return value
        which = match[1], (variant + int(match[2] or 0)) % variants
        if which not in models:
            raise ValueError(f"{path}: {value} in {arm} is none of the models above it")
        return f"runs/{models[which].name}/student"

    settings = {name: filled(value) for name, value in settings.items()} | {"run.seed": seed}
    if labels is not None:
        settings |= {"data.subsample": labels, "data.subsample_seed": seed}
    try:
        config = configuration.load(recipe, settings)
    except ValueError as error:
        raise ValueError(f"{path}: arm {arm}: {error}") from error
    resolved = {name: value for name, value in settings_.to_flat(config).items() if name != "run.dir"}
    digest = hashlib.sha256(json.dumps([resolved, ranks], sort_keys=True).encode()).hexdigest()[:8]
    label = "" if labels is None else f"-n{labels:g}"
    return Run(
        name=f"{arm}{label}-s{seed}-{digest}",
        arm=arm,
        labels=labels or 0,
        seed=seed,
        recipe=recipe or "",
        settings=settings,
        ranks=ranks,
        stage=stage,
    )


def resolved(run: Run, out: Path) -> Config:
    """The run's whole configuration, with real folders."""
    settings = {
        name: str(out / value) if isinstance(value, str) and value.startswith("runs/") else value
        for name, value in run.settings.items()
    }
    return configuration.load(run.recipe or None, settings | {"run.dir": str(out / "runs" / run.name)})


def result(run: Run, out: Path) -> dict[str, Any] | None:
    """The result of a finished run, with what `execute` noted; None if it is not finished."""
    folder = out / "runs" / run.name
    try:
        found = json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        return None
    notes = folder / "study.json"
    return found | (json.loads(notes.read_text()) if notes.is_file() else {})


def execute(study: Study, out: Path, jobs: int) -> list[str]:
    """Run what is not finished, stage by stage; the names of runs that failed."""
    failed: list[str] = []
    todo = [run for run in study.models + study.runs if result(run, out) is None]
    total, done = len(todo), 0
    start, lock = time.perf_counter(), threading.Lock()
    slots: SimpleQueue[int] = SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    children: set[subprocess.Popen] = set()

    def one(run: Run) -> None:
        nonlocal done
        slot = slots.get()
        try:
            code = _start(run, out, slot, children)
        finally:
            slots.put(slot)
        with lock:
            done += 1
            if code:
                failed.append(run.name)
            word = f"failed with exit code {code}, see {out / 'logs' / run.name}.log" if code else "done"
            print(f"{time.perf_counter() - start:6.0f} s  {done}/{total}  {run.name}: {word}", flush=True)

    for stage, ranks in sorted({(run.stage, run.ranks) for run in todo}):
        if failed and stage == 0:
            break
        part = [run for run in todo if (run.stage, run.ranks) == (stage, ranks)]
        with ThreadPoolExecutor(jobs if ranks == 1 else 1) as pool:
            try:
                list(pool.map(one, part))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in list(children):
                    child.terminate()  # it saves, and goes on from there next time
                raise
    return failed


def _start(run: Run, out: Path, slot: int, children: set[subprocess.Popen]) -> int:
    """Run it to its end; its exit code. Notes wall and CPU seconds of the process, and the commit."""
    import torch

    for folder in ("configs", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    recipe = out / "configs" / f"{run.name}.yaml"
    recipe.write_text(configuration.to_yaml(resolved(run, out)))
    command = [sys.executable]
    if run.ranks > 1:
        from ibdistill.distributed import free_port

        command += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(run.ranks)]
        command += ["--master_port", str(free_port())]
    command += [str(ROOT / "ibdistill/train.py"), str(recipe)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if torch.cuda.is_available() and run.ranks == 1:
        env["CUDA_VISIBLE_DEVICES"] = str(slot)
    start = time.perf_counter()
    with (out / "logs" / f"{run.name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=ROOT)
    children.add(process)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    children.discard(process)
    if process.returncode == 0:
        notes = {
            "process_seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "commit": commit(),
        }
        (out / "runs" / run.name / "study.json").write_text(json.dumps(notes))
    return process.returncode


def commit() -> str:
    """Of the working tree, with a + if it has changes; empty where there is no git."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run(
            [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + "+" * bool(changes.stdout.strip())


def write_grids(study: Study, out: Path) -> list[str]:
    """One grid a stage, which only starts from earlier ones; the commands that run them."""
    out.mkdir(parents=True, exist_ok=True)
    commands = []
    for stage in sorted({run.stage for run in study.models + study.runs}):
        part = [run for run in study.models + study.runs if run.stage == stage]
        lines = []
        for run in part:
            flat = settings_.to_flat(resolved(run, out))
            own = {name: flat[name] for name in run.settings}
            if spaced := [f"{k} {v!r}" for k, v in own.items() if " " in _argument(v)]:
                raise ValueError(f"{study.path}: a grid takes no spaces: {', '.join(spaced)} of {run.arm}")
            lines.append(" ".join([run.name, *(f"--{k}={_argument(v)}" for k, v in own.items())]))
        path = out / f"grid-{stage}.txt"
        path.write_text("\n".join(lines) + "\n")
        commands.append(f"SWEEP_DIR={out / 'runs'} bash slurm/sweep.sh {path} {part[0].recipe}")
    return commands


def _argument(value: Any) -> str:
    """A setting as fire reads it back."""
    return json.dumps(value, separators=(",", ":")) if isinstance(value, list) else str(value)


def slots() -> int:
    """GPUs at hand, or else cores."""
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["paper"]:
        import study_paper

        return study_paper.main(arguments[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("run", "report", "grid", "speed"))
    parser.add_argument("study", type=Path, help="YAML file")
    parser.add_argument("out", type=Path, help="folder for runs, logs and results")
    parser.add_argument("--jobs", type=int, help="runs side by side; default: GPUs, or else cores")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without the runs
    try:
        sys.exit(perform(options.action, load(options.study), options.out.resolve(), options.jobs))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def perform(action: str, study: Study, out: Path, jobs: int | None = None) -> int:
    """What a command does; its exit code. Raises ValueError where nothing can be reported."""
    import study_report

    if action == "grid":
        print("\n".join(write_grids(study, out)))
        return 0
    if action == "speed":
        import study_speed

        print(study_speed.measure(study, out))
        return 0
    failed = execute(study, out, jobs or slots()) if action == "run" else []
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    print(study_report.write(study, out, {run.name: result(run, out) for run in study.models + study.runs}))
    return int(bool(failed))


if __name__ == "__main__":
    sys.modules["study"] = sys.modules["__main__"]  # for study_paper, which builds on this
    main(sys.argv[1:])
