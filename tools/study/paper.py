"""The paper's tables 1 and 2: standard finetuning, Distilling Step-by-Step and the published MI loss.

    python tools/study.py paper --dataset svamp --student google/t5-v1_1-small --data DSS_FOLDER --out OUT

Settings are the paper's (alpha 0.5, beta 0.1, learning rate 5e-5, batch 64, 10,000 steps), from the data
set's recipe. `--student` is a hub name or a folder. `--data` is a folder in the layout of the DSS data
release; without it the data comes from the hub. Further `--section.field value` go to every run. `--dry-run`
goes the same way with random weights, a few records and two steps; its accuracies mean nothing.

The published figures are from Chen et al., Findings of ACL 2024, arXiv 2403.03348, tables 1 (T5-base) and 2
(T5-small). Only some of them are known here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from study import arms, report

ARMS = {"finetune": "finetune", "dss": "dss", "ib": "ib"}
PUBLISHED = {
    ("base", "svamp"): {"finetune": 62.63, "dss": 65.50, "ib": 68.00},
    ("base", "cqa"): {"ib": 63.88},
    ("base", "anli1"): {"ib": 51.20},
    ("base", "esnli"): {"ib": 89.50},
    ("small", "svamp"): {"finetune": 45.00, "dss": 48.00, "ib": 52.50},
}
"""(Size of T5, data set) -> method -> accuracy in percent."""
DRY = {
    "student.init": "random",
    "optim.max_steps": 2,
    "optim.batch_size": 4,
    "run.test_limit": 4,
    "data.max_label_tokens": 32,  # as long as svamp's equations: a label that is cut can never be right
    "data.max_rationale_tokens": 16,
    "run.export": False,
    "run.report_to": [],
}


def content(options: argparse.Namespace, own: dict[str, Any]) -> dict[str, Any]:
    """The study of one data set and student, as its YAML file would have it (see `study/command.py`)."""
    settings = {"student.model": options.student, "run.export": False}
    settings |= {"data.path": str(Path(options.data).resolve())} if options.data else {}
    return {
        "recipe": options.dataset,
        "settings": settings | (DRY if options.dry_run else {}) | own,
        "seeds": options.seeds,
        "labels": [8 if options.dry_run else 1.0],
        "baseline": "dss",
        "arms": {arm: {"objective.method": method} for arm, method in ARMS.items()},
    }


def comparison(found: arms.Study, out: Path, options: argparse.Namespace) -> str:
    """Our accuracies beside the published figures, as a table."""
    size = next((size for size in ("small", "base") if size in options.student), "")
    published = {} if options.dry_run else PUBLISHED.get((size, options.dataset), {})
    lines = [
        f"{options.dataset}, {options.student}{', DRY RUN' * options.dry_run}",
        "method    ours %  published %",
    ]
    for arm in ARMS:
        results = {run.seed: arms.result(run, out) for run in found.runs if run.arm == arm}
        scores = report.accuracies({seed: result for seed, result in results.items() if result})
        ours = f"{sum(scores.values()) / len(scores):.2f}" if scores else "-"
        lines.append(f"{arm:8}  {ours:>6}  {format(published[arm], '.2f') if arm in published else '-':>11}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line, apart from further settings."""
    result = argparse.ArgumentParser(
        prog="study.py paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--dataset", required=True, choices=sorted({name for _, name in PUBLISHED}))
    result.add_argument("--student", required=True, help="hub name or folder")
    result.add_argument("--data", help="folder of the DSS data release")
    result.add_argument("--out", type=Path, required=True, help="folder for runs, logs and results")
    result.add_argument(
        "--seeds",
        nargs="+",
        type=arms.read_seeds,
        action=arms.Seeds,
        default=[0, 1, 2],
        help="the runs' seeds: `0 1` or `0,1`; default: 0 1 2",
    )
    result.add_argument("--jobs", type=int, help="runs side by side; default: GPUs, or else cores")
    result.add_argument("--dry-run", action="store_true")
    return result


def main(arguments: list[str], perform: Callable[..., int]) -> None:
    options, rest = parser().parse_known_args(arguments)
    out = options.out.resolve()
    try:
        own = arms.further_settings(rest)
        found = arms.build(content(options, own), Path(f"paper-{options.dataset}"))
        code = perform("run", found, out, options.jobs)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"\n{comparison(found, out, options)}")
    sys.exit(code)
