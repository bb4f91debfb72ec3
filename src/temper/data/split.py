"""Train, validation and test by content, and what leaks between them.

A row's place is decided by a hash of its prompt (of its text, where it has no prompt), so that equal prompts stay
together, and rows that are added later move no row from one split to another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from temper.data.digests import Digests, digest
from temper.data.formats import canonical, joined_text, key_of, normalised, prompt_of
from temper.data.near import near_matches
from temper.data.spool import at, chosen, joined, mapped
from temper.errors import DataError, RecipeError, nearest
from temper.types import Record

Splits = Mapping[str, Sequence[Record]]


def split(
    records: Sequence[Record],
    *,
    validation: float | int = 0.05,
    test: float | int = 0.1,
    seed: int = 0,
    group: str | None = None,
) -> Splits:
    """{"train", "validation", "test"}: the rows of each, in their order; a split set to 0 is absent.

    The hash of a row and `seed` is a number in [0, 1). Test takes from the low end and validation from the high one,
    so that neither moves the other.

    Args:
        validation, test: a share in [0, 1) of the numbers, which holds for rows only on average; or, as a whole
            number, at most so many rows, as many as whole groups allow. A share that catches nothing takes one group.
        group: a column; rows with an equal value stay together, instead of rows with an equal prompt.

    Raises:
        RecipeError: shares that leave no train.
        DataError: too few rows or different prompts; a row without the column `group`.
    """
    _check(validation, test)
    hashes = np.fromiter((_number(unit(record, group), seed) for record in records), np.uint64, len(records))
    ordered, which, sizes = np.unique(hashes, return_inverse=True, return_counts=True)
    asked = (test > 0) + (validation > 0)
    if len(ordered) <= asked:
        raise DataError(
            f"{len(records)} rows with {len(ordered)} different {group or 'prompts'} cannot make {asked + 1} splits",
            do="set validation: 0 or test: 0, give more rows, or name another column with `group`",
        )
    names = ["train", "validation", "test"]
    place = np.zeros(len(ordered), np.int8)
    place[_take(ordered, sizes, test, spare=1 + (validation > 0))] = 2
    rest = np.flatnonzero(place == 0)[::-1]
    place[rest[_take(~ordered[rest], sizes[rest], validation, spare=1)]] = 1
    of_rows = place[which]
    used = [0] + [1] * (validation > 0) + [2] * (test > 0)
    return {names[k]: chosen(records, np.flatnonzero(of_rows == k)) for k in used}


def _check(validation: float | int, test: float | int) -> None:
    for name, size in (("validation", validation), ("test", test)):
        if isinstance(size, bool) or size < 0 or (isinstance(size, float) and size >= 1):
            raise RecipeError(
                f"{name} = {size} is not the size of a split", do="a share such as 0.05, or a whole number of rows"
            )
    if isinstance(validation, float) and isinstance(test, float) and validation + test >= 1:
        raise RecipeError(f"validation {validation} and test {test} leave nothing to train on")


def _take(ordered: np.ndarray, sizes: np.ndarray, size: float | int, *, spare: int) -> np.ndarray:
    """Which groups are taken from the front, at least one and leaving at least `spare`; int64.

    Args:
        ordered: hashes of the groups, ascending, uint64 [G].
        sizes: rows of each group.
    """
    if not size:
        return np.zeros(0, np.int64)
    most = len(ordered) - spare
    if isinstance(size, float):
        # the share of hashes below `size`, in the 53 bits that a float holds below 1
        return np.arange(max(1, min(most, np.searchsorted(ordered >> np.uint64(11), size * 2.0**53))))
    taken: list[int] = []
    rows = 0
    for k, more in enumerate(sizes.tolist()):
        if len(taken) == most or rows == size:
            break
        if rows + more <= size:
            taken.append(k)
            rows += more
    return np.array(taken or [0], np.int64)


def unit(record: Record, group: str | None = None) -> str:
    """What stays together: equal for rows of one prompt, without a prompt of one text, or of one value in a column."""
    row = record.row
    if group is not None:
        if group not in row:
            raise DataError(
                f"there is no column «{group}» to group by",
                where=record.where,
                do=f"{nearest(group, row)}; other columns of the source are there if `keep` names them",
            )
        return canonical({"group": row[group]})
    prompt = prompt_of(row)
    if prompt is not None:
        return "prompt\x1f" + normalised(prompt)
    return key_of(row) or canonical(row)


def _number(key: str, seed: int) -> int:
    """64 bits that stand for a group: its place among all others, the same whatever the others are."""
    return digest(f"{seed}\x1f{key}")


@dataclass(frozen=True)
class Leaks:
    """Rows of validation and test that also stand in train.

    `exact` (but for case and spaces) and `near` do not overlap; `prompts` counts all rows whose prompt stands in
    train, whatever the answer.
    """

    exact: int = 0
    near: int = 0
    prompts: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)  # kind, split, where, train (where it stands there)


def leaks(
    splits: Splits, *, near: bool = True, threshold: float = 0.8, examples: int = 5, folder: Path | None = None
) -> Leaks:
    """What a test would measure by memory alone.

    Args:
        near: also look for rows that share word 5-grams with a row of train, at a Jaccard similarity of `threshold`.
        examples: at most so many of each kind are named.
        folder: where what near leaks are found by lies meanwhile; None: the system's place for such files.
    """
    train = splits.get("train", [])
    names = [name for name in ("validation", "test") if name in splits]
    held = joined(*(splits[name] for name in names))
    ends = np.cumsum([len(splits[name]) for name in names])
    (texts_there, prompts_there), (texts_here, prompts_here) = _keys(train), _keys(held)
    exact, same = texts_here.standing_in(texts_there), prompts_here.standing_in(prompts_there)
    rest = np.setdiff1d(np.arange(len(held)), exact[0])
    pairs = {"exact": exact, "near": (np.zeros(0, np.int64),) * 2, "prompt": same}
    if near and len(rest) and len(train):
        asked = mapped(chosen(held, rest), lambda r: joined_text(r.row))
        found = near_matches(mapped(train, lambda r: joined_text(r.row)), asked, threshold, folder)
        pairs["near"] = rest[found >= 0], found[found >= 0]
    shown = [
        {"kind": kind, "split": names[int(np.searchsorted(ends, i, side="right"))], "where": here.where, "train": there.where}
        for kind, (places, others) in pairs.items()
        for i, here, there in zip(
            places[:examples].tolist(), at(held, places[:examples].tolist()), at(train, others[:examples].tolist()), strict=True
        )
    ]  # fmt: skip
    return Leaks(len(exact[0]), len(pairs["near"][0]), len(same[0]), shown)


def _keys(records: Sequence[Record]) -> tuple[Digests, Digests]:
    """Of texts and of prompts, as far as rows have them."""
    texts, prompts = Digests(), Digests()
    for i, record in enumerate(records):
        if key := key_of(record.row):
            texts.add(i, key)
        if (prompt := prompt_of(record.row)) is not None:
            prompts.add(i, normalised(prompt))
    return texts, prompts
