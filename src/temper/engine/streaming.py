"""Batches of a stream: which examples a step takes, where nobody knows beforehand how many of the rows are fit to train on.

Rows come in blocks; a block's examples are shuffled among one another, and a step takes the next ones of the blocks one after
another, epoch after epoch. How many examples each block gave is noted, so that a run that goes on in the middle need read none
that came before.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from temper.engine.batches import Pass
from temper.engine.chains import Chains
from temper.engine.lines import append
from temper.errors import DataError
from temper.trees import Row, Tree, rows_of
from temper.world import World

HELD = 2  # blocks in memory: a batch may lie across a border


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows of a stream, as they are trained on.

    `marks` are 64 bits of each row that was kept, uint64; `gone` counts the others by reason.
    """

    chains: Chains
    marks: np.ndarray
    gone: Counter[str]


class Streaming:
    """Batches of a stream, by the examples' place in it.

    Args:
        made: a block by its number, which goes on over epochs; all processes ask for the same at the same time.
        rows: of an epoch, before any is dropped.
        blocks: of an epoch.
        size: examples of an optimiser step.
        folder: where is noted what the blocks gave.
    """

    def __init__(self, made: Callable[[int], Block], *, rows: int, blocks: int, size: int, row_tokens: int, micro_tokens: int, seed: int, folder: Path, world: World) -> None:  # fmt: skip
        self.made, self.all_rows, self.blocks, self.size = made, rows, blocks, size
        self.row_tokens, self.micro_tokens, self.seed, self.world = row_tokens, micro_tokens, seed, world
        self._index, self._marks = folder / "blocks.jsonl", folder / "marks"
        self._held: OrderedDict[int, tuple[Chains, np.ndarray]] = OrderedDict()
        noted: list[dict[str, Any]] = world.told(self._noted)
        self._ends = np.cumsum([line["kept"] for line in noted], dtype=np.int64).tolist()
        self.gone = sum((Counter(line["gone"]) for line in noted), Counter[str]())

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch if no row is dropped."""
        return -(-self.all_rows // self.size)

    def rows(self, step: int) -> list[Row]:
        """The micro-batches of a step."""
        trees = [self._example(i) for i in range(step * self.size, (step + 1) * self.size)]
        return rows_of(trees, self.row_tokens, self.micro_tokens)

    def tokens(self, steps: int) -> int:
        """About how many tokens the first so many steps train on, by the first block."""
        chains = self._block(0)[0]
        return round(steps * self.size * float(chains.sizes.mean()))

    def prepared(self, passes: Sequence[Pass]) -> list[Pass]:
        return list(passes)

    def ready(self, step: int) -> bool:
        return True

    @property
    def seen(self) -> np.ndarray:
        """64 bits of each row in the blocks that were read, uint64, ascending."""
        return np.unique(np.fromfile(self._marks, np.uint64)) if self._marks.is_file() else np.zeros(0, np.uint64)

    def first(self) -> Chains:
        """The examples of the first block.

        Raises:
            DataError: there are none.
        """
        chains = self._block(0)[0]
        if not len(chains):
            raise self._nothing()
        return chains

    @property
    def _dry(self) -> bool:
        """Whether the last epoch gave no example at all."""
        n = len(self._ends)
        return n >= self.blocks and self._ends[-1] == (self._ends[-1 - self.blocks] if n > self.blocks else 0)

    def _example(self, i: int) -> Tree:
        while not self._ends or self._ends[-1] <= i:
            if self._dry:
                raise self._nothing()
            self._block(len(self._ends))
        number = bisect.bisect_right(self._ends, i)
        chains, order = self._block(number)
        return chains[int(order[i - (self._ends[number - 1] if number else 0)])]

    def _block(self, number: int) -> tuple[Chains, np.ndarray]:
        if number not in self._held:
            block = self.made(number)
            if number == len(self._ends):
                self._note(block)
            self._held[number] = block.chains, np.random.default_rng([self.seed, number]).permutation(len(block.chains))
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        self._held.move_to_end(number)
        return self._held[number]

    def _note(self, block: Block) -> None:
        self._ends.append((self._ends[-1] if self._ends else 0) + len(block.chains))
        self.gone += block.gone
        if self.world.main:
            self._index.parent.mkdir(exist_ok=True)
            with self._marks.open("ab") as file:
                block.marks.tofile(file)
            append(self._index, {"kept": len(block.chains), "marks": len(block.marks), "gone": dict(block.gone)})

    def _noted(self) -> list[dict[str, Any]]:
        """What earlier starts noted. A block whose note a kill has cut is read again, and its marks with it."""
        lines = list[dict[str, Any]]()
        for line in self._index.read_text(encoding="utf-8").splitlines() if self._index.is_file() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        bytes_noted = sum(line["marks"] for line in lines) * np.dtype(np.uint64).itemsize
        if not self._marks.is_file() or self._marks.stat().st_size < bytes_noted:
            lines, bytes_noted = [], 0
        if self._index.parent.is_dir():
            with self._marks.open("ab") as file:
                file.truncate(bytes_noted)
            self._index.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return lines

    def _nothing(self) -> DataError:
        why = ", ".join(f"{n:,} {reason}" for reason, n in self.gone.most_common(3)) or "no reason is known"
        return DataError(f"no row of the stream is left to train on ({why})", do="loosen drop, or take a longer max_length")
