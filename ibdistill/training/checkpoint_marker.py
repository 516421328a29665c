"""The file in a checkpoint's folder that is written last, and what it says must be there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

MARKER = "complete.json"


class MarkedFile(NamedTuple):
    """What a marker says about a file."""

    bytes: int
    crc32: int | None
    """None: it was not computed, as before markers held checksums."""


class Marker(NamedTuple):
    """The content of a marker."""

    step: int
    world_size: int
    zero: dict[str, Any] | None
    """The run's settings of ZeRO; None: they were not written, as once."""
    files: dict[str, MarkedFile]


def read_marker(folder: Path) -> Marker:
    """Raises ValueError if the marker is damaged."""
    try:
        content = json.loads((folder / MARKER).read_bytes())
        files = {
            name: MarkedFile(file["bytes"], file["crc32"])
            if isinstance(file, dict)
            else MarkedFile(int(file), None)
            for name, file in content["files"].items()
        }
        return Marker(
            int(content["step"]), int(content.get("world_size", 0)), content.get("zero_optimization"), files
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # ValueError: no JSON, or no UTF-8
        raise ValueError(f"its {MARKER} is damaged") from error


def problem_with(folder: Path) -> str | None:
    """Why a checkpoint folder does not count, or None if it does, by its marker and the files' sizes."""
    if not re.fullmatch(r"step-\d{8}", folder.name):
        return "its name is not that of a checkpoint"
    if not (folder / MARKER).is_file():
        return f"it has no {MARKER}, so it was never finished or was not written by ibdistill"
    try:
        marker = read_marker(folder)
    except ValueError as error:
        return str(error)
    if folder.name != f"step-{marker.step:08d}":
        return f"its {MARKER} is that of step {marker.step}"
    for name, file in marker.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != file.bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {file.bytes}"
    return None
