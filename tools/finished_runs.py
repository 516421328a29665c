"""Finished runs as `compare_runs.py` takes them: which folders are runs, what they scored, which are
repetitions."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml


def read_result(folder: Path) -> dict[str, Any]:
    """The content of a run's result.json. Raises ValueError if there is none, or a damaged one."""
    path = folder / "result.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no result.json: no run, or not finished")
    try:
        result = json.loads(path.read_bytes())
        result["method"], result["test"], result["steps"], result["tokens"], result["seconds"]
        for scores in result["test"].values():
            scores.items()
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of train.py ({type(error).__name__}: {error})") from None
    return result


def number(scores: dict[str, Any], name: str) -> float | None:
    """A score, or None where a run has none or one that is no finite number."""
    value = scores.get(name)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def groups(folders: list[Path]) -> dict[str, list[Path]]:
    """The runs that are repetitions of each other, by the name of their group.

    The runs of a study go by arm and labels, other runs by their settings, the seeds aside: their name is the
    method and what else differs between the groups. Where no two runs share one, they go by their folders'
    names, which are shorter. Runs of the same settings and the same seed, such as a folder's copy, are no
    repetitions and stand alone.
    """
    grouped: dict[str, list[Path]] = defaultdict(list)
    seeds: dict[str, list[str]] = defaultdict(list)
    of_study = {folder: match for folder in folders if (match := _STUDY_RUN.fullmatch(folder.name))}
    for match in of_study.values():
        seeds[match[1]].append(match[2])
    # an arm that has a seed twice was run in two configurations, which are no repetitions
    of_study = {f: m for f, m in of_study.items() if len(set(seeds[m[1]])) == len(seeds[m[1]])}
    for folder, match in of_study.items():
        grouped[match[1]].append(folder)
    others = [folder for folder in folders if folder not in of_study]
    if not others:
        return dict(grouped)
    by_settings = _by_settings(others)
    if len(by_settings) == len({folder.name for folder in others}) == len(others):
        by_settings = {folder.name: [folder] for folder in others}
    return dict(grouped) | by_settings


_STUDY_RUN = re.compile(r"(.+)-s(\d+)-[0-9a-f]{8}")
"""A study names its runs ARM[-nLABELS]-sSEED-DIGEST."""


def _by_settings(folders: list[Path]) -> dict[str, list[Path]]:
    """The runs by what differs between their settings, the seed aside."""
    settings, seeds = {}, {}
    for folder in folders:
        path = folder / "config.yaml"
        try:
            content = yaml.safe_load(path.read_bytes()) if path.is_file() else {}
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from None
        flat = {
            f"{section}.{key}": value
            for section, values in (content if isinstance(content, dict) else {}).items()
            if isinstance(values, dict)
            for key, value in values.items()
        }
        seeds[folder] = flat.get("run.seed")
        flat = {n: v for n, v in flat.items() if not n.startswith("run.") and n != "data.subsample_seed"}
        settings[folder] = {"objective.method": read_result(folder)["method"]} | flat
    names = sorted({name for own in settings.values() for name in own})
    varied = [n for n in names if len({json.dumps(own.get(n)) for own in settings.values()}) > 1]
    grouped: dict[str, list[Path]] = defaultdict(list)
    for folder, own in settings.items():
        others = [f"{n.split('.')[1]} {own.get(n)}" for n in varied if n != "objective.method"]
        grouped[" ".join([own["objective.method"], *others])].append(folder)
    for name, repeated in list(grouped.items()):
        own = [seeds[folder] for folder in repeated if seeds[folder] is not None]
        if len(set(own)) < len(own):
            grouped |= {str(folder): [folder] for folder in grouped.pop(name)}
    return dict(grouped)


def runs_among(paths: list[Path]) -> list[Path]:
    """The folders of finished runs; what else was given is named on standard error.

    Raises ValueError if there is none, or if a result is damaged.
    """
    found: dict[Path, Path] = {}
    reasons = []
    for path in paths:
        if not (path / "result.json").is_file():
            reasons.append(f"{path} has no result.json: no run, or not finished")
        elif (same := found.setdefault(path.resolve(), path)) is not path:
            reasons.append(f"{path} is the run {same} again")  # not a seed more
    if not found:
        raise ValueError("; ".join(reasons))
    for reason in reasons:
        print(f"skipped: {reason}", file=sys.stderr)
    return list(found.values())
