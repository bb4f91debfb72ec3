"""Span corruption, by which a T5 is pretrained (Raffel et al. 2020, section 3.1.4): of a text 15 % of the tokens are taken
out in spans of three on average, each replaced by a sentinel; the decoder writes the sentinels, each with what it stands for.
Or it writes the whole text (section 3.3.1, «BERT-style»): then it also learns to copy, which filling gaps hardly teaches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from temper.engine.batches import Batches
from temper.trees import Row, Tree, chain, rows_of

DENSITY, SPAN = 0.15, 3.0  # share of tokens taken out; mean length of a span


def sentinels(context: int) -> int:
    """How many a text of so many tokens may need: one a span, and one after the last."""
    return round(context * DENSITY / SPAN) + 2


def corrupted(ids: Sequence[int], sentinel: Sequence[int], end: int, draw: np.random.Generator) -> tuple[list[int], list[int]]:  # fmt: skip
    """A text's tokens → (what the encoder reads, what the decoder writes), both with an end token.

    >>> read, written = corrupted(range(10, 30), [100, 101, 102], 1, np.random.default_rng(0))
    >>> read
    [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 100, 1]
    >>> written
    [100, 27, 28, 29, 101, 1]
    """
    out = min(max(1, round(len(ids) * DENSITY)), len(ids) - 1)
    spans = min(max(1, round(out / SPAN)), len(sentinel) - 1, len(ids) - out)
    read, written, at = list[int](), list[int](), 0
    for k, (stays, goes) in enumerate(zip(_parts(len(ids) - out, spans, draw), _parts(out, spans, draw), strict=True)):
        read += [*ids[at : at + stays], sentinel[k]]
        written += [sentinel[k], *ids[at + stays : at + stays + goes]]
        at += stays + goes
    return [*read, end], [*written, sentinel[spans], end]


def _parts(total: int, parts: int, draw: np.random.Generator) -> list[int]:
    """A number as a sum of so many positive ones, each such sum equally likely."""
    cuts = np.sort(draw.choice(np.arange(1, total), parts - 1, replace=False)) if parts > 1 else np.zeros(0, int)
    return np.diff([0, *cuts, total]).tolist()


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts as token ids, and what corrupts them: the spans are drawn anew for every epoch."""

    ids: Sequence[Sequence[int]]
    origins: Sequence[str]
    sentinel: Sequence[int]
    end: int
    seed: int
    whole: bool = False  # the decoder writes all of the text

    def tree(self, i: int, epoch: int) -> Tree:
        draw = np.random.default_rng([self.seed, epoch, i])
        read, written = corrupted(self.ids[i], self.sentinel, self.end, draw)
        if self.whole:
            written = [*self.ids[i], self.end]
        return chain([*read, *written], [0.0] * len(read) + [1.0] * len(written), self.origins[i])


@dataclasses.dataclass(frozen=True)
class Corrupting(Batches):
    """Batches of texts; `trees` are those of the first epoch."""

    texts: Texts | None = None

    def rows(self, step: int) -> list[Row]:
        assert self.texts is not None
        epoch = step // self.per_epoch
        return rows_of([self.texts.tree(i, epoch) for i in self.chosen(step)], self.row_tokens, self.micro_tokens)
