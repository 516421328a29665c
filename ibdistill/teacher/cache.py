"""A teacher's answers on disk: ragged tensors by key, with many writers and many readers.

    FOLDER/fingerprint.json                       what made the answers
           shard-RANK-RANDOM.safetensors          some entries: see `cache_shard`
           head.tensors                           the teacher's head: see `answer_tensors`
           .tmp-RANDOM                            a file being written, or left by a crash

A shard is written beside its final name, synced and renamed, and never changes afterwards. A crash therefore
costs the unfinished shard only, and ranks need no locks, because the names of their shards differ. The same
key in two shards is harmless, since the same fingerprint gives the same answer.

Opening a cache reads every new shard as a whole to verify its checksum. The number of missing records decides
whether a teacher is loaded at all, so damage has to be known by then.

A rank holds the keys in memory and not the answers, which are memory-mapped. The keys are in a dict, which
takes 190 bytes per key or 0.6 GB at 3 million. Sorted arrays take 24 bytes per key, but must be merged with
every new shard, which took 0.3 s at that size.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ibdistill.runtime.files import TEMPORARY, digest, refuse_special, write_atomically, write_json
from ibdistill.teacher.cache_shard import KEY_BYTES, Entry, Rows, read_shard, write_shard

logger = logging.getLogger("ibdistill")

FORMAT = "ibdistill-answers-2"
"""Format 1 had no checksums. Its caches are refused as those of another fingerprint are: to read them
unverified would keep the fault that format 2 is there to catch, and answers can be computed again."""
FINGERPRINT = "fingerprint.json"
ABANDONED_SECONDS = 3600
"""A temporary file of this age has no writer any more; writing a shard takes seconds."""
Schema = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name -> dtype and shape of one row."""


