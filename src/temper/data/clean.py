"""Dropping rows, each with its reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from temper.data import dialogues
from temper.data.digests import Digests
from temper.data.formats import joined_text, key_of, prompt_of, text_of, texts
from temper.data.near import near_duplicates
from temper.data.spool import View, at, chosen, joined, mapped
from temper.data.templates import number
from temper.errors import DataError, nearest
from temper.types import Record, Row

NOT_BEST = "not among the best"  # how the reason of `best` begins
TOO_LONG = "too long"  # the reason of `longer_than`, as it is counted


def not_blank(value: list[str]) -> list[str]:
    """Strings to look for, none of them empty."""
    if "" in value:
        raise ValueError("an empty string is contained in every row")
    return value


def compiles(value: list[str]) -> list[str]:
    """Regular expressions that are some."""
    for i, pattern in enumerate(value):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"matches[{i}] = {pattern!r} is not a regular expression: {error}") from None
    return value


class Drop(BaseModel):
    """Which rows are dropped. Lengths are in tokens where the stage has a tokenizer, otherwise in characters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    empty: bool = Field(default=True, description="drop rows in which a prompt, an answer or a text is blank")
    longer_than: int | None = Field(
        default=None, ge=1, description="drop rows longer than this, prompt and answer together"
    )
    shorter_than: int | None = Field(
        default=None, ge=1, description="drop rows shorter than this, prompt and answer together"
    )
    duplicates: Literal["exact", "near", "off"] = Field(
        default="exact",
        description="drop rows that repeat an earlier one: exact (but for case and spaces), near (also those that "
        "share most word 5-grams with it) or off",
    )
    contains: list[str] = Field(default=[], description="drop rows in which a text holds one of these, as written")
    matches: list[str] = Field(
        default=[], description="drop rows in which a text matches one of these regular expressions"
    )
    ratio: tuple[float, float] | None = Field(
        default=None,
        description="keep only rows whose characters of completion / characters of prompt lie in [low, high]",
    )
    turns: tuple[int, int] | None = Field(
        default=None, description="keep only conversations of [fewest, most] messages, the system's aside"
    )
    disordered: bool = Field(
        default=False,
        description="drop conversations whose roles are out of order (user and assistant in turn, the user first); otherwise "
        "they are an error",
    )
    near_threshold: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="the Jaccard similarity of word 5-grams from which rows are near duplicates",
    )

    _not_blank = field_validator("contains")(not_blank)
    _compiles = field_validator("matches")(compiles)

    @model_validator(mode="after")
    def _something_is_left(self) -> Drop:
        if self.longer_than and self.shorter_than and self.shorter_than > self.longer_than:
            raise ValueError(f"shorter_than {self.shorter_than} and longer_than {self.longer_than} drop every row")
        if self.ratio and not 0 <= self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {list(self.ratio)} must be [low, high] with 0 ≤ low ≤ high")
        if self.turns and not 1 <= self.turns[0] <= self.turns[1]:
            raise ValueError(f"turns {list(self.turns)} must be [fewest, most] with 1 ≤ fewest ≤ most")
        return self


