"""What a stage that makes data leaves behind: rows as parquet, what was dropped, and card.json (docs/run-folder.md)."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow
import pyarrow.parquet

from temper.data.formats import plain, texts
from temper.data.sources import Source
from temper.data.split import Leaks, Splits
from temper.errors import DataError
from temper.types import Record, Row

T = TypeVar("T")
BATCH = 4096  # rows written at once
WHERE = "_where"  # the column that keeps where a row came from


def card(
    source: Source,
    splits: Splits,
    dropped: Sequence[tuple[Record, str]],
    leaks: Leaks | None,
    *,
    cut: int = 0,
    length: Callable[[str], int] = len,
    unit: str = "characters",
    examples: int = 3,
) -> dict[str, Any]:
    """card.json of a data stage.

    Args:
        leaks: None: they were not looked for.
        cut: rows that were shortened.
        length: of one text, in `unit`.
        examples: so many first rows of train are shown.
    """
    first: Sequence[Record] = next((rows for rows in splits.values() if rows), [])
    return {
        "source": source.name,
        "sha256": source.sha256,
        "revision": source.revision,
        "rows_in": len(source.records),
        "rows_out": sum(len(rows) for rows in splits.values()),
        "splits": {name: len(rows) for name, rows in splits.items()},
        "dropped": dict(Counter(reason for _, reason in dropped).most_common()),
        "cut": cut,
        "lengths": {name: _lengths(rows, length, unit) for name, rows in splits.items() if rows},
        "leaks": {
            "exact": leaks.exact if leaks else 0,
            "near": leaks.near if leaks else 0,
            "checked": leaks is not None,
        },
        "examples": [{"where": record.where, "row": plain(record.row)} for record in first[:examples]],
    }


def _lengths(records: Sequence[Record], length: Callable[[str], int], unit: str) -> dict[str, Any]:
    sizes: dict[str, array[int]] = {}
    for record in records:
        for name, text in texts(record.row).items():
            sizes.setdefault(name, array("L")).append(length(text))
    return {name: {"unit": unit} | _summary(np.sort(np.array(values))) for name, values in sizes.items()}


def _summary(ordered: np.ndarray) -> dict[str, float]:
    nearest_rank = ordered[-(-95 * len(ordered) // 100) - 1]
    middle = float(np.median(ordered))
    median = int(middle) if len(ordered) % 2 else middle
    return {"min": int(ordered[0]), "median": median, "p95": int(nearest_rank), "max": int(ordered[-1])}


def write_data(folder: Path, splits: Splits, dropped: Sequence[tuple[Record, str]]) -> None:
    """`data/` of a stage: a file a split that has rows, and what was dropped."""
    (folder / "data").mkdir(exist_ok=True)
    for name, records in splits.items():
        if records:
            write_rows(folder / "data" / f"{name}.parquet", records)
    write_dropped(folder / "data" / "dropped.parquet", dropped)


def write_rows(path: Path, records: Sequence[Record]) -> None:
    """Rows as parquet, with where each came from in the column `_where`.

    They are gone through twice: what kind of value a column holds is known when all rows were seen.

    Raises:
        DataError: a column holds values of different kinds, or what parquet cannot hold.
    """
    schema = pyarrow.schema([*_kinds(records), pyarrow.field(WHERE, pyarrow.string())])
    try:
        with pyarrow.parquet.ParquetWriter(path, schema) as out:
            for some in batched(records):
                columns = [_column(f.name, [r.row.get(f.name) for r in some], records, f.type) for f in schema][:-1]
                columns.append(pyarrow.array([record.where for record in some], pyarrow.string()))
                out.write_table(pyarrow.Table.from_arrays(columns, schema=schema))
    except pyarrow.ArrowException as error:  # an object without keys ({}) is held in memory and cannot be written
        raise DataError(f"the rows cannot be written as parquet ({error})", where=str(path)) from None


def batched(items: Iterable[T]) -> Iterator[list[T]]:
    """So many at a time that what is made of them is hardly felt."""
    left = iter(items)
    while some := list(islice(left, BATCH)):
        yield some


def _kinds(records: Sequence[Record]) -> pyarrow.Schema:
    """The columns of all rows, each of a type that holds all its values."""
    found = pyarrow.schema([])
    for some in batched(records):
        names = dict.fromkeys(name for record in some for name in record.row)
        for name in names:
            values = [record.row.get(name) for record in some]
            found = _united(found, name, _column(name, values, records).type, records)
    return found


def _united(known: pyarrow.Schema, name: str, kind: pyarrow.DataType, records: Sequence[Record]) -> pyarrow.Schema:
    place = known.get_field_index(name)
    if place >= 0 and known.field(place).type == kind:
        return known
    try:
        return pyarrow.unify_schemas([known, pyarrow.schema([(name, kind)])], promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise _mixed(name, error, records) from None


def _column(
    name: str, values: list[Any], records: Sequence[Record], kind: pyarrow.DataType | None = None
) -> pyarrow.Array:
    try:
        return pyarrow.array(values, kind)
    except (pyarrow.ArrowException, OverflowError, UnicodeError) as error:  # UnicodeError: half a surrogate pair
        raise _mixed(name, error, records) from None


def _mixed(name: str, error: Exception, records: Sequence[Record]) -> DataError:
    kinds: dict[str, str] = {}
    for record in records:
        kinds.setdefault(type(record.row.get(name)).__name__, record.where)
    seen = ", ".join(f"{kind} ({where})" for kind, where in kinds.items())
    return DataError(
        f"the column «{name}» cannot be written as one kind of value ({error})",
        where=f"kinds: {seen}",
        do="make the column text by a template, or leave it out",
    )


def read_rows(path: Path) -> list[Record]:
    """What `write_rows` wrote.

    Inside lists and dictionaries a key without a value is left out: parquet gives every message the keys of all
    messages.
    """
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"rows cannot be read ({error})", where=str(path)) from None
    return [
        Record({name: _without_nulls(value) for name, value in row.items() if name != WHERE}, row[WHERE])
        for row in rows
    ]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return value


def write_dropped(path: Path, dropped: Sequence[tuple[Record, str]]) -> None:
    """Dropped rows as parquet: `where`, `reason`, `row` (JSON)."""
    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("where", "reason", "row")])
    with pyarrow.parquet.ParquetWriter(path, schema) as out:
        for some in batched(dropped):
            lines = [{"where": r.where, "reason": reason, "row": _json(r.row)} for r, reason in some]
            out.write_table(pyarrow.Table.from_pylist(lines, schema=schema))


def _json(row: Row) -> str:
    return json.dumps(plain(row), ensure_ascii=False).encode("utf-8", "backslashreplace").decode()  # half surrogates
