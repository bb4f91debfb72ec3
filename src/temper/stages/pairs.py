"""Pairs of texts to learn rewards from: read from columns, or drawn from the labels of single texts.

Of P positive and Q negative texts there are P·Q pairs, which nobody needs to build: pair number j takes the j-th text of
an endless stream of shuffles of the positives and of another one of the negatives. Each text is so used equally often
(but for one time), and which pairs an epoch has follows from the seed alone.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from temper.data.forms import Format, conversation, plain_prompt
from temper.engine.batches import Batches
from temper.errors import DataError, ModelError, nearest
from temper.models.reward import pair
from temper.trees import Row, Tree, rows_of
from temper.types import Record


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of one split, N of them, and what pairs them.

    Where `drawn`, any preferred text may be paired with any other; else texts 2i and 2i + 1 are chosen and rejected.
    """

    texts: list[str]
    wheres: list[str]
    preferred: np.ndarray  # bool [N]
    drawn: bool
    margins: list[float] | None = None  # of each pair

    def __len__(self) -> int:
        return len(self.texts)


def read(records: Sequence[Record], form: Format, tokenizer: Any, positive: str | None) -> Texts:
    """Rows with chosen and rejected, or with text and label, as whole texts.

    Args:
        form: how a prompt and an answer are written out.
        positive: the label that is preferred; for rows with labels.

    Raises:
        DataError: missing columns, an unknown label, one class only, pairs whose texts are equal, a margin
            that is no number.
    """
    columns = records[0].row
    if "chosen" in columns and "rejected" in columns:
        if positive is not None:
            raise DataError(
                f"positive: {positive} is for rows with the columns «text» and «label»; these have chosen and rejected",
                where=records[0].where,
                do="leave positive out",
            )
        return _of_columns(records, form, tokenizer)
    if "text" in columns and "label" in columns:
        return _of_labels(records, positive)
    raise DataError(
        f"pairs are made of the columns chosen and rejected, or of text and label; these rows have {', '.join(columns)}",
        where=records[0].where,
        do='map them in the data stage: chosen: "{column}", rejected: "{column}"',
    )


def _of_columns(records: Sequence[Record], form: Format, tokenizer: Any) -> Texts:
    texts = [whole(r, name, form, tokenizer) for r in records for name in ("chosen", "rejected")]
    equal = [r.where for r, a, b in zip(records, texts[::2], texts[1::2], strict=True) if a == b]
    if equal:
        raise DataError(
            f"in {len(equal)} of {len(records)} pairs chosen equals rejected: there is nothing to prefer",
            where=_some(equal),
            do="drop such rows from the source",
        )
    wheres = [r.where for r in records for _ in range(2)]
    return Texts(texts, wheres, np.tile([True, False], len(records)), False, _margins(records))


def _margins(records: Sequence[Record]) -> list[float] | None:
    """By how much each chosen text is to be ahead; None where no row says."""
    given = [r.row.get("margin") for r in records]
    if all(m is None for m in given):
        return None
    bad = [r.where for r, m in zip(records, given, strict=True) if not _finite(m)]
    if bad:
        raise DataError(
            f"the column «margin» is no number in {len(bad)} of {len(records)} pairs",
            where=_some(bad),
            do="give every pair a number (0: only the order counts), or leave margin out of keep",
        )
    return [float(m) for m in given]  # type: ignore[arg-type]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def whole(record: Record, column: str, form: Format, tokenizer: Any) -> str:
    """One side of a pair as one text: with its prompt where it has one, through the chat template where it is messages.

    Raises:
        DataError: messages, and the tokenizer has no chat template.
        ModelError: the recipe asks for a template that is not there.
    """
    answer, prompt = record.row[column], record.row.get("prompt")
    has = bool(tokenizer.chat_template)
    if form.chat == "template" and not has:
        raise ModelError("the recipe asks for the chat template, and the tokenizer has none", do="chat: plain")
    messages = not isinstance(answer, str)
    if messages and not has:
        raise DataError(
            f"«{column}» holds messages, and the model's tokenizer has no chat template to write them out",
            where=record.where,
            do="choose a model with one, or map the rows to text",
        )
    if not messages and (prompt is None or form.chat == "plain" or not has):
        if prompt is None:
            return answer
        return plain_prompt(record.row, form) + form.separator[len(form.separator.rstrip(" ")) :] + answer
    row = {"messages": answer} if prompt is None else {"prompt": prompt, "completion": answer}
    return tokenizer.apply_chat_template(conversation(row, form), tokenize=False)


def _of_labels(records: Sequence[Record], positive: str | None) -> Texts:
    labels = [name_of(r.row.get("label")) for r in records]
    counts = Counter(labels)
    if "" in counts:
        at = labels.index("")
        raise DataError("a row has no label", where=records[at].where, do="drop such rows from the source")
    known = ", ".join(f"{name} ({n:,})" for name, n in sorted(counts.items())[:20])
    if positive is None:
        raise DataError(
            f"pairs are drawn from labels, and it is not said which one is preferred; there are {known}",
            where=records[0].where,
            do="positive: one of these",
        )
    wanted = name_of(positive)
    if wanted not in counts:
        raise DataError(
            f"no row has the label «{positive}», which is to be preferred; there are {known}",
            where=f"{records[0].where} to {records[-1].where}",
            do=nearest(wanted, counts),
        )
    if len(counts) == 1:
        raise DataError(
            f"all {len(records)} rows have the label «{wanted}»: there is nothing to prefer them to",
            where=f"{records[0].where} to {records[-1].where}",
            do="take rows of another label too",
        )
    texts, preferred = [r.row["text"] for r in records], np.array([name == wanted for name in labels])
    first = {text: r.where for text, r, p in zip(texts, records, preferred, strict=True) if p}
    both = [(first[t], r.where) for t, r, p in zip(texts, records, preferred, strict=True) if not p and t in first]
    if both:
        raise DataError(
            f"{len(both)} texts stand both under «{wanted}» and under another label: chosen would equal rejected",
            where=_some([f"{a} and {b}" for a, b in both]),
            do="drop: {duplicates: exact} in the data stage keeps the first of equal rows; or mend the labels",
        )
    return Texts(texts, [r.where for r in records], preferred, True)


