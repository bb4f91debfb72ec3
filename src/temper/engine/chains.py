"""Sequences by the hundred thousand: kept in a few arrays, and each made a tree when a step asks for it.

They take five bytes a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

from temper.trees import Tree, chain


class Chains(Sequence[Tree]):
    """Sequences of tokens of which some are trained on; item i is its tree, made anew each time.

    >>> some = Chains([([5, 6, 7], [False, True, True], "a:1")])
    >>> some[0].tgt.tolist(), some.sizes.tolist(), some.trained.tolist()
    ([1, 2], [3], [2])
    """

    def __init__(self, sequences: Iterable[tuple[Sequence[int], Sequence[int], str]] = ()) -> None:
        self._ids, self._marks, self._stops = array("i"), bytearray(), array("q", [0])
        self._origins: list[str] = []
        for ids, marks, origin in sequences:
            self.add(ids, marks, origin)

    def add(self, ids: Sequence[int], marks: Sequence[int], origin: str) -> None:
        self._ids.extend(ids)
        self._marks.extend(marks)
        self._stops.append(len(self._ids))
        self._origins.append(origin)

    def __len__(self) -> int:
        return len(self._origins)

    @overload
    def __getitem__(self, i: int) -> Tree: ...
    @overload
    def __getitem__(self, i: slice) -> list[Tree]: ...
    def __getitem__(self, i: int | slice) -> Tree | list[Tree]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        ids, marks, origin = self.sequence(range(len(self))[i])
        return chain(ids, marks, origin)  # type: ignore[arg-type]

    def sequence(self, i: int) -> tuple[array[int], bytearray, str]:
        """Ids, marks and origin of one."""
        part = slice(self._stops[i], self._stops[i + 1])
        return self._ids[part], self._marks[part], self._origins[i]

    @property
    def sizes(self) -> np.ndarray:
        """Tokens of each, int64 [N]."""
        return np.diff(np.frombuffer(self._stops, np.int64))

    @property
    def trained(self) -> np.ndarray:
        """Tokens of each that are scored: those trained on, but for the first, which nothing predicts. int64 [N]."""
        marks, starts = np.frombuffer(self._marks, np.uint8), np.frombuffer(self._stops, np.int64)[:-1]
        return np.add.reduceat(marks, starts, dtype=np.int64) - marks[starts]

    @property
    def before(self) -> np.ndarray:
        """Tokens of each before the first one trained on, int64 [N]."""
        marks, starts = np.frombuffer(self._marks, np.uint8), np.frombuffer(self._stops, np.int64)[:-1]
        places = np.append(np.flatnonzero(marks), len(marks))
        return np.minimum(places[np.searchsorted(places, starts)] - starts, self.sizes)

    def within_apart(self, prompt: int, answer: int, *, cut: bool) -> Chains:
        """Those of at most so many tokens before the first one trained on and after, in their order; with `cut` the others'
        beginnings too, of what stands before with its last token kept."""
        out = Chains()
        for i, n in enumerate(self.before.tolist()):
            ids, marks, origin = self.sequence(i)
            if n > prompt or len(ids) - n > answer:
                if not cut:
                    continue
                first = ids[:n] if n <= prompt else ids[: prompt - 1] + ids[n - 1 : n]
                ids, marks = first + ids[n : n + answer], bytearray(len(first)) + marks[n : n + answer]
            out.add(ids, marks, origin)
        return out

    def within(self, limit: int, *, cut: bool = False) -> Chains:
        """Those of at most `limit` tokens, in their order; with `cut` then the longer ones' beginnings, where these hold
        something to train on."""
        long = np.flatnonzero(self.sizes > limit)
        if not len(long):
            return self
        out = Chains(self.sequence(int(i)) for i in np.flatnonzero(self.sizes <= limit))
        for i in long if cut else ():
            ids, marks, origin = self.sequence(int(i))
            if any(marks[:limit]):
                out.add(ids[:limit], marks[:limit], origin)
        return out


def sizes(trees: Sequence[Tree]) -> np.ndarray:
    """Tokens of each tree, int64 [N]."""
    return trees.sizes if isinstance(trees, Chains) else np.array([len(t) for t in trees], np.int64)


def scored(trees: Sequence[Tree]) -> int:
    """Tokens of all that are scored."""
    return int(trees.trained.sum()) if isinstance(trees, Chains) else sum(len(t.tgt) for t in trees)
