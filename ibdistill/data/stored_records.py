"""The records of a run in a table on the disk (`data.arrow_tables`), of which no rank holds the texts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from ibdistill.config.sections import DataConfig
from ibdistill.data import arrow_tables
from ibdistill.data.arrow_tables import Making, Table
from ibdistill.data.json_rows import SUFFIXES
from ibdistill.data.lazy import Lazy
from ibdistill.data.loading import Loaded
from ibdistill.data.records import Record
from ibdistill.data.tasks.published import Published
from ibdistill.data.tasks.registry import TASKS
from ibdistill.runtime import files

_FIELDS = [field.name for field in dataclasses.fields(Record)]
_FOR_BATCHES = ("cache_dir", "bucket_batches", "packing", "mixture_weights", "mixture_temperature")
"""Settings that change no record and no token id, and so no table."""


class StoredRecords(Lazy[Record]):
    """Records that are read from a table one by one, when they are asked for."""

    def __init__(self, rows: pyarrow.ChunkedArray, indices: np.ndarray) -> None:
        self._rows, self._indices = rows, indices

    def __len__(self) -> int:
        return len(self._indices)

    def take(self, indices: Sequence[int]) -> StoredRecords:
        """The records with these indices alone."""
        return StoredRecords(self._rows, self._indices[indices])

    def _item(self, index: int) -> Record:
        row = json.loads(self._rows[int(self._indices[index])].as_py())
        values = dict(zip(_FIELDS, row, strict=True))
        values["history"] = tuple(map(tuple, values["history"]))
        for name in ("quantities", "rationales"):
            values[name] = tuple(values[name])
        return Record(**values)


def encoded(record: Record) -> bytes:
    """A record's row."""
    return json.dumps([getattr(record, name) for name in _FIELDS]).encode()


def making(loaded: Loaded, check: Callable[[], None] = lambda: None) -> Making:
    """How these records become a table; `check` is called when all are read."""
    parts = {("train", ""): loaded.train}
    parts |= {(s, task): own for s in ("valid", "test") for task, own in getattr(loaded, s).items()}
    sizes = [[split, task, len(own)] for (split, task), own in parts.items()]
    content = files.Digest()
    content.add(json.dumps(sizes).encode())

    def batches() -> Iterator[pyarrow.RecordBatch]:
        for part in parts.values():
            for block in arrow_tables.blocks(part):
                rows = [encoded(record) for record in block]
                for row in rows:
                    content.add(row)
                yield pyarrow.record_batch([pyarrow.array(rows, pyarrow.large_binary())], ["record"])

    def about(table: Table) -> dict[str, Any]:
        check()
        return {"sizes": sizes, "report": loaded.report, "content": content.hex()}

    return Making(batches(), sum(size for *_, size in sizes), about)


def from_table(table: Table) -> Loaded:
    """The records of a table, with their texts on the disk."""
    about, rows, start = table.about, table.texts("record"), 0
    loaded = Loaded([], {}, {}, about["report"], about["content"])
    for split, task, size in about["sizes"]:
        records = StoredRecords(rows, np.arange(start, start + size))
        start += size
        if split == "train":
            loaded = dataclasses.replace(loaded, train=records)
        else:
            getattr(loaded, split)[task] = records
    return loaded


def source(data: DataConfig) -> dict[str, Any]:
    """What the records of these settings are made from: the settings, the state of the files that may be
    read, or of the copies of data sets from the hub, and the code. Raises ValueError as readers do."""
    found: dict[str, Any] = settings(data)
    if data.path is not None and Path(data.path).exists():  # else its reader says so
        path = Path(data.path).resolve()
        inside = [file for file in sorted(path.rglob("*")) if file.name.endswith(SUFFIXES)]
        stats = [(str(file), file.stat()) for file in (inside if path.is_dir() else [path])]
        found["files"] = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats]
    elif data.path is None:
        readers = {n: getattr(TASKS[n].read, "__self__", None) for n in _names(data) if n in TASKS}
        found["hub"] = [own.hub_state(n) for n, own in readers.items() if isinstance(own, Published)]
    return found


def check_unchanged(data: DataConfig, before: dict[str, Any]) -> None:
    """Raise ValueError unless `source` gives what it did before: records are read twice."""
    if source(data) != before:
        raise ValueError(
            f"data.path {data.path!r} changed while it was read; start the run again when it is complete"
        )


def settings(data: DataConfig) -> dict[str, Any]:
    """The settings that records and token ids depend on, and the code that makes them."""
    own = {name: value for name, value in dataclasses.asdict(data).items() if name not in _FOR_BATCHES}
    return {"settings": own, "code": code()}


@cache
def code() -> str:
    """A name for this version of the code that makes records and token ids."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return files.digest(b"".join(file.read_bytes() for file in sources)).hex()


def _names(data: DataConfig) -> list[str]:
    return [data.task] if isinstance(data.task, str) else list(data.task)
