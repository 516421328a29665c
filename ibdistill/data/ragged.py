"""Many token sequences in few arrays."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np


class Ragged:
    """Token sequences in flat arrays (int32) with offsets: four bytes per token, however many records.

    The arrays may be those of a file that is mapped into memory (`data.arrow_tables`).
    """

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        arrays = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
        flat = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
        self._set([(flat, np.cumsum([0, *map(len, arrays)]))])

    @classmethod
    def of_parts(cls, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Ragged:
        """The sequences of these parts, each a flat array (int32) and the offsets in it, one more (int64)
        than it has sequences. Nothing is copied."""
        ragged = cls.__new__(cls)
        ragged._set(list(parts))
        return ragged

    @classmethod
    def joined(cls, parts: Sequence[Ragged]) -> Ragged:
        """All sequences of these in one part; a copy if there are several."""
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([part.lengths for part in parts])
        offsets = np.concatenate([[0], lengths.cumsum()])
        return cls.of_parts([(np.concatenate([part.flat for part in parts]), offsets)])

    def _set(self, parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self.parts = parts
        self._firsts = np.cumsum([0, *(len(offsets) - 1 for _, offsets in parts)]).tolist()

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids of one sequence, [tokens] int32; a view."""
        part = bisect_right(self._firsts, index, hi=len(self.parts)) - 1
        flat, offsets = self.parts[part]
        place = index - self._firsts[part]
        return flat[offsets[place] : offsets[place + 1]]

    def __len__(self) -> int:
        return self._firsts[-1]

    def __add__(self, other: Ragged) -> Ragged:
        """These sequences and then the other ones."""
        return Ragged.of_parts(self.parts + other.parts)

    @property
    def flat(self) -> np.ndarray:
        """[tokens] int32: all sequences one after the other; a copy if there are several parts."""
        return self.parts[0][0] if len(self.parts) == 1 else np.concatenate([flat for flat, _ in self.parts])

    @cached_property
    def lengths(self) -> np.ndarray:
        """[sequences] int64: the number of tokens of each."""
        return np.concatenate([np.diff(offsets) for _, offsets in self.parts])
