"""From a study's YAML file (see `study/command.py`) to checked runs, each with a name of its own."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ibdistill.config import command_line, fields
from ibdistill.config.load import load_settings, read_yaml
from ibdistill.config.sections import Config
from ibdistill.data.loading import checked_tasks
from study import folders

ROOT = Path(__file__).resolve().parents[2]

_KEYS = {"recipe", "settings", "models", "variants", "seeds", "labels", "baseline", "arms", "comparisons"}
_OWN = {"seeds", "labels", "ranks", "note"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a study."""

    name: str
    """The run's folder below OUT/runs; it ends with the digest."""
    arm: str
    """The arm's name, or the model's for a run that trains one of the study's models."""
    labels: float
    seed: int
    recipe: str
    settings: dict[str, Any]
    """The settings that differ from the recipe; folders are relative to OUT."""
    ranks: int = 1
    needs: frozenset[str] = frozenset()
    """The names of the models' runs that it starts from or learns from."""
    stage: int = 0
    """The grid that it stands in; what it needs stands in earlier ones."""
    recorded: dict[str, Any] | None = None
    """The result of this run on another machine."""


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
    folders: dict[str, str] = field(default_factory=dict)
    """Folder -> its name in the file."""


def load(
    path: Path,
    further: dict[str, Any] | None = None,
    seeds: list[int] | None = None,
    given: dict[str, str] | None = None,
    quick: bool = False,
    recorded: Path | None = None,
) -> Study:
    """Read a study; `further` settings go to all arms, `seeds` replace those of the file, `given` the folders
    of its key `folders`, and `quick` makes it the smaller study of its key `quick`. Runs with a result in
    `recorded`, a study.json, need not be run.

    Raises ValueError that names the file, the key or setting, and what is allowed.
    """
    try:
        written = path.read_text()
        content = _with_text(yaml.safe_load(written), read_yaml(written))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no study: {error}") from error
    named: dict[str, str] = {}
    if isinstance(content, dict):
        content, named = folders.with_folders(content, path, given or {})
        smaller = content.pop("quick", None)
        if quick:
            content = folders.quick(content, smaller, path)
    if further and isinstance(content, dict):
        content["settings"] = (content.get("settings") or {}) | further
    # a run has one name on all machines
    study = build(content, path, seeds, {folder: folders.identity(folder) for folder in named})
    study = replace(study, folders=named)
    if recorded is None:
        return study
    found = folders.recorded_results(recorded)
    if found.keys().isdisjoint(run.name for run in study.runs):
        raise ValueError(f"{recorded} has no run of {path} with these settings and --set folders")
    models = [replace(run, recorded=found.get(run.name)) for run in study.models]
    return replace(
        study, models=models, runs=[replace(run, recorded=found.get(run.name)) for run in study.runs]
    )


def _with_text(value: Any, text: Any) -> Any:
    """`value` with the settings, whose names have a point, as the file's text: recipes are read so too.

    `value` and `text` are the same YAML, with and without the types that PyYAML guesses.
    """
    if not isinstance(value, dict):
        return value
    return {
        key: own_text if isinstance(key, str) and "." in key else _with_text(own, own_text)
        for (key, own), own_text in zip(value.items(), text.values(), strict=True)
    }


def further_settings(rest: Sequence[str]) -> dict[str, Any]:
    """`--section.field value ...` as train.py reads it. Raises ValueError for anything else."""
    given = command_line.parse(rest, positions=len(rest))
    if given.positions or not all(re.fullmatch(r"\w+\.\w+", name) for name in given.settings):
        raise ValueError(f"{' '.join(rest)}: further settings are given as --section.field value")
    settings = dict(given.settings)
    if isinstance(path := settings.get("data.path"), str) and path != "none":
        settings["data.path"] = str(Path(path).resolve())  # runs start in the project's root
    return settings


def read_seeds(text: str) -> list[int]:
    """The numbers of `0,1`. Raises argparse's error, which names the option, for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+", part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text[:60]!r} is no seed; give whole numbers from 0 on, as in `--seeds 0 1` or `--seeds 0,1`, "
            "after the other arguments"
        )
    return [int(part) for part in parts]


class Seeds(argparse.Action):
    """Keeps the seeds of `--seeds 0 1`, `--seeds 0,1` and mixtures in one list, each once."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(itertools.chain.from_iterable(values))))


