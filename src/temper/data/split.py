"""Train, validation and test by content, and what leaks between them.

A row's place is decided by a hash of its prompt (of its text, where it has no prompt), so that equal prompts stay
together, and rows that are added later move no row from one split to another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from temper.data.formats import canonical, normalised, prompt_of, texts
from temper.data.near import near_matches
from temper.errors import DataError, RecipeError, nearest
from temper.types import Record, Row

Splits = dict[str, list[Record]]


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
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(_key(record, group), []).append(i)
    ordered = sorted(groups, key=lambda key: (_number(key, seed), key))
    asked = (test > 0) + (validation > 0)
    if len(ordered) <= asked:
        raise DataError(
            f"{len(records)} rows with {len(ordered)} different {group or 'prompts'} cannot make {asked + 1} splits",
            do="set validation: 0 or test: 0, give more rows, or name another column with `group`",
        )
    taken_test = _take(ordered, test, groups, seed, spare=1 + (validation > 0))
    rest = [key for key in reversed(ordered) if key not in taken_test]
    taken_validation = _take(rest, validation, groups, seed, spare=1, high=True)
    place = dict.fromkeys(taken_test, "test") | dict.fromkeys(taken_validation, "validation")
    names = ["train"] + ["validation"] * (validation > 0) + ["test"] * (test > 0)
    indices: dict[str, list[int]] = {name: [] for name in names}
    for key, members in groups.items():
        indices[place.get(key, "train")] += members
    return {name: [records[i] for i in sorted(members)] for name, members in indices.items()}


def _check(validation: float | int, test: float | int) -> None:
    for name, size in (("validation", validation), ("test", test)):
        if isinstance(size, bool) or size < 0 or (isinstance(size, float) and size >= 1):
            raise RecipeError(
                f"{name} = {size} is not the size of a split", do="a share such as 0.05, or a whole number of rows"
            )
    if isinstance(validation, float) and isinstance(test, float) and validation + test >= 1:
        raise RecipeError(f"validation {validation} and test {test} leave nothing to train on")


def _take(
    ordered: list[str], size: float | int, groups: dict[str, list[int]], seed: int, *, spare: int, high: bool = False
) -> set[str]:
    """Groups from the front of `ordered`, at least one and leaving at least `spare`."""
    if not size:
        return set()
    most = len(ordered) - spare
    taken: list[str] = []
    rows = 0
    for key in ordered:
        if len(taken) == most:
            break
        if isinstance(size, float):
            number = _number(key, seed)
            if not (number >= 1 - size if high else number < size):
                break
            taken.append(key)
        elif rows + len(groups[key]) <= size:
            taken.append(key)
            rows += len(groups[key])
    return set(taken or ordered[:1])


def _key(record: Record, group: str | None) -> str:
    row = record.row
    if group is not None:
        if group not in row:
            raise DataError(f"there is no column «{group}» to group by", where=record.where, do=nearest(group, row))
        return canonical({"group": row[group]})
    prompt = prompt_of(row)
    if prompt is not None:
        return "prompt\x1f" + normalised(prompt)
    return _text(row) or canonical(row)


def _text(row: Row) -> str:
    return "\x1f".join(f"{name}\x1e{normalised(text)}" for name, text in texts(row).items())


def _number(key: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}\x1f{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits: all that a float holds below 1


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


def leaks(splits: Splits, *, near: bool = True, threshold: float = 0.8, examples: int = 5) -> Leaks:
    """What a test would measure by memory alone.

    Args:
        near: also look for rows that share word 5-grams with a row of train, at a Jaccard similarity of `threshold`.
        examples: at most so many of each kind are named.
    """
    train = splits.get("train", [])
    held = [(name, record) for name in ("validation", "test") for record in splits.get(name, [])]
    by_text = {_text(record.row): record for record in reversed(train)}
    by_prompt = {normalised(p): record for record in reversed(train) if (p := prompt_of(record.row)) is not None}
    found: dict[str, list[dict[str, str]]] = {"exact": [], "near": [], "prompt": []}

    def note(kind: str, name: str, record: Record, other: Record) -> None:
        found[kind].append({"kind": kind, "split": name, "where": record.where, "train": other.where})

    rest: list[tuple[str, Record]] = []
    for name, record in held:
        key, prompt = _text(record.row), prompt_of(record.row)
        if key and key in by_text:
            note("exact", name, record, by_text[key])
        else:
            rest.append((name, record))
        if prompt is not None and normalised(prompt) in by_prompt:
            note("prompt", name, record, by_prompt[normalised(prompt)])
    if near and rest:
        matches = near_matches([_joined(r.row) for r in train], [_joined(r.row) for _, r in rest], threshold)
        for (name, record), index in zip(rest, matches, strict=True):
            if index is not None:
                note("near", name, record, train[index])
    return Leaks(
        len(found["exact"]),
        len(found["near"]),
        len(found["prompt"]),
        [example for kind in found.values() for example in kind[:examples]],
    )


def _joined(row: Row) -> str:
    return "\n".join(texts(row).values())
