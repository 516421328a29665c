"""Many token sequences in one array."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


class Ragged:
    """Token sequences as one flat array (int32) and offsets: four bytes per token, however many records."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        arrays = [np.asarray(sequence, dtype=np.int32) for sequence in sequences]
        self.offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum([len(array) for array in arrays], out=self.offsets[1:])
        self.flat = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids of one sequence, [tokens] int32; a view."""
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __add__(self, other: Ragged) -> Ragged:
        """These sequences and then the other ones."""
        joined = Ragged([])
        joined.offsets = np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]])
        joined.flat = np.concatenate([self.flat, other.flat])
        return joined

    @property
    def lengths(self) -> np.ndarray:
        """[sequences] int64: the number of tokens of each."""
        return np.diff(self.offsets)
