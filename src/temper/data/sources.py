"""One name → its rows: local files and folders, mini sets made by code, data sets of the hub.

    train.jsonl  data/*.csv.gz  ./folder     local: csv, tsv, json, jsonl, ndjson, parquet, txt (one row a paragraph)
    mini:NAME                                made on the spot by temper.data.mini
    owner/name                               the Hugging Face hub; an existing local path of that name comes first

A local file may be gzipped (.gz); a folder is all its data files, which must be of one kind.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from temper.data import hub, mini
from temper.data.files import KINDS, kind_of, read_file
from temper.data.spool import Spool, chosen, mapped
from temper.errors import DataError, RecipeError, nearest
from temper.types import Record

MINI = "mini:"
_SPLIT_WORDS = ("train", "validation", "valid", "val", "dev", "test")
_NOT_DATA = re.compile(r"(readme|licen[sc]e|notice|changelog)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """The rows of a source, and what identifies them."""

    name: str  # as the recipe wrote it
    records: Sequence[Record]
    sha256: str | None = None  # of the content of local files (mini: of name and version); None for the hub
    revision: str | None = None  # of the hub: the commit


def read(
    source: str,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    columns: Sequence[str] | None = None,
    encoding: str = "utf-8",
    base: Path,
    rows: int | None = None,
    seed: int = 0,
    folder: Path | None = None,
) -> Source:
    """All rows of a source, each with where it came from (`train.jsonl:17`, the line it starts at).

    Args:
        source: see the top of this file. Relative paths are looked up in `base`, then in the current folder.
        config, revision: of a hub data set.
        split: of a hub data set or a mini set; of a folder or a pattern the files named after it (`test.csv`,
            `test-00.csv`).
        columns: keep only these.
        encoding: of local text files; a byte order mark is dropped.
        base: the recipe's folder.
        rows: mini: how many to make; otherwise at most so many are kept, drawn by `seed`, in their order.
        seed: of that draw, and of mini sets.
        folder: where rows lie while they are used, in a file without a name; None: the system's place for such.

    Raises:
        RecipeError: an option that this kind of source does not have; an unknown mini set.
        DataError: whatever keeps the rows from being read; says in which file and line.
    """
    local = not source.startswith(MINI) and _find(source, base) is not None
    for key, value in (("config", config), ("revision", revision)):
        if value is not None and (local or source.startswith(MINI)):
            raise RecipeError(f"«{source}» is not a hub data set: it has no {key}", do=f"take {key} out")
    sha256, commit = None, None
    if source.startswith(MINI):
        name = _mini_name(source)
        made = mini.load(name, split=split, rows=rows, seed=seed)
        records: Sequence[Record] = [Record(row, f"{source}#{i}") for i, row in enumerate(made)]
        sha256 = fingerprint(source, base)
    elif local:
        paths = _files(source, base, split)
        sha256 = _content(paths)
        every = Spool(_read_files(paths, encoding), folder)
        records = every if rows is None else chosen(every, _draw(len(every), rows, seed))
    else:
        data, commit = hub.load(source, config=config, split=split, revision=revision)
        indices = _draw(len(data), rows, seed)
        read_rows = zip(indices.tolist(), data.select(indices), strict=True)
        records = Spool((Record(dict(row), f"{source}#{i}") for i, row in read_rows), folder)
    if not records:
        raise DataError(f"«{source}» holds no rows")
    return Source(source, records if columns is None else _only(records, columns), sha256, commit)


def fingerprint(source: str, base: Path, *, split: str | None = None) -> str | None:
    """SHA-256 (hex) of what a source holds, without parsing it; None for a hub data set.

    For a mini set it is a constant of its name and the generators' version.
    """
    if source.startswith(MINI):
        return hashlib.sha256(f"{MINI}{_mini_name(source)}@{mini.VERSION}".encode()).hexdigest()
    return None if _find(source, base) is None else _content(_files(source, base, split))


def files(source: str, base: Path, split: str | None) -> list[Path] | None:
    """The data files of a local source; None for a hub data set.

    Raises:
        RecipeError, DataError: as for `read`.
    """
    return None if _find(source, base) is None else _files(source, base, split)


def _mini_name(source: str) -> str:
    name = source.removeprefix(MINI)
    if name not in mini.NAMES:
        raise RecipeError(f"there is no mini set «{name}»", do=nearest(name, mini.NAMES))
    return name


def _find(source: str, base: Path) -> Path | None:
    """The local path that `source` means, or None for a hub id.

    A pattern gives its folder's path with the pattern in it. What looks like a path and is none is an error.
    """
    path = Path(source).expanduser()
    if "://" in source:
        raise DataError(f"«{source}» is an address", do="download the file, or name a hub data set as owner/name")
    places = [path] if path.is_absolute() else [base / path, Path.cwd() / path]
    for place in places:
        if place.exists():
            return place
    if _is_pattern(source):
        for place in places:
            if _matches(place):
                return place
        raise _no_match(places[0])
    if source.startswith(("./", "../", "/", "~")) or kind_of(source) or source.count("/") > 1:
        raise _missing(source, places)
    return None


def _is_pattern(source: str) -> bool:
    return any(mark in source for mark in "*?[")


def _matches(pattern: Path) -> list[Path]:
    found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))
    return [path for path in found if path.is_file()]


def _files(source: str, base: Path, split: str | None) -> list[Path]:
    """The data files of a local source."""
    found = _find(source, base)
    assert found is not None
    if found.is_file():
        if split is not None:
            raise RecipeError(f"«{source}» is one file: it has no split «{split}»", do="take split out")
        return [found]
    paths = _data_files(found) if found.is_dir() else _matches(found)
    if not paths:
        raise DataError(f"the folder {found} holds no data files", do=f"{KINDS}, or .gz of them")
    if split is not None:
        chosen = [path for path in paths if _split_of(path) == split]
        if not chosen:
            names = ", ".join(path.name for path in paths[:10])
            raise DataError(f"no file of «{source}» is named after the split «{split}»", where=f"files: {names}")
        return chosen
    splits = sorted({word for path in paths if (word := _split_of(path)) in _SPLIT_WORDS})
    if found.is_dir() and len(splits) > 1:
        raise DataError(
            f"the folder {found} holds the splits {', '.join(splits)}: read together, test rows would be trained on",
            do=f"set split: {splits[0]}, or name the files by a pattern",
        )
    return paths


def _split_of(path: Path) -> str:
    return re.split(r"[-_.]", path.name, maxsplit=1)[0]


def _data_files(folder: Path) -> list[Path]:
    """All data files of a folder, which must be of one kind."""
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    paths = [path for path in paths if kind_of(path) and not _NOT_DATA.match(path.name)]
    kinds = sorted({kind for path in paths if (kind := kind_of(path))})
    if len(kinds) > 1:
        raise DataError(
            f"the folder {folder} holds files of several kinds: {', '.join(kinds)}",
            do=f"name those that are meant by a pattern, such as {folder.name}/*.{kinds[0]}",
        )
    return paths


def _read_files(paths: list[Path], encoding: str) -> Iterator[Record]:
    folder = paths[0].parent
    while not all(path.is_relative_to(folder) for path in paths):
        folder = folder.parent
    for path in paths:
        name = path.relative_to(folder).as_posix()
        for row, line in read_file(path, encoding):
            yield Record(row, f"{name}:{line}")


def _content(paths: list[Path]) -> str:
    """SHA-256 of one file's bytes; of several: of their hashes in order."""
    hashes: list[str] = []
    for path in paths:
        sha = hashlib.sha256()
        with path.open("rb") as file:
            for block in iter(functools.partial(file.read, 2**20), b""):
                sha.update(block)
        hashes.append(sha.hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _draw(n: int, rows: int | None, seed: int) -> np.ndarray:
    """Numbers below n, int64, ascending."""
    if rows is None or rows >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).permutation(n)[:rows])


