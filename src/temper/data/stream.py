"""Rows of parquet files that are read while they are trained on: sets larger than memory, and than the disk.

Row groups come in a new order every epoch, and rows are shuffled within blocks of `window` of that order. Both are functions of
the seed, the epoch and the block, so a run goes on in the middle without what came before.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, Field

from temper.data import hub
from temper.data.files import kind_of
from temper.data.sources import MINI, files
from temper.data.templates import columns
from temper.errors import DataError, RecipeError
from temper.types import Record

BATCH = 1024  # rows made at once
BUFFER = 2**20  # bytes of a column that are read at once; without it a row group's column is in memory whole
TAIL = 8  # bytes at the end of a parquet file: the length of what describes it, and its mark
Opener = Callable[[], IO[bytes]]


class Stream(BaseModel):
    """How a stream is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    window: int = Field(
        default=10_000,
        ge=1,
        description="rows that are shuffled among one another; before that row groups come in a new order every epoch",
    )


@dataclass(frozen=True)
class Group:
    """A row group: which of its file, the number of its first row in the whole set and in the file, and how many rows."""

    file: int
    index: int
    first: int
    within: int
    rows: int


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of a row group."""

    group: Group
    start: int
    stop: int


class Shards:
    """The row groups of parquet files, in order.

    Args:
        sources: each file's name and what opens it.
        columns: names of those that are read; None: all.
        noted: what `note` gave of the same files, so that none need be opened to see what is in it.

    Raises:
        DataError: a file is none of parquet, or lacks a column.
    """

    def __init__(self, sources: Sequence[tuple[str, Opener]], columns: Sequence[str] | None = None, noted: dict[str, Any] | None = None) -> None:  # fmt: skip
        self.sources, self.columns = sources, None if columns is None else list(columns)
        self.groups: list[Group] = []
        # Where the last reading ended: group, place, a batch that was read in part, and those that follow.
        self._at: tuple[Group, int, Any, Iterator[Any]] | None = None
        if noted is None:
            self._look()
        else:
            self.groups = [Group(*numbers) for numbers in noted["groups"]]
            self.rows, self.sha256 = noted["rows"], noted["sha256"]

    @property
    def note(self) -> dict[str, Any]:
        """What is in the files, for JSON."""
        return {"sha256": self.sha256, "rows": self.rows, "groups": [list(vars(g).values()) for g in self.groups]}

    def _look(self) -> None:
        digest, first = hashlib.sha256(), 0
        for k, (name, opened) in enumerate(self.sources):
            with opened() as file:
                digest.update(f"{name}\0{_size(file)}\0".encode() + _footer(file, name))
                with _told(name):
                    described: Any = pyarrow.parquet.ParquetFile(file)
                meta, within = described.metadata, 0
                self._check_columns(name, described.schema_arrow.names)
                for index in range(meta.num_row_groups):
                    rows = meta.row_group(index).num_rows
                    if rows:
                        self.groups.append(Group(k, index, first, within, rows))
                    first, within = first + rows, within + rows
        self.rows, self.sha256 = first, digest.hexdigest()

    def _check_columns(self, name: str, known: list[str]) -> None:
        lacking = [c for c in self.columns or () if c not in known]
        if lacking:
            raise DataError(f"there is no column «{lacking[0]}»", where=name, do=f"it has: {', '.join(known)}")

    def order(self, seed: int, epoch: int) -> list[Group]:
        """The row groups as an epoch takes them."""
        drawn = np.random.default_rng([seed, epoch]).permutation(len(self.groups))
        return [self.groups[k] for k in drawn.tolist()]

    def spans(self, seed: int, epoch: int, start: int, stop: int) -> list[Span]:
        """Where the rows [start, stop) of an epoch lie."""
        out, before = [], 0
        for group in self.order(seed, epoch):
            a, b = max(start - before, 0), min(stop - before, group.rows)
            if a < b:
                out.append(Span(group, a, b))
            before += group.rows
        return out

    def read(self, spans: Sequence[Span]) -> Iterator[tuple[int, Record]]:
        """Rows with their numbers in the whole set. Going on where the last call ended costs nothing; elsewhere in a row group
        what stands before is read and passed over."""
        for span in spans:
            yield from self._within(span)

    def _within(self, span: Span) -> Iterator[tuple[int, Record]]:
        group, name = span.group, self.sources[span.group.file][0]
        place, batch, batches = 0, None, self._batches(group)
        if self._at is not None and self._at[0] == group and self._at[1] <= span.start:
            _, place, batch, batches = self._at
        self._at = None
        while place < span.stop:
            if batch is None:
                batch = next(batches)
            a, b = max(span.start - place, 0), min(span.stop - place, batch.num_rows)
            if a < b:
                for k, row in enumerate(batch.slice(a, b - a).to_pylist(), place + a):
                    row.pop("_where", None)  # written by an earlier run: see card.write_rows
                    yield group.first + k, Record(row, f"{name}:{group.within + k + 1}")
            if b < batch.num_rows:  # the rest is the next span's
                break
            place, batch = place + batch.num_rows, None
        self._at = (group, place, batch, batches)

    def _batches(self, group: Group) -> Iterator[Any]:
        """Of one row group, a piece of each column in memory at a time."""
        name, opened = self.sources[group.file]
        with opened() as file, _told(name):
            read: Any = pyarrow.parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
            yield from read.iter_batches(BATCH, row_groups=[group.index], columns=self.columns, use_threads=False)


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a parquet file, a damaged one, or out of reach ({' '.join(str(error).split())[:200]})", where=name) from None


def _size(file: IO[bytes]) -> int:
    return file.seek(0, 2)


def _footer(file: IO[bytes], name: str) -> bytes:
    """What describes a parquet file: places, sizes and extremes of all its columns, so that changed rows change it too."""
    size = _size(file)
    file.seek(max(0, size - TAIL))
    tail = file.read(TAIL)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length > size:
        raise DataError("not a parquet file, or a damaged one", where=name)
    file.seek(size - TAIL - length)
    return file.read(length)


def shards(source: str, *, config: str | None, split: str | None, revision: str | None, base: Path, columns: Sequence[str] | None, noted: dict[str, Any] | None = None) -> tuple[Shards, str | None]:  # fmt: skip
    """The parquet files of a source, and the commit of a hub data set.

    Args:
        source, config, split, revision, base: as for `sources.read`.
        columns: see `Shards`.
        noted: see `Shards`; of a hub data set at a commit. What local files hold is looked at anew.

    Raises:
        RecipeError: the source is not of parquet.
        DataError: it cannot be read.
    """
    if source.startswith(MINI):
        raise RecipeError(f"«{source}» is made in memory: there is nothing to stream", do="take stream out")
    found = files(source, base, split)
    if found is None:
        named, commit = hub.parquet(source, config=config, split=split, revision=revision)
        return Shards(named, columns, noted), commit
    if other := next((path for path in found if kind_of(path) != "parquet" or path.suffix == ".gz"), None):
        raise RecipeError(
            f"a stream reads parquet, and {other.name} is none", do="take stream out, or write the rows as parquet"
        )
    folder = found[0].parent
    while not all(path.is_relative_to(folder) for path in found):
        folder = folder.parent
    return Shards([(path.relative_to(folder).as_posix(), _opener(path)) for path in found], columns), None


def _opener(path: Path) -> Opener:
    return lambda: path.open("rb")


def columns_of(templates: dict[str, Any], keep: Sequence[str]) -> list[str] | None:
    """The columns that templates and `keep` ask for; None: without templates rows are taken as they are.

    >>> columns_of({"prompt": "{title|first 3 words}:", "messages": [{"role": "user", "content": "{text}"}]}, ["id"])
    ['text', 'title', 'id']
    """
    if not templates:
        return None
    found = set().union(*(columns(template, key) for key, template in templates.items()))
    return [*sorted(found), *(name for name in keep if name not in found)]
