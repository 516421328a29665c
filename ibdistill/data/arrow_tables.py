"""Tables in Arrow files that are made once on a node and mapped into the memory of all its ranks.

    CACHE/KIND-DIGEST/table.arrow    the rows
    CACHE/KIND-DIGEST/about.json     what they were made from, and what was found out meanwhile

DIGEST stands for what a table is made from. A folder gets its name when all of it is on the disk, so a table
that was interrupted is none. The next run with the same data reads what is there. Rows whose size and times
are still those of their making are taken as they are, since all have to be read for a checksum; those of a
table that was copied or written to are read. The folder's time says when a run last began with it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import pyarrow
import pyarrow.ipc
from huggingface_hub.constants import HF_HOME

from ibdistill.data.ragged import Ragged
from ibdistill.runtime import files

logger = logging.getLogger("ibdistill")

BLOCK = 1024
"""Rows that are made, written and read together."""
_WAY_OUT = "name another folder with --data.cache_dir, on a disk of this node or a shared one"
_ROWS, _ABOUT = "table.arrow", "about.json"


class Table(NamedTuple):
    """A table on the disk. Arrow's `to_numpy` is not used: it imports pandas, half a second of each start."""

    batches: list[pyarrow.RecordBatch]
    about: dict[str, Any]

    def tokens(self, column: str) -> Ragged:
        """A column of token ids."""
        lists = [batch.column(column) for batch in self.batches]
        return Ragged.of_parts([(np.from_dlpack(own.values), np.from_dlpack(own.offsets)) for own in lists])

    def numbers(self, column: str) -> np.ndarray:
        """A column of numbers, [rows] int64; a copy."""
        return np.concatenate([np.from_dlpack(batch.column(column)) for batch in self.batches])

    def texts(self, column: str) -> pyarrow.ChunkedArray:
        """A column of texts."""
        return pyarrow.chunked_array([batch.column(column) for batch in self.batches])


def blocks(items: Iterable[Any]) -> Iterator[list[Any]]:
    """The items in parts of `BLOCK`, of which there is one at least."""
    rest = iter(items)
    yield list(islice(rest, BLOCK))
    while block := list(islice(rest, BLOCK)):
        yield block


def folder_of(cache_dir: str, kind: str, key: Any) -> Path:
    """The folder of the table that is made from `key`, which JSON can hold."""
    digest = files.digest(json.dumps(key, sort_keys=True).encode()).hex()
    return (Path(cache_dir).expanduser() if cache_dir else Path(HF_HOME) / "ibdistill") / f"{kind}-{digest}"


class Making(NamedTuple):
    """How a table is made."""

    rows: Iterable[pyarrow.RecordBatch]
    total: int
    """How many rows there are at most."""
    finish: Callable[[Table], dict[str, Any]]
    """What is made of the rows when they are on the disk: `Table.about`, which JSON can hold."""


def ensure(folder: Path, key: Any, make: Callable[[], Making]) -> bool:
    """Make the table of a folder unless it is there whole; whether it was made now. Another process that
    makes it is waited for.

    Raises ValueError if the folder cannot be written, or if the disk is too small, before it is filled.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.with_name(f"{folder.name}.lock"))
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise ValueError(
            f"data.cache_dir: {str(folder.parent)!r} cannot be written or locked ({error}); {_WAY_OUT}"
        ) from error
    try:
        if folder.exists() and (fault := _fault(folder, key)):
            logger.warning("the table %s is made again: %s", folder, fault)
            shutil.rmtree(folder)
        if is_new := not folder.exists():
            _make(folder, key, make())
        with suppress(OSError):  # another user's
            os.utime(folder)
        return is_new
    finally:
        lock.release()


def opened(folder: Path) -> Table:
    """The table of a folder, mapped into memory. Raises ValueError if it is not there."""
    try:
        return Table(_batches(folder), json.loads((folder / _ABOUT).read_bytes())["about"])
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"the table {folder}, which the first rank of this node has checked, cannot be read ({error}); "
            "all ranks of a node must see the same data.cache_dir"
        ) from error


def _batches(folder: Path) -> list[pyarrow.RecordBatch]:
    reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / _ROWS)))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _make(folder: Path, key: Any, making: Making) -> None:
    new = folder.with_name(files.TEMPORARY + folder.name)
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed: the lock is ours
    try:
        new.mkdir()
        with (new / _ROWS).open("wb") as file:
            _write(making.rows, making.total, file, folder)
            file.flush()
            os.fsync(file.fileno())
        about = making.finish(Table(_batches(new), {}))
        content = {"key": key, "checksum": files.checksum(new / _ROWS), "about": about}
        files.write_json(new / _ABOUT, content | {"state": _state(new)})
        os.replace(new, folder)
    except OSError as error:
        raise ValueError(f"data.cache_dir: {folder} cannot be made ({error}); {_WAY_OUT}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write(rows: Iterable[pyarrow.RecordBatch], total: int, file: Any, folder: Path) -> None:
    writer = None
    for batch in rows:
        if writer is None:
            needed = int(batch.nbytes / max(1, len(batch)) * total)
            if needed > (free := shutil.disk_usage(folder.parent).free):
                raise ValueError(
                    f"data.cache_dir: {folder} will take about {needed} bytes, by its first {len(batch)} of "
                    f"{total} records, and the disk has {free} left; {_WAY_OUT}, or remove tables there that "
                    "no run needs"
                )
            writer = pyarrow.ipc.new_file(file, batch.schema)
        writer.write_batch(batch)
    writer.close()


def _state(folder: Path) -> list[int]:
    """What changes when something is written to the rows."""
    found = (folder / _ROWS).stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _fault(folder: Path, key: Any) -> str:
    """Why the table is not the one that is made from `key`, whole; empty if it is."""
    try:
        files.refuse_special(folder)
        content = json.loads((folder / _ABOUT).read_bytes())
        if content["key"] != json.loads(json.dumps(key)):
            return "it was made from something else"
        if content["state"] != (state := _state(folder)):
            if content["checksum"] != files.checksum(folder / _ROWS):
                return "its checksum is wrong"
            files.write_json(folder / _ABOUT, content | {"state": state})
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is damaged ({type(error).__name__}: {error})"
    return ""