def build(
    content: Any, path: Path, seeds: list[int] | None = None, identities: dict[str, str] | None = None
) -> Study:
    """A study from the content of its file; `seeds` replace those of the file for all arms.

    `identities` maps folders to what stands for them in the digests of runs.
    """
    identities = identities or {}
    if not isinstance(content, dict) or not isinstance(content.get("arms"), dict) or not content["arms"]:
        raise ValueError(f"{path} must map `arms` to at least one arm; see `python tools/study.py --help`")
    if unknown := sorted(content.keys() - _KEYS):
        raise ValueError(f"{path}: unknown key {', '.join(unknown)}; there are {', '.join(sorted(_KEYS))}")
    arms, baseline = content["arms"], content.get("baseline", next(iter(content["arms"])))
    if baseline not in arms:
        raise ValueError(f"{path}: baseline is {baseline!r}; it must be one of the arms {', '.join(arms)}")
    variants = content.get("variants", 1)
    if not isinstance(variants, int) or variants < 1:
        raise ValueError(f"{path}: variants is {variants!r}; it must be a whole number above 0")
    data_path = {k: v for k, v in (content.get("settings") or {}).items() if k == "data.path"}
    models: dict[tuple[str, int], Run] = {}
    for stage, (name, own) in enumerate((content.get("models") or {}).items()):
        for variant in range(variants):
            own_ = data_path | {k: v for k, v in own.items() if k != "recipe"}
            which = variant, models, variant, variants, identities, stage
            run = _run(path, name, own_, own.get("recipe"), None, *which)
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
        if seeds or not isinstance(labels, dict):
            own_seeds = seeds or own.get("seeds", content.get("seeds"))
            counts = list(labels) if isinstance(labels, dict) else labels
            labels = dict.fromkeys(_numbers(path, counts, "labels", name), own_seeds)
        for count in _numbers(path, list(labels), "labels", name):
            for seed in _numbers(path, labels[count], "seeds", name):
                stage, variant = len(content.get("models") or {}), seed % variants
                recipe, ranks = content.get("recipe"), own.get("ranks", 1)
                which = models, variant, variants, identities
                runs.append(_run(path, name, settings, recipe, count, seed, *which, stage, ranks))
    keys = {f"{run.arm}@{run.labels:g}" for run in runs}
    comparisons = [tuple(pair) for pair in content.get("comparisons") or []]
    for pair in comparisons:
        if len(pair) != 2 or not set(pair) <= keys:
            raise ValueError(f"{path}: comparison {list(pair)} must be two of {', '.join(sorted(keys))}")
    # the usual numbers of labels before others, and all arms of a seed before the next seed: what is there of
    # an interrupted study can be compared
    order, usual = list(dict.fromkeys(run.seed for run in runs)), content.get("labels") or []
    runs.sort(key=lambda run: (run.ranks, bool(usual) and run.labels not in usual, order.index(run.seed)))
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
    identities: dict[str, str],
    stage: int,
    ranks: int = 1,
) -> Run:
    """A run with its models' folders filled in, its settings checked."""
    needs = set()

    def filled(value: Any) -> Any:
        if not isinstance(value, str) or not (match := re.fullmatch(r"\{(\w+)(\+\d+)?\}", value)):
            return value
        which = match[1], (variant + int(match[2] or 0)) % variants
        if which not in models:
            raise ValueError(f"{path}: {value} in {arm} is none of the models above it")
        needs.add(models[which].name)
        return f"runs/{models[which].name}/student"

    settings = {name: filled(value) for name, value in settings.items()} | {"run.seed": seed}
    if labels is not None:
        settings |= {"data.subsample": labels, "data.subsample_seed": seed}
    try:
        config = load_settings(recipe, settings)
        checked_tasks(config.data)
    except ValueError as error:
        raise ValueError(f"{path}: arm {arm}: {error}") from error
    # settings at their defaults do not count, or each new setting of a new version would start all runs anew
    defaults = fields.to_flat(Config()) | {"run.dir": config.run.dir}
    chosen = {name: v for name, v in fields.to_flat(config).items() if v != defaults[name]}
    for folder, what in identities.items():
        chosen = {name: v.replace(folder, what) if isinstance(v, str) else v for name, v in chosen.items()}
    digest = hashlib.sha256(json.dumps([chosen, ranks], sort_keys=True).encode()).hexdigest()[:8]
    label = "" if labels is None else f"-n{labels:g}"
    return Run(
        name=f"{arm}{label}-s{seed}-{digest}",
        arm=arm,
        labels=labels or 0,
        seed=seed,
        recipe=recipe or "",
        settings=settings,
        ranks=ranks,
        needs=frozenset(needs),
        stage=stage,
    )


def resolved(run: Run, out: Path, folder: Path | None = None) -> Config:
    """The run's whole configuration with real folders: its own is `folder`, or else one below `out`."""
    folder = folder or out / "runs" / run.name

    def placed(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return str(out / value) if value.startswith("runs/") else value.replace("{run}", str(folder))

    settings = {name: placed(value) for name, value in run.settings.items()}
    return load_settings(run.recipe or None, settings | {"run.dir": str(folder)})


def result(run: Run, out: Path) -> dict[str, Any] | None:
    """The result of a finished run, with what `execute` noted, or what is recorded of it; else None."""
    folder = out / "runs" / run.name
    try:
        found = json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        return run.recorded
    notes = folder / "study.json"
    return found | (json.loads(notes.read_text()) if notes.is_file() else {})