def _only(records: Sequence[Record], columns: Sequence[str]) -> Sequence[Record]:
    known = {name for record in records for name in record.row}
    for name in columns:
        if name not in known:
            raise DataError(f"there is no column «{name}»", where=records[0].where, do=nearest(name, known))
    return mapped(records, lambda r: Record({name: r.row[name] for name in columns if name in r.row}, r.where))


def _no_match(pattern: Path) -> DataError:
    folder = pattern.parent
    while _is_pattern(str(folder)):
        folder = folder.parent
    if not folder.is_dir():
        return _missing(str(pattern), [pattern])
    near = sorted(path.name for path in folder.iterdir() if kind_of(path)) or ["no data files"]
    return DataError(
        f"no file matches {pattern.relative_to(folder)}", where=str(folder), do=f"there are: {', '.join(near[:8])}"
    )


def _missing(source: str, places: list[Path]) -> DataError:
    """Names the deepest folder of the path that exists, and what in it is nearest to the next part of the path."""
    place = places[0]
    while not place.parent.is_dir():
        place = place.parent
    names = [path.name for path in sorted(place.parent.iterdir()) if not path.name.startswith(".")][:50]
    return DataError(
        f"there is no file {source}",
        where=f"looked in {place.parent}" + (f", and from {Path.cwd()}" if len(places) > 1 else ""),
        do=nearest(place.name, names) if names else "that folder is empty",
    )
