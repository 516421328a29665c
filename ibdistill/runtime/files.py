"""Files that are there whole or not at all, and short names for what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

TEMPORARY = ".tmp-"
"""How the name of a file begins that is being written, or that a crash left behind."""


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never half of it.

    This also holds if the power fails, and if several processes write the same path at once: then one of
    them wins. A text is written as UTF-8. Raises OSError; the old content stands then.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    # the new name is in the folder, which has to reach the disk too
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems do not sync folders
            os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file by `write_atomically`, indented, with non-ASCII characters as they are."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def digest(content: bytes, size: int = 8) -> bytes:
    """`size` bytes that stand for the content (BLAKE2b); `.hex()` makes a name of them."""
    return hashlib.blake2b(content, digest_size=size).digest()


class Digest:
    """`digest` of bytes that come in pieces."""

    def __init__(self, size: int = 8) -> None:
        self._hash = hashlib.blake2b(digest_size=size)

    def add(self, piece: Any) -> None:
        """The next bytes, or anything that holds bytes."""
        self._hash.update(piece)

    def hex(self) -> str:
        """The name of what was added so far."""
        return self._hash.hexdigest()


def checksum(path: Path) -> int:
    """The CRC-32 of a file's content. Raises OSError."""
    value = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 22):
            value = zlib.crc32(piece, value)
    return value


def copy_to(path: Path, source: IO[bytes]) -> int:
    """Write the content of an open file, from its beginning, to `path`; its CRC-32. Raises OSError."""
    value = 0
    source.seek(0)
    with path.open("wb") as file:
        while piece := source.read(1 << 22):
            value = zlib.crc32(piece, value)
            file.write(piece)
    return value


def refuse_special(path: Path) -> None:
    """Raise ValueError if a path, or something in that folder, is a named pipe, a device or a socket.

    Who opens a pipe to read it waits for a writer, without end. What is missing or cannot be read passes.
    """
    with suppress(OSError):
        mode = path.stat().st_mode  # one look: between two, another rank may create what was missing
        if stat.S_ISDIR(mode):
            for entry in os.scandir(path):  # which mostly says without a look at a file that it is one
                if not entry.is_file() and not (entry.is_symlink() and entry.is_dir()):
                    refuse_special(Path(entry))
        elif not stat.S_ISREG(mode):
            raise ValueError(
                f"{path} is a named pipe, a device or a socket, and a file belongs there; remove it, or "
                "choose another folder"
            )


def check_can_hold(folder: Path, setting: str, value: str) -> None:
    """Raise ValueError that names the setting and its value if no file can be written in a folder that is
    there, or that can be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is no folder" if not there.is_dir() else "may not be written"
        raise ValueError(f"{setting} is {value[:200]!r}, which cannot be written: {there} {why}")


@contextmanager
def folder_replaced(path: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of the folder `path` if the block ends well.

    Otherwise it is removed, and `path` stays as it was. Raises OSError.
    """
    path = path.resolve()  # a link stays
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, and a folder belongs there")
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
