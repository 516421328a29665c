"""Rows of data files, each with its place, so that a message about a row can name file and line.

Read are JSON lines, one JSON array, one JSON object `{"data": [...]}`, all of them plain or compressed with
gzip, and Parquet. The first bytes tell which it is, not the name.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import re
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ibdistill.data.lazy import Lazy

Row = tuple[str, Any]
"""`FILE:LINE` (or `FILE: item I` for an array, `FILE: row I` for Parquet), and the JSON value there."""

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
"""How the names of files in these forms end."""
_EXPECTED = 'one JSON object per line, a JSON array, {"data": [...]}, one of these with gzip, or Parquet'
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_SHOWN = 80


def read_rows(path: Path) -> list[Row]:
    """`rows_of`, with all rows in memory."""
    return list(rows_of(path))


def rows_of(path: Path) -> Sequence[Row]:
    """The values of a file, each with its place. Blank lines are skipped. Rows of JSON lines and of Parquet
    are read from the file when they are asked for, fastest in their order; other forms are held whole.

    Raises, here or when the row is asked for:
        ValueError: not UTF-8, not one of the forms above, or a text with half of a surrogate pair, which no
            tokenizer and no file takes; the message begins with `FILE:LINE`.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        return _Parquet(path)
    opened = gzip.open if start.startswith(b"\x1f\x8b") else open
    try:
        lines = _Lines(path, opened(path, "rb"))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: the gzip file is damaged ({error})") from None
    items = _items(lines.text(), path) if lines.may_be_one_value() else None
    return lines if items is None else items


def check_form(path: Path) -> None:
    """Raise ValueError if a file begins as none of the forms above does, as a CSV table or a spreadsheet."""
    with path.open("rb") as file:
        start = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start or start[0] in b"{[" or start.startswith((b"PAR1", b"\x1f\x8b")):
        return
    if start[0] < 0x80:  # else it is no UTF-8, which `rows_of` says
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


class _Lines(Lazy[Row]):
    """JSON lines, read from an open file, of which they hold the places."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._places = np.array(array("q", self._found())).reshape(-1, 3)

    def __del__(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def text(self) -> str:
        """All of the file, with its lines ended alike."""
        self._file.seek(0)
        return self._file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")

    def may_be_one_value(self) -> bool:
        """Whether the file may be an array or an object instead: whether its first line is not a value with
        others behind it."""
        line = self._line(0) if len(self) else ""
        if line.lstrip()[:1] not in ("[", "{"):
            return False
        try:
            json.loads(line)
        except json.JSONDecodeError as error:
            return line.lstrip().startswith("[") or error.pos >= len(line.rstrip())
        except (ValueError, RecursionError):
            pass
        return len(self) == 1 or line.lstrip().startswith("[")

    def _found(self) -> Iterator[int]:
        """Number, place and bytes of each line that is not blank. Not splitlines(): JSON strings may hold
        U+2028 and the like unescaped."""
        number = place = mark = 0
        for whole in self._file:
            if not place and whole.startswith(codecs.BOM_UTF8):
                whole, place, mark = whole[3:], 3, 3
            start = place
            for line in whole.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
                number += 1
                try:
                    is_blank = not line.decode().strip()
                except UnicodeDecodeError as error:
                    byte = start - mark + error.start
                    raise ValueError(
                        f"{self._path}: byte {byte} is not UTF-8; convert the file to UTF-8"
                    ) from None
                if not is_blank:
                    yield from (number, start, len(line))
                start += len(line) + 1
            place += len(whole)

    def _line(self, index: int) -> str:
        _, place, size = self._places[index].tolist()
        self._file.seek(place)
        return self._file.read(size).decode()

    def _item(self, index: int) -> Row:
        line, number = self._line(index), int(self._places[index, 0])
        where, value = f"{self._path}:{number}", _json(line, self._path, number)
        if _ESCAPED_SURROGATE.search(line):  # only an escape can bring half of a pair into decoded text
            _refuse_surrogates(value, where)
        return where, value


class _Parquet(Lazy[Row]):
    """Rows of a Parquet file, of which one block is held at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow  # comes with `datasets`, whose own reader would leave a copy in its cache
        import pyarrow.parquet

        self._path, self._errors = path, (pyarrow.ArrowException, OSError)
        bounded = {"buffer_size": 1 << 20, "pre_buffer": False}  # else all of a row group is read at once
        self._file = self._read(lambda: pyarrow.parquet.ParquetFile(path, **bounded))
        self._start_again()

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def _item(self, index: int) -> Row:
        if index < self._first:
            self._start_again()
        while index >= self._first + len(self._block):
            self._first += len(self._block)
            self._block = self._read(lambda: next(self._blocks).to_pylist())
        return f"{self._path}: row {index}", self._block[index - self._first]

    def _start_again(self) -> None:
        self._first, self._block, self._blocks = 0, [], self._file.iter_batches(batch_size=1024)

    def _read(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (*self._errors, StopIteration) as error:
            raise ValueError(f"{self._path}: the Parquet file is damaged ({error})") from None


def _items(text: str, path: Path) -> list[Row] | None:
    """The items of a file that is an array, or an object with a list of objects under `data`; None for other
    files."""
    if text.lstrip()[:1] == "[":
        rows = [(f"{path}: item {i}", value) for i, value in enumerate(_json(text, path, 1))]
    elif (items := _data_of(text)) is not None:
        rows = [(f"{path}: item {i} of 'data'", value) for i, value in enumerate(items)]
    else:
        return None
    if _ESCAPED_SURROGATE.search(text):
        for where, value in rows:
            _refuse_surrogates(value, where)
    return rows


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
