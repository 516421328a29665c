"""Micro-batches of coming steps, made in one thread while the device works on the current step.

A micro-batch depends on its records alone, so it is the same whoever makes it and when. The caller decides
which records a step learns from. An error is raised where the micro-batch is asked for, as if it were made
there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ibdistill.data.batches import Batch


class Prefetch:
    """Makes micro-batches ahead, in the order in which they are announced."""

    def __init__(self, *, pins: bool) -> None:
        """`pins`: whether the micro-batches are put into pinned memory, from which a GPU copies."""
        self._pins = pins
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._begun: dict[bytes, Future[Batch]] = {}

    def begin(self, coming: Sequence[np.ndarray], make: Callable[[np.ndarray], Batch]) -> None:
        """Begin to make the micro-batches of these records that are not begun yet. Those of other records are
        dropped."""
        begun, self._begun = self._begun, {}
        for indices in coming:
            key = _key(indices)
            self._begun[key] = begun.pop(key, None) or self._thread.submit(self._made, make, indices)
        _cancel(begun)

    def get(self, indices: np.ndarray) -> Batch | None:
        """The micro-batch of these records, once it is made; None if nobody has begun it.

        Raises what making it has raised.
        """
        future = self._begun.get(_key(indices))
        return None if future is None else future.result()

    def forget(self) -> None:
        """Throw away what is made, because the records have changed."""
        begun, self._begun = self._begun, {}
        _cancel(begun)

    def _made(self, make: Callable[[np.ndarray], Batch], indices: np.ndarray) -> Batch:
        batch = make(indices)
        return batch.pinned() if self._pins else batch


def _key(indices: np.ndarray) -> bytes:
    return np.asarray(indices).tobytes()


def _cancel(begun: dict[bytes, Future[Batch]]) -> None:
    for future in begun.values():
        future.cancel()