def name_of(label: Any) -> str:
    """A label as recipes write it: booleans in YAML's way.

    >>> name_of(True), name_of(" pos "), name_of(1), name_of(None)
    ('true', 'pos', '1', '')
    """
    return "" if label is None else str(label).lower() if isinstance(label, bool) else str(label).strip()


def _some(wheres: Sequence[str]) -> str:
    more = f" and {len(wheres) - 5} more" if len(wheres) > 5 else ""
    return ", ".join(wheres[:5]) + more


def drawn(seed: int, numbers: Sequence[int], n: int) -> list[int]:
    """Which of n texts stand at some places of an endless stream of shuffles.

    >>> sorted(drawn(0, range(6), 3))
    [0, 0, 1, 1, 2, 2]
    """
    return [int(_shuffle(seed, number // n, n)[number % n]) for number in numbers]


@functools.lru_cache(maxsize=8)
def _shuffle(seed: int, block: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, block]).permutation(n)


def draw(seed: int, numbers: Sequence[int], preferred: np.ndarray) -> list[tuple[int, int]]:
    """The pairs of some numbers: (a preferred text, another), as indices of the texts."""
    chosen, rejected = np.flatnonzero(preferred), np.flatnonzero(~preferred)
    left, right = drawn(2 * seed, numbers, len(chosen)), drawn(2 * seed + 1, numbers, len(rejected))
    return [(int(chosen[i]), int(rejected[j])) for i, j in zip(left, right, strict=True)]


@dataclasses.dataclass(frozen=True)
class DrawnPairs(Batches):
    """Batches of pairs that are drawn anew every epoch; `trees` are those of the first."""

    make: Callable[[Sequence[int]], list[Tree]]  # numbers of pairs → trees

    def chosen(self, step: int) -> list[int]:
        """Numbers of the pairs of a step, counted through all epochs."""
        epoch, k = divmod(step, self.per_epoch)
        n = len(self.trees)
        return list(range(epoch * n + k * self.size, epoch * n + min((k + 1) * self.size, n)))

    def rows(self, step: int) -> list[Row]:
        return rows_of(self.make(self.chosen(step)), self.row_tokens, self.micro_tokens)


@dataclasses.dataclass(frozen=True)
class Coded:
    """Texts as token ids, N of them; the rest as in `Texts`."""

    ids: list[list[int]]
    wheres: list[str]
    preferred: np.ndarray
    drawn: bool
    margins: list[float] | None

    def pairs(self, seed: int, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """(chosen, rejected) as indices of texts, by the numbers of pairs."""
        return draw(seed, numbers, self.preferred) if self.drawn else [(2 * j, 2 * j + 1) for j in numbers]

    def trees(self, seed: int, numbers: Sequence[int], *, share: bool) -> list[Tree]:
        """Pairs as trees; `share`: what both begin with stands once."""
        found = []
        for j, (a, b) in zip(numbers, self.pairs(seed, numbers), strict=True):
            where = f"{self.wheres[a]} and {self.wheres[b]}" if self.drawn else self.wheres[a]
            margin = None if self.margins is None else self.margins[j]
            found.append(pair(self.ids[a], self.ids[b], where, share=share, margin=margin))
        return found


def coded(texts: Texts, ids: list[list[int]], *, context: int, cut: Callable[[list[int]], list[int]] | None) -> Coded:
    """Texts that fit the context: longer ones are cut, or dropped, a pair with both its texts.

    Args:
        cut: what is left of a longer text; None: it is dropped.

    Raises:
        DataError: nothing is left, or two texts of a pair are equal to the model.
    """
    fits = np.array([cut is not None or len(line) <= context for line in ids])
    if not texts.drawn:
        fits = np.repeat(fits.reshape(-1, 2).all(1), 2)
    kept = np.flatnonzero(fits).tolist()
    preferred = texts.preferred[kept]
    if not preferred.any() or preferred.all():
        raise DataError(
            f"no pair is left of {len(texts)} texts within the context of {context} tokens",
            do="longer: cut trains on their beginnings",
        )
    lines = [ids[i] if len(ids[i]) <= context or cut is None else cut(ids[i]) for i in kept]
    margins = None if texts.margins is None else [m for m, keep in zip(texts.margins, fits[::2], strict=True) if keep]
    made = Coded(lines, [texts.wheres[i] for i in kept], preferred, texts.drawn, margins)
    if not made.drawn:
        equal = [made.wheres[k] for k in range(0, len(lines), 2) if lines[k] == lines[k + 1]]
        if equal:
            raise DataError(
                f"in {len(equal)} pairs chosen and rejected are the same tokens to this model"
                + ("" if cut is None else f" once they are cut to {context} tokens"),
                where=_some(equal),
                do="drop such rows from the source" + ("" if cut is None else ", or longer: drop"),
            )
    return made
