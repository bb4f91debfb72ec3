"""Numbers that stand for texts, eight bytes each: what is equal among a million rows, without keeping them."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np


def digest(text: str) -> int:
    """64 bits of a text (BLAKE2b): of a million texts two that differ share one with probability 3·10⁻⁸."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class Digests:
    """The digests of some rows' texts, and which rows they are."""

    def __init__(self) -> None:
        self._values, self._places = array("Q"), array("Q")

    def add(self, place: int, text: str) -> None:
        """Places ascend."""
        self._values.append(digest(text))
        self._places.append(place)

    @property
    def values(self) -> np.ndarray:
        """uint64 [n]"""
        return np.frombuffer(self._values, np.uint64) if self._values else np.zeros(0, np.uint64)

    @property
    def places(self) -> np.ndarray:
        """int64 [n]"""
        return np.frombuffer(self._places, np.uint64).astype(np.int64) if self._places else np.zeros(0, np.int64)

    def repeated(self) -> np.ndarray:
        """Places whose text stands at an earlier one, int64, ascending."""
        _, first = np.unique(self.values, return_index=True)
        again = np.ones(len(self.values), bool)
        again[first] = False
        return self.places[again]

    def standing_in(self, other: Digests) -> tuple[np.ndarray, np.ndarray]:
        """(places here, the first place there) of the texts that stand in both, int64 [m] each, ascending here."""
        known, first = np.unique(other.values, return_index=True)
        if not len(known) or not len(self.values):
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        where = np.searchsorted(known, self.values).clip(max=len(known) - 1)
        found = known[where] == self.values
        return self.places[found], other.places[first[where[found]]]
