"""Near-duplicate texts: MinHash with banding (LSH) proposes, the exact Jaccard similarity decides.

A text is its set of word 5-grams (a shorter text: its words, as one). Broder, "On the resemblance and containment of
documents" (1997). Everything is hashed by content with fixed seeds, so any process on any machine gets the same answer.

Legend: n shingles, K hash functions, B bands of R hashes (B·R ≤ K).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from temper.data.spool import unnamed

WORDS = 5
WORDS_KEPT = 200_000
K = 128
BLOCK = 32_768  # texts of either side that are compared at once

# Scripts written without spaces give one word a character, or a whole sentence would be one word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")

_random = np.random.Generator(np.random.PCG64(20))
_MULTIPLY_W = _random.integers(0, 2**63, WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_MULTIPLY_K = _random.integers(0, 2**63, (K, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_ADD_K = _random.integers(0, 2**63, (K, 1), dtype=np.uint64) * np.uint64(2)


class Shingler:
    """Texts → sorted arrays of 64-bit shingle hashes; keeps the hashes of words it has met lately."""

    def __init__(self) -> None:
        self._words: dict[str, int] = {}

    def __call__(self, text: str) -> np.ndarray:
        """uint64 [n], sorted and without repeats; n = 0 only for a blank text."""
        text = text.casefold()
        words = _WORD.findall(text) or text.split()  # a text of signs alone: what stands between its spaces
        hashes = np.array([self._word(word) for word in words], dtype=np.uint64)
        if len(hashes) < WORDS:
            return _mix((hashes * _MULTIPLY_W[: len(hashes)]).sum(keepdims=True)) if len(hashes) else hashes
        windows = np.lib.stride_tricks.sliding_window_view(hashes, WORDS)
        return np.unique(_mix((windows * _MULTIPLY_W).sum(-1, dtype=np.uint64)))

    def _word(self, word: str) -> int:
        if word not in self._words:
            if len(self._words) == WORDS_KEPT:
                self._words.clear()
            digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            self._words[word] = int.from_bytes(digest, "little")
        return self._words[word]


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def signature(shingles_n: np.ndarray) -> np.ndarray:
    """uint32 [K]: the smallest value of each of K hash functions over a non-empty set."""
    out = np.full(K, np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(shingles_n), 4096):  # a novel would need gigabytes at once
        hashed = (shingles_n[None, start : start + 4096] * _MULTIPLY_K + _ADD_K) >> np.uint64(32)
        out = np.minimum(out, hashed.min(1).astype(np.uint32))
    return out


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|a ∩ b| / |a ∪ b| of two sorted sets without repeats."""
    both = np.concatenate([a, b])
    both.sort()
    shared = int((both[1:] == both[:-1]).sum())
    return shared / (len(both) - shared) if len(both) else 0.0


def bands(threshold: float) -> tuple[int, int]:
    """(B, R): the longest bands by which a pair at the threshold is missed at most once in a thousand."""
    for r in range(K, 1, -1):
        b = K // r
        if (1 - threshold**r) ** b <= 1e-3:
            return b, r
    return K, 1


