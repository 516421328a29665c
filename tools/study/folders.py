"""What a study's YAML file leaves to the command line: its folders, whether all of it is run, and
results that are there already."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any

_WHOLE = 16 * 2**20
"""Bytes. Of a larger file only the size is looked at."""


def with_folders(
    content: dict[str, Any], path: Path, given: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """`content` with `{NAME}` in its texts replaced by the folder of that name: `given`, or `folders`.

    Also returns folder -> NAME.
    """
    folders = content.pop("folders", {})
    if not isinstance(folders, dict) or not all(isinstance(v, str) for v in folders.values()):
        raise ValueError(f"{path}: folders is {folders!r}; it must map names to folders")
    if unknown := sorted(given.keys() - folders.keys()):
        raise ValueError(
            f"{path}: --set {', '.join(unknown)}: the study has {', '.join(folders) or 'no folders'}"
        )
    folders |= given

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: placed(own) for key, own in value.items()}
        if isinstance(value, str):
            return re.sub(r"\{(\w+)\}", lambda found: folders.get(found[1], found[0]), value)
        return value

    return placed(content), {folder: name for name, folder in folders.items()}


def identity(folder: str) -> str:
    """A digest of a folder's files, wherever it lies; a name that is no folder stays as it is."""
    if not Path(folder).is_dir():
        return folder
    digest = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*")):
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder)} {size}\n".encode())
            digest.update(file.read_bytes() if size <= _WHOLE else b"")
    return digest.hexdigest()


def quick(content: dict[str, Any], smaller: Any, path: Path) -> dict[str, Any]:
    """The study with the arms and seeds of its key `quick`, whose settings reach the models
    that these need."""
    if not isinstance(smaller, dict) or smaller.keys() != {"arms", "seeds", "settings"}:
        raise ValueError(f"{path}: --quick needs the key `quick` with arms, seeds and settings")
    arms, settings = content["arms"], smaller["settings"]
    if unknown := [name for name in smaller["arms"] if name not in arms]:
        raise ValueError(f"{path}: quick names {', '.join(unknown)}; the arms are {', '.join(arms)}")
    own = {name: arms[name] | {"seeds": smaller["seeds"]} for name in smaller["arms"]}
    own = {name: {k: v for k, v in arm.items() if k != "labels"} for name, arm in own.items()}
    models, text = {}, str([own, content.get("settings")])
    for name, model in reversed(content.get("models", {}).items()):
        if re.search(rf"\{{{name}(\+\d+)?\}}", text):  # a later model or an arm starts from it
            models[name] = model | settings
            text += str(model)
    models = dict(reversed(models.items()))
    return content | {
        "arms": own,
        "baseline": next(iter(own)),
        "comparisons": [],
        "models": models,
        "settings": content.get("settings", {}) | settings,
    }


def read_folder(text: str) -> tuple[str, str]:
    """`NAME=FOLDER`, its folder resolved. Raises argparse's error for anything else."""
    name, mark, folder = text.partition("=")
    if not (mark and folder and re.fullmatch(r"\w+", name)) or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(
            f"{text[:200]!r} is no NAME=FOLDER of a name in the study's `folders` and a folder that exists"
        )
    return name, str(Path(folder).resolve())


def read_jobs(text: str) -> int:
    """A number of runs side by side. Raises argparse's error, which names the option, for anything else."""
    if not re.fullmatch(r"[1-9]\d{0,4}", text):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is no whole number from 1 on")
    return int(text)


def recorded_results(path: Path) -> dict[str, dict[str, Any]]:
    """Name of a run -> its result, from a study.json. Raises ValueError for any other file."""
    try:
        rows = json.loads(path.read_text())["runs"]
        found = {row["name"]: row["result"] for row in rows if row["result"]}
        for result in found.values():
            numbers = [test["accuracy"] for test in result["test"].values()]
            for number in (*numbers, result["steps"], result["seconds"]):
                float(number)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no study.json that `report` wrote: {error!r}"[:300]) from error
    return found
