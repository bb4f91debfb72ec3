"""Rows of preferences → couples of answers as token ids: a prompt, and two answers that branch off from it.

Both answers are written out by the encoder that `sft` uses, end token included. What both begin with stands once in the
tree. Of a row with one answer and a label (`kto`) the second answer is another row's: how much likelier than under the
reference the policy finds answers to other prompts is what the loss measures this one against.

Legend: C couples, S scored tokens of a tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from temper.data.chat import Encoded, Encoder
from temper.data.formats import answered, split, text_of
from temper.errors import DataError
from temper.stages.sft import NO_LIMIT, bounds
from temper.trees import Node, Tree, flatten
from temper.types import Record

COLUMNS = 'map them in the data stage: prompt: "{column}", chosen: "{column}", rejected: "{column}"'


@dataclasses.dataclass(frozen=True)
class Couple:
    """Two answers to one prompt, the first preferred to the second.

    `desirable` is the label of a row with one answer; the second is then another row's. None: a pair.
    """

    first: Encoded
    second: Encoded
    desirable: bool | None = None

    @property
    def where(self) -> str:
        return self.first.where

    @property
    def length(self) -> int:
        """The longest sequence that a model meets in it."""
        return max(self.first.length, self.second.length)

    def tree(self, number: int) -> Tree:
        """The couple as one example: weights of its scored tokens sum to 1, so that a step divides by its couples.

        Args:
            number: of the couple; its answers are known to the loss as 2·number and 2·number + 1.
        """
        starts = [e.prompt_length for e in (self.first, self.second)]
        shared = min(_common(self.first.ids, self.second.ids), *starts)
        weight = 1 / (sum(self.first.trained) + sum(self.second.trained))
        branches = tuple(
            Node(e.ids[shared:], [weight * t for t in e.trained[shared:]]) for e in (self.first, self.second)
        )
        made = flatten(Node(self.first.ids[:shared], None, branches), self.where)
        extra = {"answer": (2 * number + made.branch).astype(np.float32)}  # exact up to 8 million couples
        if self.desirable is not None:
            extra["desirable"] = np.full(len(made.tgt), self.desirable, np.float32)
        return dataclasses.replace(made, extra=extra)


def paired(records: Sequence[Record], encoder: Encoder) -> list[Couple]:
    """Rows with chosen and rejected, C of them: with a prompt, or as whole conversations or texts that begin alike.

    Raises:
        DataError: other columns; rows whose prompts differ, whose answers are empty, or equal. All such rows are named.
    """
    found = next((r for r in records if not {"chosen", "rejected"} <= r.row.keys()), None)
    if found is not None:
        more = "; rows with a label are for loss: kto" if "label" in found.row else ""
        raise DataError(
            f"pairs are made of prompt, chosen and rejected; this row has {', '.join(found.row)}{more}",
            where=found.where,
            do=COLUMNS,
        )
    same = (r.row["chosen"] == r.row["rejected"] for r in records)
    _refuse(records, same, "chosen equals rejected: there is nothing to prefer", "drop such rows from the source")
    parted = [split(r.row) for r in records]
    _refuse(
        records,
        (s is None for s in parted),
        "the prompt differs between chosen and rejected",
        "see that both answer the same prompt",
    )
    parts = [s for s in parted if s is not None]
    empty = (not (_said(c) and _said(r)) for _, c, r in parts)
    _refuse(records, empty, "an answer is empty", "drop: {empty: true} in the data stage")
    rows = [answered(prompt, answer) for prompt, *answers in parts for answer in answers]
    wheres = [r.where for r in records for _ in range(2)]
    coded = encoder.encode([Record(row, where) for row, where in zip(rows, wheres, strict=True)])
    asked = _asked([prompt for prompt, *_ in parts], records, encoder)
    couples = [
        Couple(_after(one, begin, two), _after(two, begin, one))
        for one, two, begin in zip(coded[::2], coded[1::2], asked, strict=True)
    ]
    alike = (c.first.ids == c.second.ids for c in couples)
    _refuse(records, alike, "chosen and rejected are the same tokens to this model", "drop such rows from the source")
    apart = (not any(c.first.trained) or not any(c.second.trained) for c in couples)
    _refuse(
        records, apart, "chosen is the beginning of rejected, or the other way round", f"name the prompt; {COLUMNS}"
    )
    bos = encoder.tokenizer.bos_token_id
    bare = (
        a is None and _common(c.first.ids, c.second.ids) <= (c.first.ids[0] == bos)
        for a, c in zip(asked, couples, strict=True)
    )
    _refuse(records, bare, "the prompt differs between chosen and rejected: they share no beginning", COLUMNS)
    return couples


def unpaired(records: Sequence[Record], encoder: Encoder, seed: int) -> list[Couple]:
    """Rows with prompt, completion and label, C of them, each beside the answer of another one.

    The rows stand in a circle, in an order drawn from the seed; each is given the next one's answer (Ethayarajh et al.
    2024, "KTO", section 4.1: any answers that do not belong to the prompt).

    Raises:
        DataError: other columns, empty answers.
    """
    found = next((r for r in records if not {"prompt", "completion", "label"} <= r.row.keys()), None)
    if found is not None:
        raise DataError(
            f"loss: kto reads prompt, completion and label; this row has {', '.join(found.row)}",
            where=found.where,
            do='map them in the data stage: label: "{column}"; pairs of chosen and rejected are for the other losses',
        )
    _refuse(
        records,
        (not _said(r.row["completion"]) for r in records),
        "an answer is empty",
        "drop: {empty: true} in the data stage",
    )
    labels = [bool(r.row["label"]) for r in records]
    circle = np.random.default_rng([seed, len(records)]).permutation(len(records))
    other = np.empty_like(circle)
    other[circle] = np.roll(circle, -1)
    rows = [
        answered(r.row["prompt"], records[k].row["completion"])
        for n, r in enumerate(records)
        for k in (n, int(other[n]))
    ]
    wheres = [r.where for r in records for _ in range(2)]
    coded = encoder.encode([Record(row, where) for row, where in zip(rows, wheres, strict=True)])
    asked = _asked([r.row["prompt"] for r in records], records, encoder)
    return [
        Couple(_after(one, begin, one), _after(two, begin, two), label)
        for one, two, begin, label in zip(coded[::2], coded[1::2], asked, labels, strict=True)
    ]


def check_labels(couples: Sequence[Couple]) -> None:
    """DataError where all rows to train on have one label. Pairs have none."""
    found = {c.desirable for c in couples}
    if found in ({True}, {False}):
        raise DataError(
            f"all {len(couples)} rows have the label {str(found.pop()).lower()}: good and bad cannot be told apart",
            where=f"{couples[0].where} to {couples[-1].where}",
            do="take rows of both labels",
        )


def lent(couples: list[Couple], limit: int) -> list[Couple]:
    """An answer lent from another row is no example of its own: it is cut to the limit. Pairs stay as they are."""
    return [c if c.desirable is None else dataclasses.replace(c, second=_cut(c.second, limit)) for c in couples]


def fitted(couples: list[Couple], limit: int, too_long: str, *, context: int | None = None) -> tuple[list[Couple], str]:
    """Couples both of whose paths are within `limit` tokens, and a sentence on those that were not.

    Args:
        context: see `bounds`.

    Raises:
        DataError: nothing is left, or `too_long: error` met a long one.
    """
    long, (reach, more) = [c for c in couples if c.length > limit], bounds(limit, context)
    if long and too_long == "error":
        raise DataError(
            f"{len(long):,} of {len(couples):,} pairs are longer than {reach}",
            where=long[0].where,
            do=f"too_long: drop or cut, or {more}",
        )
    if too_long == "cut":
        couples = [dataclasses.replace(c, first=_cut(c.first, limit), second=_cut(c.second, limit)) for c in couples]
    kept = [c for c in couples if c.length <= limit and comparable(c)]
    if not kept:
        raise DataError(
            f"no pair fits into {reach} (the shortest has {min(c.length for c in couples)})",
            do=f"{more}, or too_long: cut",
        )
    note = f"none longer than {limit} tokens" if limit < NO_LIMIT else "no limit on length"
    if long:
        note = f"{len(long):,} longer than {limit} tokens {'cut' if too_long == 'cut' else 'dropped'}"
    if lost := len(couples) - len(kept) - (0 if too_long == "cut" else len(long)):
        note += f"; {lost:,} of them had nothing left to compare"
    return kept, note


def trees(couples: Iterable[Couple]) -> list[Tree]:
    """Numbered from 0."""
    return [c.tree(n) for n, c in enumerate(couples)]


def _said(answer: Any) -> bool:
    """Whether an answer says anything."""
    return bool((text_of(answer if isinstance(answer, str) else answer[-1:]) or "").strip())


def _asked(prompts: Sequence[Any], records: Sequence[Record], encoder: Encoder) -> list[list[int] | None]:
    """Token ids of each prompt, as the model is asked; None for whole texts."""
    ends = (not isinstance(p, str | None) and p[-1]["role"] == "assistant" for p in prompts)
    _refuse(records, ends, "the prompt ends with an assistant's message", "let it end with what is asked")
    some = [Record({"prompt": p}, r.where) for p, r in zip(prompts, records, strict=True) if p is not None]
    ids = iter(encoder.prompts(some))
    return [None if p is None else next(ids) for p in prompts]


def _after(one: Encoded, prompt: list[int] | None, other: Encoded) -> Encoded:
    """With what comes after the prompt scored, and nothing of it: a conversation's earlier answers are no part of this one.

    Args:
        prompt: its token ids; None: what `one` and `other` both begin with.
    """
    start = _common(prompt if prompt is not None else other.ids, one.ids)
    trained = [t and k >= max(1, start) for k, t in enumerate(one.trained)]  # the very first is predicted from nothing
    return dataclasses.replace(one, trained=trained)


def _cut(one: Encoded, limit: int) -> Encoded:
    return one if len(one.ids) <= limit else dataclasses.replace(one, ids=one.ids[:limit], trained=one.trained[:limit])


def comparable(c: Couple) -> bool:
    """Whether a cut has left something of both answers, and a difference."""
    return any(c.first.trained) and any(c.second.trained) and (c.desirable is not None or c.first.ids != c.second.ids)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of what both begin with."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _refuse(records: Sequence[Record], faults: Iterable[bool], what: str, do: str) -> None:
    """DataError that names the rows at fault."""
    at = [r.where for r, fault in zip(records, faults, strict=True) if fault]
    if at:
        more = f" and {len(at) - 5} more" if len(at) > 5 else ""
        raise DataError(f"in {len(at)} of {len(records)} rows {what}", where=", ".join(at[:5]) + more, do=do)
