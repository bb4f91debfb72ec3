"""Reading one local file: bytes → text → rows with the line where each starts, a block at a time."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from temper.errors import DataError
from temper.types import Row

BATCH = 1024  # rows of a parquet file that are made at once
Rows = Iterator[tuple[Row, int]]  # rows and their lines (parquet: row numbers), from 1

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB refuses long documents


def kind_of(path: Path | str) -> str | None:
    """'csv', 'jsonl', …; None where the extension is not one of a data file.

    >>> kind_of("news/train.jsonl.gz")
    'jsonl'
    """
    name = str(path).lower().removesuffix(".gz")
    kind = name.rpartition(".")[2] if "." in name else ""
    kind = {"ndjson": "jsonl"}.get(kind, kind)
    return kind if kind in _READERS else None


def read_file(path: Path, encoding: str) -> Rows:
    """All rows of one file, with the line each starts at.

    `.csv` takes `;` or a tab as its delimiter where the header has no comma; `.txt` gives one row a paragraph
    (paragraphs are parted by blank lines) with the column `text`; `.json` is a list of objects or an object of which
    one key holds such a list; each may be gzipped (`.gz`).
    """
    kind = kind_of(path)
    if kind is None:
        raise DataError(f"{path.name} is of no kind that can be read", where=str(path), do=f"{KINDS}, or .gz of them")
    return _READERS[kind](path, encoding)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    if path.suffix.lower() != ".gz":
        with path.open("rb") as file:
            yield file
        return
    try:
        with gzip.open(path) as unpacked:
            yield unpacked  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"the gzip file is damaged ({error})", where=str(path)) from None


def _text(path: Path, encoding: str) -> str:
    with _opened(path) as file:
        return decode(file.read(), encoding, path)


def _lines(path: Path, encoding: str, newline: str) -> Iterator[str]:
    """Lines with their ends, a block of the file at a time.

    Args:
        newline: "\\n", or "" where a line may end otherwise; as for `open`.
    """
    with _opened(path) as file, contextlib.suppress(LookupError, UnicodeDecodeError):
        with io.TextIOWrapper(file, encoding, newline=newline) as text:
            first = next(text, None)
            if first is not None:
                yield first.removeprefix("\ufeff")
                yield from text
        return
    _text(path, encoding)  # says where
    raise AssertionError("what cannot be read by lines was read whole")


def decode(data: bytes, encoding: str, path: Path) -> str:
    """Text without its byte order mark; the error says which encodings would do, with a sample of each."""
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except LookupError:
        raise DataError(f"there is no encoding «{encoding}»", where=str(path), do="such as utf-8, cp1251") from None
    except UnicodeDecodeError as error:
        start = error.start
    line = data.count(b"\n", 0, start) + 1
    found = []
    for other in ("utf-8", "utf-16", "cp1251", "latin-1"):
        if other == "utf-16" and b"\0" not in data[:4096]:
            continue  # any even number of bytes is some UTF-16
        try:
            text = data.decode(other)
        except UnicodeDecodeError:
            continue
        from_here = max(len(data[:start].decode(other, "ignore")) - 10, 0)
        found.append(f"{other} ({text[from_here : from_here + 30]!r})")
    raise DataError(
        f"{path.name} is not {encoding}: byte {start} is {data[start]:#04x}",
        where=f"{path}:{line}",
        do=f"set encoding: to what reads right of {', '.join(found)}",
    )


def _csv(path: Path, encoding: str, delimiter: str = "") -> Rows:
    lines = _lines(path, encoding, "")
    header = next(lines, "")
    if not delimiter:
        delimiter = next((mark for mark in ",;\t" if mark in header), ",")
    reader = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"a row that cannot be read starts here ({error})",
                where=f"{path}:{line}",
                do='a quoted cell ends with " before the delimiter, and a " inside it is written ""',
            ) from None
        start, line = line, reader.line_num + 1
        if cells is None:
            return
        if not cells:
            continue  # a blank line
        if not names:
            names = [name.strip() or f"column_{i + 1}" for i, name in enumerate(cells)]
            if len(set(names)) < len(names):
                raise DataError(f"two columns have one name: {', '.join(names)}", where=f"{path}:{start}")
            continue
        if len(cells) != len(names):
            raise DataError(
                f"the row has {len(cells)} cells and the header {len(names)}",
                where=f"{path}:{start}",
                do="a cell that holds a delimiter, a quote or a newline stands in quotes",
            )
        yield dict(zip(names, cells, strict=True)), start


def _tsv(path: Path, encoding: str) -> Rows:
    return _csv(path, encoding, "\t")


def _object(value: Any, path: Path, line: int) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"a row must be a JSON object; this is {type(value).__name__}", where=f"{path}:{line}")
    return value


def _jsonl(path: Path, encoding: str) -> Rows:
    for line, part in enumerate(_lines(path, encoding, "\n"), 1):  # splitlines would cut at U+2028 inside a string
        if not part.strip():
            continue
        try:
            value = json.loads(part.removesuffix("\n"))  # or an error at its end would stand in the next line
        except json.JSONDecodeError as error:
            raise DataError(f"broken JSON: {error.msg} at column {error.colno}", where=f"{path}:{line}") from None
        yield _object(value, path, line), line


_SPACE = re.compile(r"[\s,:]*")  # what may stand between two JSON values; json.loads has checked that it does


def _json(path: Path, encoding: str) -> Rows:
    """The one format that is held in memory whole."""
    text = _text(path, encoding)
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{") and "\n" in text[: error.pos]:
            yield from _jsonl(path, encoding)  # JSON lines under another name
            return
        raise DataError(f"broken JSON: {error.msg} at column {error.colno}", where=f"{path}:{error.lineno}") from None
    position = text.index("[") if isinstance(whole, list) else _list_inside(text, whole, path)
    counted, line = 0, 1
    for value, start in _items(text, position + 1):
        line += text.count("\n", counted, start)
        counted = start
        yield _object(value, path, line), line


def _list_inside(text: str, whole: Any, path: Path) -> int:
    """Where in {"version": 1, "data": […]} the list begins."""
    lists = [name for name, value in whole.items() if isinstance(value, list)] if isinstance(whole, dict) else []
    if len(lists) != 1:
        raise DataError(
            f"{path.name} is neither a list of objects nor an object with one list",
            where=f"{path}: lists: {', '.join(lists) or 'none'}",
        )
    for (name, _), (_, start) in _pairs(text, text.index("{") + 1):
        if name == lists[0]:
            return start
    raise AssertionError("json.loads saw the key")


def _pairs(text: str, position: int) -> Iterator[tuple[tuple[Any, int], tuple[Any, int]]]:
    values = _items(text, position)
    return zip(values, values, strict=True)


def _items(text: str, position: int) -> Iterator[tuple[Any, int]]:
    """Values standing one after another from `position` to the closing bracket, each with its place."""
    decoder = json.JSONDecoder()
    while True:
        match = _SPACE.match(text, position)
        start = match.end() if match else position
        if text[start] in "]}":
            return
        value, position = decoder.raw_decode(text, start)
        yield value, start


def _paragraphs(path: Path, encoding: str) -> Rows:
    lines: list[str] = []
    for number, line in enumerate(itertools.chain(_lines(path, encoding, "\n"), [""]), 1):
        line = line.removesuffix("\n").removesuffix("\r")
        if line.strip():
            lines.append(line)
        elif lines:
            yield {"text": "\n".join(lines)}, number - len(lines)
            lines = []


def _parquet(path: Path, encoding: str) -> Rows:
    del encoding
    numbers = itertools.count(1)
    try:
        with _opened(path) as file:
            source = io.BytesIO(file.read()) if path.suffix.lower() == ".gz" else file
            for batch in pyarrow.parquet.ParquetFile(source).iter_batches(BATCH):
                for row, number in zip(batch.to_pylist(), numbers, strict=False):
                    row.pop("_where", None)  # written by an earlier run: see card.write_rows
                    yield row, number
    except pyarrow.ArrowException as error:
        raise DataError(f"not a parquet file, or a damaged one ({error})", where=str(path)) from None


_READERS: dict[str, Callable[[Path, str], Rows]] = {
    "csv": _csv,
    "tsv": _tsv,
    "jsonl": _jsonl,
    "json": _json,
    "txt": _paragraphs,
    "parquet": _parquet,
}
KINDS = ", ".join(sorted(_READERS))