class Best(BaseModel):
    """Rows in the order of a mark, the best first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: str = Field(description="a column of numbers, higher is better")
    rows: int | None = Field(default=None, ge=1, description="keep so many; the others are dropped, counted")
    at_least: float | None = Field(default=None, description="drop rows with a lower mark, counted")


@dataclass(frozen=True)
class Cleaned:
    """Rows that stay, in order, and rows that went, each with why."""

    kept: Sequence[Record]
    dropped: Sequence[tuple[Record, str]]

    @property
    def counts(self) -> dict[str, int]:
        """Dropped rows by reason, the most frequent first."""
        return dict(Counter(reason for _, reason in self.dropped).most_common())


def clean(records: Sequence[Record], drop: Drop, *, length: Callable[[Row], int] | None = None) -> Cleaned:
    """Drop rows by `drop`; a row has the first reason that fits it, duplicates being looked for last.

    A preference whose chosen equals its rejected is always dropped: it has no gradient.

    Args:
        length: of a row, in whatever unit `longer_than` and `shorter_than` mean; None: characters of all its text.

    Raises:
        DataError: nothing is left; says how many rows went for which reason, with an example of each.
    """
    patterns = [re.compile(pattern) for pattern in drop.matches]
    reasons: dict[int, str] = {}
    keys = Digests()
    for i, record in enumerate(records):
        reason = next(_reasons(record, drop, patterns, length), None)
        if reason is not None:
            reasons[i] = reason
        elif drop.duplicates != "off" and (key := key_of(record.row)):
            keys.add(i, key)
    reasons |= dict.fromkeys(keys.repeated().tolist(), "duplicate")
    if drop.duplicates == "near":
        rest = _but(len(records), reasons)
        found = near_duplicates(mapped(chosen(records, rest), lambda r: joined_text(r.row)), drop.near_threshold)
        near = [int(i) for i, earlier in zip(rest, found, strict=True) if earlier is not None]
        reasons |= dict.fromkeys(near, "near duplicate")
    gone = sorted(reasons)
    whys = [reasons[i] for i in gone]
    lost = chosen(records, np.array(gone, np.int64))
    dropped: Sequence[tuple[Record, str]] = View(len(gone), lambda: zip(lost, whys, strict=True))
    if isinstance(records, list):
        dropped = list(dropped)
    cleaned = Cleaned(chosen(records, _but(len(records), reasons)), dropped)
    if not cleaned.kept:
        raise _nothing_left(cleaned)
    return cleaned


def judged(drop: Drop) -> Callable[[Record], str | None]:
    """Why a row alone is dropped, None: it stays. Lengths are in characters; duplicates are not looked for."""
    patterns = [re.compile(pattern) for pattern in drop.matches]
    return lambda record: next(_reasons(record, drop, patterns, None), None)


def in_order(cleaned: Cleaned, best: Best) -> Cleaned:
    """The rows that stay in the order of a mark, of equal marks as they came; those that are not among the best go too.

    Raises:
        DataError: a row has no such column, or no number in it; none has so high a mark.
    """
    kept = cleaned.kept
    marks = np.fromiter((_mark(record, best.by) for record in kept), float, len(kept))
    order = np.argsort(-marks, kind="stable")
    low = len(kept) if best.at_least is None else int((marks >= best.at_least).sum())
    last = low if best.rows is None else min(low, best.rows)
    if not last:
        raise DataError(f"no row has a mark of {best.at_least:g} in {best.by}: the highest is {marks.max():g}", do="lower best.at_least")  # fmt: skip
    lost = [(r, f"{NOT_BEST} {last:,} by {best.by}") for r in at(kept, order[last:].tolist())]
    return Cleaned(at(kept, order[:last].tolist()), joined(cleaned.dropped, lost))


def _mark(record: Record, by: str) -> float:
    if by not in record.row:
        raise DataError(f"there is no column «{by}» to order by", where=record.where, do=nearest(by, record.row))
    return number(record.row[by], by, record.where)


def _but(n: int, gone: Iterable[int]) -> np.ndarray:
    """The numbers below n that are not gone, int64."""
    stays = np.ones(n, bool)
    stays[list(gone)] = False
    return np.flatnonzero(stays)


def _reasons(
    record: Record, drop: Drop, patterns: list[re.Pattern[str]], length: Callable[[Row], int] | None
) -> Iterator[str]:
    row = record.row
    found = texts(row)
    if drop.empty and (not found or not all(text.strip() for text in found.values())):
        yield "empty"
    if "chosen" in row and "rejected" in row and (text_of(row["chosen"]) or "") == (text_of(row["rejected"]) or ""):
        yield "chosen equals rejected"
    turns = None if drop.turns is None else dialogues.turns(row)
    if drop.turns is not None and turns is not None and not drop.turns[0] <= turns <= drop.turns[1]:
        yield "too few turns" if turns < drop.turns[0] else "too many turns"
    if (wrong := dialogues.disorder(row)) is not None:
        if not drop.disordered:
            raise DataError(
                f"roles out of order: {wrong}", where=record.where, do="drop: {disordered: true}, or mend the source"
            )
        yield "roles out of order"
    for part in drop.contains:
        if any(part in text for text in found.values()):
            yield f"contains «{part}»"
    for pattern in patterns:
        if any(pattern.search(text) for text in found.values()):
            yield f"matches «{pattern.pattern}»"
    if drop.ratio is not None:
        value = _ratio(record)
        if not drop.ratio[0] <= value <= drop.ratio[1]:
            yield "ratio too low" if value < drop.ratio[0] else "ratio too high"
    if drop.longer_than is not None or drop.shorter_than is not None:
        size = length(row) if length is not None else sum(len(text) for text in found.values())
        if drop.longer_than is not None and size > drop.longer_than:
            yield TOO_LONG
        if drop.shorter_than is not None and size < drop.shorter_than:
            yield "too short"


def _ratio(record: Record) -> float:
    """Characters of the answer for one of the prompt."""
    prompt, row = prompt_of(record.row), record.row
    answer = text_of(row.get("completion", row.get("chosen")))
    if answer is None and prompt is not None and "messages" in row:
        answer = row["messages"][-1]["content"]
    if answer is None or (prompt is None and "prompt" not in row):
        raise DataError(
            "drop.ratio compares a completion with its prompt, and this row has not both", where=record.where
        )
    return len(answer) / len(prompt) if prompt else float("inf")


def _nothing_left(cleaned: Cleaned) -> DataError:
    if not cleaned.dropped:
        return DataError("there are no rows to clean")
    lines = []
    for reason, count in list(cleaned.counts.items())[:3]:
        example = next(record for record, why in cleaned.dropped if why == reason)
        shown = "; ".join(f"{name}: {text[:80]!r}" for name, text in texts(example.row).items())
        lines.append(f"{reason}: {count}, such as {example.where} ({shown or 'no text'})")
    return DataError(
        f"no row is left of {len(cleaned.dropped)}",
        where="\n       ".join(lines),
        do="loosen `drop`, or look at the source",
    )
