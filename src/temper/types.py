"""The few types that cross module borders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Row = dict[str, Any]  # one row of data: column → value


@dataclass(frozen=True)
class Record:
    """A data row and where it came from (`file:line`, `hub id#index`)."""

    row: Row
    where: str


@dataclass(frozen=True)
class Outputs:
    """What one model gave on N rows.

    `nll` is the negative log-likelihood in nats of each reference given its prompt, summed over the reference's
    `tokens` tokens (its end token included); both are None where no metric asked for them.
    `ended` says whether the model ended its answer itself rather than by the length limit.
    """

    prompts: list[str]
    predictions: list[str]
    references: list[str]
    ended: list[bool]
    nll: np.ndarray | None = None  # float64 [N]
    tokens: np.ndarray | None = None  # int64 [N]


def mean_of_rows(sums: np.ndarray) -> np.ndarray:
    """Aggregate for `stats` of columns (score, 1): [..., 2] → [...]."""
    return sums[..., 0] / sums[..., 1]


@dataclass(frozen=True)
class Scores:
    """One metric on N rows, in a form that can be resampled.

    `stats` [N, D] are additive: the metric on any multiset of rows is `aggregate(stats of those rows, summed)`,
    where `aggregate` maps [..., D] to [...]. A mean is (score, 1) with `mean_of_rows`; corpus BLEU is its counts.
    `rows` [N] is what is shown for a single row (nan where it has none).
    """

    stats: np.ndarray
    rows: np.ndarray
    signature: str  # enough to reproduce the number: tokenizer, case, version
    higher_is_better: bool | None = True  # None: neither (a length)
    aggregate: Callable[[np.ndarray], np.ndarray] = field(default=mean_of_rows)

    @staticmethod
    def mean(rows: np.ndarray, signature: str, *, higher_is_better: bool | None = True) -> Scores:
        """Scores of a metric that is the mean of its rows."""
        rows = np.asarray(rows, dtype=np.float64)
        return Scores(np.stack([rows, np.ones_like(rows)], -1), rows, signature, higher_is_better)

    @property
    def value(self) -> float:
        return float(self.aggregate(self.stats.sum(0)))
