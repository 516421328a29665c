"""Rows of JSON files, each with its place, so that a message about a row can name file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = tuple[str, Any]
"""`FILE:LINE` (or `FILE: item I` for a JSON array), and the JSON value there."""


def read_rows(path: Path) -> list[Row]:
    """The values of a JSON-lines file, or of one JSON array, each with its place. Blank lines are skipped.

    Raises:
        ValueError: not UTF-8, or not JSON; the message begins with `FILE:LINE`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    if text.lstrip().startswith("["):
        return [(f"{path}: item {i}", value) for i, value in enumerate(_json(text, path, 1))]
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    lines = enumerate(text.split("\n"), start=1)
    return [(f"{path}:{i}", _json(line, path, i)) for i, line in lines if line.strip()]


def field_text(row: dict[str, Any], key: str) -> str:
    """The field as text; numbers count as text.

    Raises:
        KeyError: the row has no such field.
        ValueError: the field is neither text nor a number.
    """
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"field {key!r} is {value!r}; it must be text or a number")
    return str(value)


def _json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}:{line}: not valid JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
        raise ValueError(f"{path}:{first_line}: not usable JSON ({error})") from None
