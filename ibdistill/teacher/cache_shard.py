"""One shard of an answer cache: a file of entries that never changes once it has its name.

A shard is a safetensors file with these tensors, where an entry is a set of ragged tensors under a key:

    keys             [entries * 16] uint8, the keys one after the other
    rows/NAME        [rows of all entries, ...], the tensor NAME of every entry one after the other
    offsets/NAME     [entries + 1] int64, where each entry's rows begin

Its metadata holds the fingerprint of the cache and a checksum of everything above. Reading a shard reads all
of it to verify the checksum (CRC-32: 6 GiB/s of one core, so the disk's speed counts). The rows are
memory-mapped and entries are views of them, so they take no memory of the process. (`safe_open.get_slice`
also reads only the rows that are asked for, but it took 135 us per slice where a view takes 2.)
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ibdistill.config.fields import shown
from ibdistill.data.features import Features
from ibdistill.runtime.files import digest, write_atomically

KEY_BYTES = 16
Entry = dict[str, Tensor]
"""Tensor name -> the tensor [n, ...] of one record."""
Rows = dict[str, tuple[Tensor, np.ndarray]]
"""Tensor name -> the rows of all entries of a shard, memory-mapped, and their offsets [entries + 1] int64."""

_CHECKSUM = "checksum"


def key_of(*arrays: np.ndarray) -> bytes:
    """16 bytes that stand for some token sequences, each an integer array [n] of any width.

    The hashed text can be read back in one way only, because each sequence is written as its length and its
    ids, all int64. So ([1, 2], [3]) and ([1], [2, 3]) differ.
    """
    parts = []
    for array in arrays:
        assert array.ndim == 1
        parts += [len(array).to_bytes(8, "little"), array.astype("<i8", casting="same_kind").tobytes()]
    return digest(b"".join(parts), KEY_BYTES)


def record_key(features: Features, index: int) -> bytes:
    """The key of a record's answers, made of its token ids."""
    tables = features.questions, features.targets, features.teacher_questions, features.with_reference
    return key_of(*(table[index] for own in tables for table in own.values()))


def write_shard(path: Path, entries: dict[bytes, Entry], metadata: dict[str, str]) -> None:
    """Write entries, which all have the same tensor names, as one shard. Raises OSError if that fails."""
    content = {"keys": torch.frombuffer(bytearray(b"".join(entries)), dtype=torch.uint8)}
    for name in next(iter(entries.values())):
        parts = [entry[name] for entry in entries.values()]
        content[f"rows/{name}"] = torch.cat(parts)
        content[f"offsets/{name}"] = torch.tensor([0, *map(len, parts)]).cumsum(0)
    write_atomically(path, save(content, metadata | {_CHECKSUM: checksum(content)}))


def read_shard(path: Path, metadata: dict[str, str]) -> tuple[list[bytes], Rows]:
    """The keys of a shard in the order of its entries, and its rows.

    Raises ValueError if its metadata is another one or its content is damaged, and OSError, SafetensorError
    or KeyError if it is no shard at all.
    """
    with safe_open(path, "pt") as file:
        found = file.metadata() or {}
        expected = found.pop(_CHECKSUM, None)
        if found != metadata:
            raise ValueError(f"its metadata is {shown(found)} instead of {metadata}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    if expected != checksum(tensors):
        raise ValueError("its content does not match its checksum; its records are asked for again")
    keys = tensors["keys"].numpy().tobytes()
    names = [name.removeprefix("rows/") for name in tensors if name.startswith("rows/")]
    rows = {name: (tensors[f"rows/{name}"], tensors[f"offsets/{name}"].numpy()) for name in names}
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)], rows


def checksum(tensors: Entry) -> str:
    """8 hexadecimal digits (CRC-32) of contiguous CPU tensors: their names, dtypes, shapes and bytes."""
    found = 0
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), found)
        if tensor.numel():
            found = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), found)
    return f"{found:08x}"
