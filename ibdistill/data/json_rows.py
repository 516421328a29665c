"""Rows of data files, each with its place, so that a message about a row can name file and line.

Read are JSON lines, one JSON array, one JSON object `{"data": [...]}`, all of them plain or compressed with
gzip, and Parquet. The first bytes tell which it is, not the name.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

Row = tuple[str, Any]
"""`FILE:LINE` (or `FILE: item I` for an array, `FILE: row I` for Parquet), and the JSON value there."""

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
"""How the names of files in these forms end."""
_EXPECTED = 'one JSON object per line, a JSON array, {"data": [...]}, one of these with gzip, or Parquet'
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_SHOWN = 80


def read_rows(path: Path) -> list[Row]:
    """The values of a file, each with its place. Blank lines are skipped.

    Raises:
        ValueError: not UTF-8, not one of the forms above, or a text with half of a surrogate pair, which no
            tokenizer and no file takes; the message begins with `FILE:LINE`.
    """
    data = path.read_bytes()
    if data.startswith(b"PAR1"):
        return [(f"{path}: row {i}", row) for i, row in enumerate(_parquet(path))]
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: the gzip file is damaged ({error})") from None
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None
    rows = list(_rows(text, path))
    if _ESCAPED_SURROGATE.search(text):  # only an escape can bring half of a pair into decoded text
        for where, value in rows:
            _refuse_surrogates(value, where)
    return rows


def check_form(path: Path) -> None:
    """Raise ValueError if a file begins as none of the forms above does, as a CSV table or a spreadsheet."""
    with path.open("rb") as file:
        start = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start or start[0] in b"{[" or start.startswith((b"PAR1", b"\x1f\x8b")):
        return
    if start[0] < 0x80:  # else it is no UTF-8, which `read_rows` says
        raise ValueError(
            f"{path} begins with {shown(start[:40].decode(errors='replace'))}; expected {_EXPECTED}. A CSV "
            'table becomes one by `datasets.load_dataset("csv", data_files=FILE)["train"].to_json(NEW_FILE)`'
        )


def field_text(row: dict[str, Any], key: str) -> str:
    """The field as text. A number counts as the text of its value: `8`, `8.0` and `8e0` are all `8`.

    Raises:
        KeyError: the row has no such field.
        ValueError: the field is neither text nor a finite number.
    """
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"field {key!r} is {shown(value)}; it must be text or a number")
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        raise ValueError(
            f"field {key!r} is {value}, which is no number; write the text or number that is meant, or null "
            "where an optional field has no value"
        )
    digits = format(Decimal(repr(value)), "f")  # never with an exponent
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return "0" if digits == "-0" else digits


def shown(value: Any) -> str:
    """A value from a file for a message: escaped and cut."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _rows(text: str, path: Path) -> Iterator[Row]:
    start = text.lstrip()[:1]
    if start == "[":
        yield from ((f"{path}: item {i}", value) for i, value in enumerate(_json(text, path, 1)))
        return
    if start == "{" and (items := _data_of(text)) is not None:
        yield from ((f"{path}: item {i} of 'data'", value) for i, value in enumerate(items))
        return
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for i, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{i}", _json(line, path, i)


def _data_of(text: str) -> list[Any] | None:
    """The items of a file that is one object with a list of objects under `data`; None for other files."""
    try:
        value = json.loads(text)  # ends after the first line of JSON lines
    except (ValueError, RecursionError):
        return None
    items = value.get("data")
    return items if isinstance(items, list) and all(isinstance(item, dict) for item in items) else None


def _json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"{path}:{line}: not valid JSON ({error.msg}, column {error.colno}); expected {_EXPECTED}"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
        raise ValueError(f"{path}:{first_line}: not usable JSON ({error})") from None


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow  # comes with `datasets`, whose own reader would leave a copy in its cache
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: the Parquet file is damaged ({error})") from None


def _refuse_surrogates(value: Any, where: str) -> None:
    """Raise ValueError if a text or field name within a value cannot be written as UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: the text {shown(value)} has half of a surrogate pair "
                f"({value[error.start]!a}), which is no character; write the whole character"
            ) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_surrogates(key, where)
            _refuse_surrogates(item, where)
    elif isinstance(value, list):
        for item in value:
            _refuse_surrogates(item, where)
