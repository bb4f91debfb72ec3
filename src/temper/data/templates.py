"""Templates: text with a row's columns in it.

"Summarise:\n{text}"       {column} is replaced by the row's value, {{ and }} are braces
"{text|first 6 words}"     the beginning of a text; {text|after 6 words} is the rest
"{mark|at least 3.5}"      yes or no
"{parsed|last turn}"       what is said last in a dialogue of any form that `dialogues` reads; also first turn
"{summary}"                a template that is one column alone keeps the value's type
[{role: user, content: "{question}"}, {role: assistant, content: "{answer}"}]
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from temper.data import dialogues
from temper.errors import DataError, RecipeError, nearest
from temper.types import Record

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


_WORDS = re.compile(r"(.+?)\s*\|\s*(first|after) (\d+) words?")
FILTERS = "first N words, after N words, at least X, first turn, last turn"
_TURN = re.compile(r"(.+?)\s*\|\s*(first|last) turn")
_LEAST = re.compile(r"(.+?)\s*\|\s*at least (-?\d+(?:\.\d+)?)")


class Column(str):
    """A column's name inside a parsed template, apart from literal text; and what of its value is meant."""

    part: tuple[str, int] | None = None  # (first or after, how many words)
    least: float | None = None  # whether a number reaches it
    turn: str | None = None  # first or last, of a dialogue

    def of(self, value: Any, where: str = "") -> Any:
        """What a template takes of a row's value.

        Raises:
            DataError: words of what is no text, a comparison of what is no number.

        >>> [Column.read(f"review | {part} 2 words").of("One  of the\\nbest") for part in ("first", "after")]
        ['One  of', 'the\\nbest']
        """
        if self.least is not None:
            return "yes" if number(value, self, where) >= self.least else "no"
        if self.turn is not None:
            return self._said(value, where)
        if self.part is None or value is None:
            return value
        side, n = self.part
        if not isinstance(value, str):
            raise DataError(f"only a text has words, and column «{self}» holds {value!r:.60}", where=where)
        words = list(itertools.islice(re.finditer(r"\S+", value), n + 1))  # no more of a long text is looked at
        if side == "first":
            return value[words[0].start() : words[:n][-1].end()] if words and n else ""
        return value[words[n].start() :] if n < len(words) else ""

    def _said(self, value: Any, where: str) -> str:
        found = dialogues.messages(value, where)
        if not isinstance(found, list) or not found or not isinstance(found[0], dict) or "content" not in found[-1]:
            raise DataError(f"only a dialogue has turns, and column «{self}» holds {value!r:.60}", where=where)
        return str(found[0 if self.turn == "first" else -1]["content"])

    @classmethod
    def read(cls, text: str) -> Column:
        """`name`, `name|first N words` or `name|after N words`; words are what white space parts. `name|at least X`,
        `name|first turn`, `name|last turn`."""
        if (match := _TURN.fullmatch(text)) is not None:
            column = cls(match[1])
            column.turn = match[2]
            return column
        if (match := _LEAST.fullmatch(text)) is not None:
            column = cls(match[1])
            column.least = float(match[2])
            return column
        if (match := _WORDS.fullmatch(text)) is None:
            return cls(text)
        column = cls(match[1])
        column.part = (match[2], int(match[3]))
        return column


def number(value: Any, column: str, where: str = "") -> float:
    """A column's value as a number, which in CSV files is a text.

    Raises:
        DataError: it is none.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if found != found:
        raise DataError(f"column «{column}» holds {value!r:.60}, which is no number", where=where, do="fill it in, or take such rows out of the source")  # fmt: skip
    return found


Parsed = list[str]  # literal text and Columns, in order


def parse(template: str, *, where: str = "") -> Parsed:
    """A template cut into literal text and columns.

    >>> parse("{{{text}}}: {n}")
    ['{', 'text', '}: ', 'n']

    Raises:
        RecipeError: a brace that opens or closes nothing.
    """
    pieces: Parsed = [""]
    position = 0

    def literal(text: str) -> None:
        if isinstance(pieces[-1], Column):
            pieces.append("")
        pieces[-1] += text

    for match in _PIECE.finditer(template):
        literal(template[position : match.start()])
        position = match.end()
        if match[1] is not None:
            pieces.append(Column.read(match[1]))
        elif match[0] in ("{{", "}}"):
            literal(match[0][0])
        else:
            raise RecipeError(
                f"a lone «{match[0]}» at character {match.start() + 1} of the template {template!r}",
                where=where,
                do="write {column} for a column, {{ and }} for braces",
            )
    literal(template[position:])
    return [piece for piece in pieces if piece]


def parsed(template: Any, where: str) -> Any:
    """Strings inside lists and dictionaries parsed in place; a parsed one becomes a tuple."""
    if isinstance(template, str):
        return tuple(parse(template, where=where))
    if isinstance(template, list):
        return [parsed(part, f"{where}[{i}]") for i, part in enumerate(template)]
    if isinstance(template, dict):
        return {key: parsed(part, f"{where}.{key}") for key, part in template.items()}
    return template


def is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # parquet made by pandas writes NaN


def _column(record: Record, name: str, key: str) -> Any:
    if name not in record.row:
        have = ", ".join(record.row)
        raise DataError(
            f"template «{key}» asks for the column «{name}»; this row has: {have}",
            where=record.where,
            do=nearest(name, record.row) if "|" not in name else f"after | may stand: {FILTERS}",
        )
    return record.row[name]


def filled(template: Any, record: Record, key: str) -> Any:
    """A parsed template with one row's values in it.

    Raises:
        DataError: the row has no such column, or a list stands inside a text.
    """
    if isinstance(template, list):
        return [filled(part, record, key) for part in template]
    if isinstance(template, dict):
        return {name: filled(part, record, key) for name, part in template.items()}
    if not isinstance(template, tuple):
        return template
    if len(template) == 1 and isinstance(template[0], Column):
        value = template[0].of(_column(record, template[0], key), record.where)
        return "" if is_null(value) and key != "label" else value
    out = []
    for piece in template:
        value = piece.of(_column(record, piece, key), record.where) if isinstance(piece, Column) else piece
        if isinstance(value, list | dict):
            raise DataError(
                f"column «{piece}» holds a {type(value).__name__}, which cannot stand inside the text of «{key}»",
                where=record.where,
                do=f'only the template "{{{piece}}}" alone can pass it on',
            )
        out.append("" if is_null(value) else str(value))
    return "".join(out)


def fill(records: Sequence[Record], template: Any, name: str) -> list[Any]:
    """One template filled in for each record; `name` is what errors call it.

    >>> fill([Record({"n": 2}, "file:1")], "{n} books", "question")
    ['2 books']

    Raises:
        RecipeError: a lone brace.
        DataError: a row without a column.
    """
    pieces = parsed(template, name)
    return [filled(pieces, record, name) for record in records]


def columns(template: Any, name: str) -> set[str]:
    """The columns that a template asks for.

    >>> sorted(columns([{"role": "user", "content": "{a} and {b}"}], "messages"))
    ['a', 'b']
    """
    if isinstance(template, str):
        return {str(piece) for piece in parse(template, where=name) if isinstance(piece, Column)}
    parts = template.values() if isinstance(template, dict) else template if isinstance(template, list) else []
    return {column for part in parts for column in columns(part, name)}
