"""Memory taken and given back, noted while tensors are made: what is held at once, and what an allocator makes of it."""

from __future__ import annotations

import bisect
import functools
import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALIGNED = 64  # bytes: torch's tensors on processors
SPARE = ALIGNED + 32  # bytes more than it will have that glibc looks for when it is asked for an aligned piece
# Products in float32 for which oneDNN lays out a matrix anew, and which of their arguments that is.
BY_ONEDNN = {torch.ops.mkldnn._linear_pointwise.default: 1, torch.ops.aten.mm.default: 1, torch.ops.aten.addmm.default: 2}
Event = tuple[int, float]  # (which piece, bytes taken; negative: given back)


class Noted(TorchDispatchMode):
    """Notes when the memory of tensors is taken and given back. `kinds` of pieces may be told at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.kinds: dict[int, str] = {}
        self.closed = False  # nothing more is noted
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in BY_ONEDNN and args[BY_ONEDNN[func]].dtype == torch.float32:
            size = 4.0 * args[BY_ONEDNN[func]].numel()
            self.let_go(self.hold(size), size)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.piece(leaf)
        return out

    def piece(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        """Note the memory that a tensor lies in, if it is new, and its kind."""
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is not None and known[0]() is storage:
            if kind is not None:
                self.kinds[known[1]] = kind
            return
        size = storage.nbytes()
        number = self.hold(size, kind)
        self._known[storage._cdata] = (weakref.ref(storage, functools.partial(self._gone, number, size)), number)

    def hold(self, taken: float, kind: str | None = None) -> int:
        """Note that so many bytes are taken which no tensor stands for; the piece's number."""
        self._number += 1
        self.events.append((self._number, taken))
        if kind is not None:
            self.kinds[self._number] = kind
        return self._number

    def let_go(self, number: int, given: float) -> None:
        self.events.append((number, -given))

    def _gone(self, number: int, size: float, _: Any) -> None:
        if not self.closed:
            self.events.append((number, -size))

    def most(self) -> Counter[str]:
        """Bytes by kind in the moment when most is held; what has no kind is «activations»."""
        total, best, when = 0.0, 0.0, 0
        for k, (_, change) in enumerate(self.events):
            total += change
            if total > best:
                best, when = total, k + 1
        held: Counter[str] = Counter()
        for number, change in self.events[:when]:
            held[self.kinds.get(number, "activations")] += change  # type: ignore[assignment]
        return held


class Heap:
    """glibc's heap that keeps what it is given back (`device.keep_memory`): the smallest hole that is large enough is taken,
    neighbouring holes become one, and the heap grows where none is. An aligned piece is looked for with room to spare, so it
    does not fit where another of its own size has been: that is where most of the holes come from.

    >>> heap = Heap()
    >>> for name in "abc":
    ...     heap.take(name, 6400)
    >>> heap.give("b")
    >>> heap.take("d", 6400), heap.take("e", 6000)
    (None, None)
    >>> heap.most, heap.where["e"]
    (25600, (6400, 6016))
    """

    def __init__(self) -> None:
        self.where: dict[Hashable, tuple[int, int]] = {}  # piece → (address, size)
        self.top = self.most = 0
        self._holes: list[tuple[int, int]] = []  # (size, address)
        self._begins: dict[int, int] = {}  # address → size
        self._ends: dict[int, int] = {}

    def take(self, piece: Hashable, wanted: float) -> None:
        size = -(-int(wanted) // ALIGNED) * ALIGNED
        k = bisect.bisect_left(self._holes, (size + SPARE, -1))
        if k < len(self._holes):
            found, address = self._holes[k]
            self._fill(found, address)
            if found > size:
                self._open(found - size, address + size)
        else:
            address = self.top
            self.top += size
            self.most = max(self.most, self.top)
        self.where[piece] = (address, size)

    def give(self, piece: Hashable) -> None:
        address, size = self.where.pop(piece)
        if after := self._begins.get(address + size):
            self._fill(after, address + size)
            size += after
        if before := self._ends.get(address):
            self._fill(before, address - before)
            address, size = address - before, size + before
        if address + size == self.top:
            self.top = address
        else:
            self._open(size, address)

    def _open(self, size: int, address: int) -> None:
        bisect.insort(self._holes, (size, address))
        self._begins[address], self._ends[address + size] = size, size

    def _fill(self, size: int, address: int) -> None:
        self._holes.remove((size, address))
        del self._begins[address], self._ends[address + size]

    def play(self, name: str, events: Iterable[Event]) -> None:
        """What was noted, anew; what is left at its end is given back by `drop`."""
        for number, change in events:
            if change > 0:
                self.take((name, number), change)
            elif (name, number) in self.where:
                self.give((name, number))

    def hold(self, name: str, sizes: Sequence[float]) -> None:
        for k, size in enumerate(sizes):
            self.take((name, k), size)

    def drop(self, name: str) -> None:
        """Give back all that goes by this name."""
        for piece in [p for p in self.where if isinstance(p, tuple) and p[0] == name]:
            self.give(piece)