class NearIndex:
    """Texts to find near-duplicates of."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._b, self._r = bands(threshold)
        self._buckets: dict[tuple[int, bytes], list[int]] = {}
        self._sets: list[np.ndarray] = []
        self._names: list[int] = []
        self._signatures = np.empty((64, K), dtype=np.uint32)

    def add(self, name: int, shingles_n: np.ndarray, signature_K: np.ndarray) -> None:
        slot = len(self._sets)
        if slot == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[slot] = signature_K
        self._sets.append(shingles_n)
        self._names.append(name)
        for key in self._keys(signature_K):
            self._buckets.setdefault(key, []).append(slot)

    def find(self, shingles_n: np.ndarray, signature_K: np.ndarray) -> int | None:
        """The name of the first text added whose similarity is at least the threshold."""
        slots = {slot for key in self._keys(signature_K) for slot in self._buckets.get(key, ())}
        if not slots:
            return None
        candidates = np.array(sorted(slots))
        estimate = (self._signatures[candidates] == signature_K).mean(1)
        for slot in candidates[estimate >= _least(self.threshold)]:
            if jaccard(self._sets[slot], shingles_n) >= self.threshold:
                return self._names[slot]
        return None

    def _keys(self, signature_K: np.ndarray) -> Iterable[tuple[int, bytes]]:
        for band in range(self._b):
            yield band, signature_K[band * self._r : (band + 1) * self._r].tobytes()


def near_duplicates(texts: Iterable[str], threshold: float) -> list[int | None]:
    """For each text the index of the earlier, itself kept, text that it nearly repeats; None: it is kept.

    What is kept stays in memory: some 8 kB a text.
    """
    shingler, index = Shingler(), NearIndex(threshold)
    out: list[int | None] = []
    for i, text in enumerate(texts):
        shingles = shingler(text)
        if not len(shingles):
            out.append(None)
            continue
        values = signature(shingles)
        out.append(index.find(shingles, values))
        if out[-1] is None:
            index.add(i, shingles, values)
    return out


class Sketches:
    """Signatures and shingles of texts, on disk; in memory is where each text's shingles end, 8 bytes."""

    def __init__(self, texts: Iterable[str], shingler: Shingler, folder: Path | None) -> None:
        self._signatures, self._shingles = unnamed(self, folder), unnamed(self, folder)
        ends, end = array("Q", [0]), 0
        for text in texts:
            shingles = shingler(text)
            self._signatures.write((signature(shingles) if len(shingles) else np.zeros(K, np.uint32)).tobytes())
            self._shingles.write(shingles.tobytes())
            end += len(shingles)
            ends.append(end)
        self._signatures.flush()
        self._shingles.flush()
        self._ends = np.frombuffer(ends, np.uint64).astype(np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def signatures(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of the texts in [first, last) that are not blank, int64 [n]; their signatures, uint32 [n, K])"""
        found = os.pread(self._signatures.fileno(), 4 * K * (last - first), 4 * K * first)
        full = np.flatnonzero(np.diff(self._ends[first : last + 1])) + first
        return full, np.frombuffer(found, np.uint32).reshape(-1, K)[full - first]

    def shingles(self, i: int) -> np.ndarray:
        """uint64 [n], sorted"""
        first, last = 8 * int(self._ends[i]), 8 * int(self._ends[i + 1])
        return np.frombuffer(os.pread(self._shingles.fileno(), last - first, first), np.uint64)


def near_matches(
    known: Iterable[str], asked: Iterable[str], threshold: float, folder: Path | None = None
) -> np.ndarray:
    """For each text asked about the index of the first known text that it nearly repeats, or −1; int64.

    Blocks of either side meet, so memory does not grow with the texts; what they are compared by lies on disk.

    Args:
        folder: where; None: the system's place for such files.
    """
    shingler = Shingler()
    there, here = Sketches(known, shingler, folder), Sketches(asked, shingler, folder)
    found = np.full(len(here), -1, np.int64)
    least = _least(threshold)
    for begin in range(0, len(here), BLOCK):
        mine, my_signatures = here.signatures(begin, min(begin + BLOCK, len(here)))
        for start in range(0, len(there), BLOCK):
            theirs, their_signatures = there.signatures(start, min(start + BLOCK, len(there)))
            without = np.flatnonzero(found[mine] < 0)
            for a, b in _alike(my_signatures[without], their_signatures, threshold):
                i = int(mine[without[a]])
                estimate = (their_signatures[b] == my_signatures[without[a]]).mean(1)
                shingles = here.shingles(i)
                for j in theirs[b[estimate >= least]].tolist():
                    if jaccard(there.shingles(j), shingles) >= threshold:
                        found[i] = j
                        break
    return found


def _least(threshold: float) -> float:
    """The share of equal hashes estimates the similarity with a standard deviation of at most 0.044; what is five of
    them below the threshold is not looked at. Sets built from one form meet in many buckets."""
    return threshold - 5 * math.sqrt(threshold * (1 - threshold) / K)


def _alike(mine: np.ndarray, theirs: np.ndarray, threshold: float) -> Iterator[tuple[int, np.ndarray]]:
    """(a of mine, those of theirs that share a band of hashes with it, ascending), of [n, K] and [m, K]."""
    b, r = bands(threshold)
    meetings: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # of a band: order of theirs, first and last equal
    for band in range(b):
        one, other = (_mixed(s[:, band * r : (band + 1) * r]) for s in (mine, theirs))
        order = np.argsort(other, kind="stable")
        ordered = other[order]
        first, last = (np.searchsorted(ordered, one, side) for side in ("left", "right"))
        meetings.append((order, first, last))
    some = np.flatnonzero(np.any([last > first for _, first, last in meetings], 0))
    for a in some.tolist():
        yield a, np.unique(np.concatenate([order[first[a] : last[a]] for order, first, last in meetings]))


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """One number for the hashes of a band, uint64 [n]; two bands that differ seldom share it, and are then told apart."""
    return _mix((hashes.astype(np.uint64) * _MULTIPLY_K[: hashes.shape[1], 0]).sum(1, dtype=np.uint64))