class AnswerCache:
    """An append-only store of ragged tensors on disk. Not for several threads of a process.

    All entries have the same tensor names, dtypes and row shapes.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: dict[str, Any],
        *,
        rank: int,
        shard_bytes: int = 64 << 20,
        read_only: bool = False,
    ) -> None:
        """Open a cache, or create it unless `read_only`; any number of ranks may do so at once.

        `fingerprint` is what JSON can hold, and everything that an answer depends on besides its key.
        `put` writes a shard when `shard_bytes` have gathered. Raises ValueError if the folder holds a
        cache of another fingerprint or no cache, or cannot be written (with `read_only`: read).
        """
        self.folder = folder
        self.nbytes = 0  # of the shards, on disk
        self._fingerprint = {"format": FORMAT} | json.loads(json.dumps(fingerprint, sort_keys=True))
        canonical = json.dumps(self._fingerprint, sort_keys=True).encode()
        self._metadata = {"fingerprint": digest(canonical, 16).hex()}
        self._rank = rank
        self._shard_bytes = shard_bytes
        self._read_only = read_only
        self._schema: Schema | None = None
        self._shards: list[Rows] = []
        self._seen: set[str] = set()
        # key -> number of its shard << 32 | its place there: one int is smaller than a pair
        self._index: dict[bytes, int] = {}
        self._buffer: dict[bytes, Entry] = {}
        self._buffered_bytes = 0
        try:
            refuse_special(folder)
            if not read_only:
                folder.mkdir(parents=True, exist_ok=True)
                self._clean()
            self._open()
            self.refresh()
        except OSError as error:
            raise ValueError(
                f"answer cache {folder} cannot be {'read' if read_only else 'written'}: {error}; "
                "see to its permissions and space, or choose another folder"
            ) from error

    def __contains__(self, key: bytes) -> bool:
        return key in self._index or key in self._buffer

    def __len__(self) -> int:
        """Entries that `get` finds, the unwritten ones of this rank included."""
        return len(self._index) + sum(key not in self._index for key in self._buffer)

    def missing(self, keys: Sequence[bytes]) -> int:
        """How many of the keys `get` would not find."""
        return sum(key not in self for key in keys)

    def get(self, keys: Sequence[bytes]) -> list[Entry] | None:
        """The entries of some keys, tensors [n, ...] on the CPU; None if any is missing.

        The tensors are views of the cache: do not write to them.
        """
        entries = []
        for key in keys:
            if (place := self._index.get(key)) is not None:
                shard, i = self._shards[place >> 32], place & 0xFFFFFFFF
                entries.append({name: rows[at[i] : at[i + 1]] for name, (rows, at) in shard.items()})
            elif key in self._buffer:
                entries.append(self._buffer[key])
            else:
                return None
        return entries

    def put(self, key: bytes, tensors: Entry) -> None:
        """Take a copy of an entry, tensors [n, ...] of any dtype; n may be 0 and differ between them.

        A known key is left as it is. Raises ValueError if the tensors' names, dtypes or row shapes are not
        those of the other entries, or the cache is read-only; OSError as `flush` does.
        """
        assert len(key) == KEY_BYTES
        if self._read_only:
            raise ValueError(f"answer cache {self.folder} is open for reading only")
        if key in self:
            return
        if not tensors or any(tensor.ndim == 0 for tensor in tensors.values()):
            raise ValueError(f"an entry of an answer cache is one or more tensors [n, ...], not {tensors}")
        self._check_schema(tensors)
        # a view would keep the whole batch alive, and change with it
        copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        self._buffer[key] = copies
        self._buffered_bytes += sum(tensor.nbytes for tensor in copies.values())
        if self._buffered_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the entries taken since the last time as one shard.

        Raises OSError, with the folder's name, if that fails. Then nothing is lost: what was written before
        stands, the entries can still be read, and the next flush tries again.
        """
        if not self._buffer:
            return
        path = self.folder / f"shard-{self._rank:05d}-{uuid.uuid4().hex}.safetensors"
        try:
            write_shard(path, self._buffer, self._metadata)
        except OSError as error:
            raise OSError(
                error.errno,
                f"answer cache {self.folder} cannot take another shard: {error.strerror}; free some space or "
                "choose another folder. The shards written before are good",
            ) from error
        self._buffer = {}
        self._buffered_bytes = 0
        self._load(path)

    def refresh(self) -> None:
        """See the shards that others have finished. A bad one is named in a warning, once, and ignored."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._seen:
                self._load(path)

    def bytes_per_row(self) -> dict[str, int]:
        """Tensor name -> bytes of one row (a token, where rows are tokens); empty for an empty cache."""
        schema = self._schema or {}
        return {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in schema.items()}

    def summary(self) -> str:
        """One line for the log."""
        tensors = [
            f"{name} {sum(int(shard[name][1][-1]) for shard in self._shards)} x {size}"
            for name, size in self.bytes_per_row().items()
        ]
        return (
            f"answer cache {self.folder}: {len(self)} entries, {len(self._shards)} shards, "
            f"{self.nbytes / 1e6:.1f} MB; rows x bytes: {', '.join(tensors) or 'none'}"
        )

    def _clean(self) -> None:
        """Remove what crashed writers have left, and raise OSError if the folder cannot be written."""
        probe = self.folder / f"{TEMPORARY}{uuid.uuid4().hex}"
        write_atomically(probe, bytes(4096))
        now = probe.stat().st_mtime  # by the clock of the file server, as the others' times
        probe.unlink()
        for path in self.folder.glob(f"{TEMPORARY}*"):
            with suppress(OSError):  # another rank may be doing the same
                if now - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()

    def _open(self) -> None:
        """Compare the fingerprints, or write ours into an empty folder."""
        path = self.folder / FINGERPRINT
        if not path.exists():
            others = sorted(p.name for p in self.folder.iterdir() if not p.name.startswith(TEMPORARY))
            # looked for again, as another rank may have created the cache in between
            if (others or self._read_only) and not path.exists():
                raise ValueError(
                    f"{self.folder} is no answer cache: it has no {FINGERPRINT} and holds "
                    f"{', '.join(others[:3]) or 'nothing'}; choose a cache or, for a new one, an empty folder"
                )
            # Ranks that get here at once write the same. If not, the last one wins here, and the fingerprint
            # in every shard keeps the other's answers out.
            if not others:
                write_json(path, self._fingerprint)
        try:
            there = json.loads(path.read_text())
        except (ValueError, RecursionError):
            there = None
        if not isinstance(there, dict):
            raise ValueError(f"{path} is damaged; delete {self.folder} or choose another folder")
        here = self._fingerprint
        if found := differences(there, here):
            raise ValueError(
                f"answer cache {self.folder} was made by something else: {found}. "
                "Choose another folder, or delete that one to compute its answers again"
            )

    def _load(self, path: Path) -> None:
        """Take a shard's entries into the index, or warn."""
        self._seen.add(path.name)
        try:
            keys, shard = read_shard(path, self._metadata)
            self._check_schema({name: rows for name, (rows, _) in shard.items()})
            self.nbytes += path.stat().st_size
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            logger.warning("shard %s is ignored: %s", path, error)
            return
        self._index.update(zip(keys, itertools.count(len(self._shards) << 32)))
        self._shards.append(shard)

    def _check_schema(self, entry: Entry) -> None:
        schema = {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, tensor in entry.items()}
        if self._schema is None:
            self._schema = schema
        if schema != self._schema:
            raise ValueError(
                f"its tensors (dtype, shape of a row) are {schema} and {self.folder} has {self._schema}; "
                "what makes them differ belongs in the fingerprint"
            )


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs between two fingerprints, for a message; empty if nothing does."""
    return "; ".join(
        f"{key} is {json.dumps(there[key]) if key in there else 'absent'} there "
        f"and {json.dumps(here[key]) if key in here else 'absent'} here"
        for key in sorted(there | here)
        if key not in there or key not in here or there[key] != here[key]
    )
