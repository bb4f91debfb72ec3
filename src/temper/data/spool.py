"""Rows on disk: a million of them take the memory of a block, and may be gone through again and again."""

from __future__ import annotations

import marshal
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import compress, islice
from pathlib import Path
from typing import IO, Any, TypeVar, overload

import numpy as np

from temper.types import Record

T = TypeVar("T")
BLOCK = 2**20  # bytes read at once


class View(Sequence[T]):
    """A sequence whose items are made anew each time it is gone through.

    Args:
        n: how many there are.
        made: begins an iteration.
    """

    def __init__(self, n: int, made: Callable[[], Iterator[T]]) -> None:
        self._n, self._made = n, made

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[T]:
        return self._made()

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            first, last, step = place.indices(self._n)
            if step < 1:
                raise ValueError("backwards")
            return list(islice(self._made(), first, last, step))
        index = range(self._n)[place]  # counts from the end too, and raises IndexError
        return next(islice(self._made(), index, None))


def unnamed(owner: object, folder: Path | None = None) -> IO[bytes]:
    """A file without a name, open as long as its owner lives."""
    file = tempfile.TemporaryFile(dir=folder, buffering=2**20)  # noqa: SIM115
    weakref.finalize(owner, file.close)
    return file


class Spool(View[Record]):
    """Records in a file without a name, gone with the process; in memory is where each begins, 8 bytes.

    What marshal cannot write, dates and decimals, stays in memory.

    Args:
        records: gone through once.
        folder: where the file lies; None: the system's place for such files.
    """

    def __init__(self, records: Iterable[Record], folder: Path | None = None) -> None:
        self._file = unnamed(self, folder)
        self._ends, self._odd, end = array("Q"), dict[int, Record](), 0
        for k, record in enumerate(records):
            try:
                end += self._file.write(marshal.dumps((record.row, record.where)))
            except ValueError:
                self._odd[k] = record
            self._ends.append(end)
        self._file.flush()
        super().__init__(len(self._ends), lambda: iter(()))

    def __iter__(self) -> Iterator[Record]:
        return self.taken(range(len(self)))

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...
    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        chosen = range(len(self))[place]
        return list(self.taken(chosen)) if isinstance(chosen, range) else next(self.taken([chosen]))

    def taken(self, places: Iterable[int]) -> Iterator[Record]:
        """The records at these places, read a block at a time where they ascend."""
        block, start = b"", 0
        for k in places:
            if k in self._odd:
                yield self._odd[k]
                continue
            first, last = self._ends[k - 1] if k else 0, self._ends[k]
            if first < start or last > start + len(block):
                block, start = _read(self._file.fileno(), max(last - first, BLOCK), first), first
            row, where = marshal.loads(memoryview(block)[first - start : last - start])
            yield Record(row, where)


def _read(file: int, most: int, place: int) -> bytes:
    """Up to so many bytes from a place on, fewer only at the file's end."""
    parts: list[bytes] = []
    while most > 0 and (part := os.pread(file, most, place)):
        parts.append(part)
        most, place = most - len(part), place + len(part)
    return b"".join(parts)


def chosen(items: Sequence[T], places: np.ndarray) -> Sequence[T]:
    """The items at ascending places: of a list a list, else a view."""
    if isinstance(items, list):
        return [items[k] for k in places.tolist()]
    if isinstance(items, Spool):
        return View[Any](len(places), lambda: items.taken(_counted(places)))
    mask = np.zeros(len(items), bool)
    mask[places] = True
    return View(len(places), lambda: compress(items, mask))


def at(items: Sequence[T], places: Iterable[int]) -> list[T]:
    """A few items, in the order asked for."""
    asked = list(places)
    if isinstance(items, list):
        return [items[k] for k in asked]
    found = dict(zip(ordered := sorted(set(asked)), chosen(items, np.array(ordered, int)), strict=True))
    return [found[k] for k in asked]


def mapped(items: Sequence[Any], function: Callable[[Any], T]) -> Sequence[T]:
    """A view of what a function makes of each."""
    return View(len(items), lambda: map(function, items))


def joined(*parts: Sequence[T]) -> Sequence[T]:
    """A view of several, one after another."""
    return View(sum(map(len, parts)), lambda: (item for part in parts for item in part))


def _counted(places: np.ndarray) -> Iterator[int]:
    """Python's own integers, without a list of all."""
    for first in range(0, len(places), 4096):
        yield from places[first : first + 4096].tolist()
