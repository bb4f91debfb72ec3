"""Where the loop takes its rows from: which examples each step sees is a function of the seed and the step alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from temper.engine.chains import sizes
from temper.trees import Row, Tree, rows_of

Pass = tuple[Row, bool]  # a micro-batch, and whether it counts: see `processes.Wrapped`


class Source(Protocol):
    """Where the loop takes its rows from."""

    @property
    def seed(self) -> int: ...

    @property
    def per_epoch(self) -> int:
        """Optimiser steps that see all the data once."""
        ...

    def rows(self, step: int) -> list[Row]:
        """The micro-batches of a step, counted from 0; asked for in the order of steps."""
        ...

    def prepared(self, passes: Sequence[Pass]) -> list[Pass]:
        """This process's micro-batches of a step, with whatever columns a loss reads of the policy as it is now."""
        ...

    def ready(self, step: int) -> bool:
        """Whether a run can go on at this step. What came from weights that are gone must have been kept."""
        ...


@dataclasses.dataclass(frozen=True)
class Batches:
    """Which examples each step takes: a new order every epoch, a function of the seed alone."""

    trees: Sequence[Tree]
    size: int
    row_tokens: int
    micro_tokens: int
    seed: int

    @property
    def per_epoch(self) -> int:
        return -(-len(self.trees) // self.size)

    def chosen(self, step: int) -> list[int]:
        """Indices of the examples of a step, counted from 0."""
        return chosen(step, len(self.trees), self.size, self.seed)

    def rows(self, step: int) -> list[Row]:
        """The micro-batches of a step."""
        return rows_of([self.trees[i] for i in self.chosen(step)], self.row_tokens, self.micro_tokens)

    def tokens(self, steps: int) -> int:
        """Tokens that the first so many steps train on; where trees are drawn anew, each epoch counts as the first."""
        epochs, more = divmod(steps, self.per_epoch)
        n, began, every = len(self.trees), epochs * self.per_epoch, sizes(self.trees)
        left = [i % n for k in range(more) for i in self.chosen(began + k)]
        return int(epochs * every.sum() + every[left].sum())

    def prepared(self, passes: Sequence[Pass]) -> list[Pass]:
        return list(passes)

    def ready(self, step: int) -> bool:
        return True


def chosen(step: int, n: int, size: int, seed: int) -> list[int]:
    """Indices of the examples, of n, that a step takes: each once an epoch, in an order of the epoch's own."""
    epoch, k = divmod(step, -(-n // size))
    return _order(seed, epoch, n)[k * size : (k + 1) * size].tolist()


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)
