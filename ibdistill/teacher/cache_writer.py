"""Answers on their way into the cache, beside the step that asked for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from ibdistill.runtime import hardware
from ibdistill.teacher.cache import AnswerCache
from ibdistill.teacher.cache_shard import Entry

logger = logging.getLogger("ibdistill")

Cut = Callable[[dict[str, Tensor]], list[Entry]]
"""Cuts the packed tensors of a micro-batch into one entry per record."""


class _Arriving(NamedTuple):
    """A micro-batch's answer that is being copied to the host."""

    packed: hardware.ToHost
    keys: Sequence[bytes | None]
    cut: Cut


class CacheWriter:
    """Puts answers into the cache once they are on the host. A full disk ends that, not the run."""

    def __init__(self, cache: AnswerCache) -> None:
        self._cache = cache
        self._arriving: _Arriving | None = None
        self._writes = True

    def put(self, packed: dict[str, Tensor], keys: Sequence[bytes | None], cut: Cut) -> None:
        """Begin to copy an answer to the host; the next call puts it into the cache.

        `keys`: each record's, or None where the cache has an entry already.
        """
        self.take_arrived()
        if self._writes:
            self._arriving = _Arriving(hardware.ToHost(packed), keys, cut)
            if self._arriving.packed.is_there:
                self.take_arrived()

    def take_arrived(self) -> None:
        """Put the newest answer into the cache. It has arrived on the host by now, or is waited for."""
        arriving, self._arriving = self._arriving, None
        if arriving is None:
            return
        entries = arriving.cut(arriving.packed.wait())
        with self._ends_with_the_disk():
            for key, entry in zip(arriving.keys, entries, strict=True):
                if key is not None:
                    self._cache.put(key, entry)

    def flush(self) -> None:
        """Write out what is not on disk yet."""
        if self._writes:
            self.take_arrived()
            with self._ends_with_the_disk():
                self._cache.flush()

    @contextmanager
    def _ends_with_the_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writes = False
            logger.error("%s. The run goes on and asks the teacher for what is not there", error)
