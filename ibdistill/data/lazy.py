"""Sequences whose items are made each time they are asked for, so that none has to be held."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar, overload

T = TypeVar("T")


class Lazy(Sequence[T]):
    """A sequence that makes its items; a slice of it is a list."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        places = range(len(self))[index]
        return [self._item(i) for i in places] if isinstance(places, range) else self._item(places)

    def __iter__(self) -> Iterator[T]:
        return map(self._item, range(len(self)))

    @abstractmethod
    def _item(self, index: int) -> T:
        """The item at a place from 0 on."""


class Mapped(Lazy[T]):
    """What a function makes of each item of another sequence."""

    def __init__(self, function: Callable[[Any], T], items: Sequence[Any]) -> None:
        self._function, self._items = function, items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return map(self._function, self._items)

    def _item(self, index: int) -> T:
        return self._function(self._items[index])


def taken(items: Sequence[T], indices: Sequence[int]) -> Sequence[T]:
    """The items with these indices alone."""
    return Mapped(items.__getitem__, indices)


def chained(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """The items of these parts, one part after the other."""
    firsts = [0, *accumulate(map(len, parts))]

    def item(index: int) -> T:
        part = bisect_right(firsts, index, hi=len(parts)) - 1
        return parts[part][index - firsts[part]]

    return parts[0] if len(parts) == 1 else Mapped(item, range(firsts[-1]))
