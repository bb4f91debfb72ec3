"""What a stage that makes data leaves behind: rows as parquet, what was dropped, and card.json (docs/run-folder.md)."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from temper.data.formats import plain, texts
from temper.data.sources import Source
from temper.data.split import Leaks, Splits
from temper.errors import DataError
from temper.types import Record, Row

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
    first = next((rows for rows in splits.values() if rows), [])
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
    sizes: dict[str, list[int]] = {}
    for record in records:
        for name, text in texts(record.row).items():
            sizes.setdefault(name, []).append(length(text))
    return {name: {"unit": unit} | _summary(sorted(values)) for name, values in sizes.items()}


def _summary(ordered: list[int]) -> dict[str, float]:
    nearest_rank = ordered[-(-95 * len(ordered) // 100) - 1]
    return {"min": ordered[0], "median": statistics.median(ordered), "p95": nearest_rank, "max": ordered[-1]}


def write_data(folder: Path, splits: Splits, dropped: Sequence[tuple[Record, str]]) -> None:
    """`data/` of a stage: a file a split that has rows, and what was dropped."""
    (folder / "data").mkdir(exist_ok=True)
    for name, records in splits.items():
        if records:
            write_rows(folder / "data" / f"{name}.parquet", records)
    write_dropped(folder / "data" / "dropped.parquet", dropped)


def write_rows(path: Path, records: Sequence[Record]) -> None:
    """Rows as parquet, with where each came from in the column `_where`.

    Raises:
        DataError: a column holds values of different kinds, or what parquet cannot hold.
    """
    names = list(dict.fromkeys(name for record in records for name in record.row))
    columns = [_column(name, [record.row.get(name) for record in records], records) for name in names]
    columns.append(pyarrow.array([record.where for record in records], pyarrow.string()))
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=[*names, WHERE]), path)
    except pyarrow.ArrowException as error:  # an object without keys ({}) is held in memory and cannot be written
        raise DataError(f"the rows cannot be written as parquet ({error})", where=str(path)) from None


def _column(name: str, values: list[Any], records: Sequence[Record]) -> pyarrow.Array:
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, UnicodeError) as error:  # UnicodeError: half a surrogate pair
        kinds: dict[str, str] = {}
        for record in records:
            kinds.setdefault(type(record.row.get(name)).__name__, record.where)
        seen = ", ".join(f"{kind} ({where})" for kind, where in kinds.items())
        raise DataError(
            f"the column «{name}» cannot be written as one kind of value ({error})",
            where=f"kinds: {seen}",
            do="make the column text by a template, or leave it out",
        ) from None


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
    table = pyarrow.table(
        {
            "where": pyarrow.array([record.where for record, _ in dropped], pyarrow.string()),
            "reason": pyarrow.array([reason for _, reason in dropped], pyarrow.string()),
            "row": pyarrow.array([_json(record.row) for record, _ in dropped], pyarrow.string()),
        }
    )
    pyarrow.parquet.write_table(table, path)


def _json(row: Row) -> str:
    return json.dumps(plain(row), ensure_ascii=False).encode("utf-8", "backslashreplace").decode()  # half surrogates
