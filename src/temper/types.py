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
    `kl` is the divergence of this model from another along its own prediction, in nats summed over its tokens.
    `toxicity` is a classifier's probability that each of a prompt's k answers is toxic (or has the label asked for), its
    prediction first.
    `rewards` are a reward model's, of each prompt and prediction as one text; `second_rewards` are another one's.
    `pairs` are log-probabilities of whole answers in nats, of the chosen and of the rejected one, summed over their
    `pair_tokens` tokens (end tokens included); `reference_pairs` are a reference model's. A pair that was not scored is nan.
    `wins` are 1 where this model's answer was judged better than another model's, 0 where worse, 0.5 for a tie, nan where
    the judge's words could not be read.
    """

    prompts: list[str]
    predictions: list[str]
    references: list[str]
    ended: list[bool]
    nll: np.ndarray | None = None  # float64 [N]
    tokens: np.ndarray | None = None  # int64 [N]
    toxicity: np.ndarray | None = None  # float64 [N, k]
    kl: np.ndarray | None = None  # float64 [N]
    kl_to: str = ""  # the model that `kl` is measured from
    classifier: str = ""  # which one and which of its labels: part of the signature of what it scored
    rewards: np.ndarray | None = None  # float64 [N]
    second_rewards: np.ndarray | None = None  # float64 [N]
    reward_models: tuple[str, ...] = ()  # which they are
    pairs: np.ndarray | None = None  # float64 [N, 2]
    pair_tokens: np.ndarray | None = None  # int64 [N, 2]
    reference_pairs: np.ndarray | None = None  # float64 [N, 2]
    reference: str = ""  # which model that is
    wins: np.ndarray | None = None  # float64 [N]
    duel: str = ""  # against which model, and judged by which


def mean_of_rows(sums: np.ndarray) -> np.ndarray:
    """Aggregate for `stats` of columns (score, 1): [..., 2] → [...]."""
    return sums[..., 0] / sums[..., 1]


def known_mean(sums: np.ndarray) -> np.ndarray:
    """`mean_of_rows` where there may be no rows at all: nan."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return mean_of_rows(sums)


@dataclass(frozen=True)
class Scores:
    """One metric on N rows, in a form that can be resampled.

    Most are additive: `stats` [N, D] are statistics of single rows, and the metric on any multiset of rows is
    `aggregate(stats of those rows, summed)`, where `aggregate` maps [..., D] to [...]. A mean is (score, 1) with
    `mean_of_rows`; corpus BLEU is its counts. A quantile is no function of sums: there `of_rows` maps the rows of a
    multiset [..., M] to [...], and `stats` are not looked at.
    `rows` [N] is what is shown for a single row (nan where it has none).
    """

    stats: np.ndarray
    rows: np.ndarray
    signature: str  # enough to reproduce the number: tokenizer, case, version
    higher_is_better: bool | None = True  # None: neither (a length)
    aggregate: Callable[[np.ndarray], np.ndarray] = field(default=mean_of_rows)
    of_rows: Callable[[np.ndarray], np.ndarray] | None = None
    resampled: bool = True  # False: neither interval nor test, since resampling says nothing of it (a maximum)
    notice: str | None = None  # what a reader of the number must know

    @staticmethod
    def mean(rows: np.ndarray, signature: str, *, higher_is_better: bool | None = True) -> Scores:
        """Scores of a metric that is the mean of its rows."""
        rows = np.asarray(rows, dtype=np.float64)
        return Scores(np.stack([rows, np.ones_like(rows)], -1), rows, signature, higher_is_better)

    @staticmethod
    def mean_of_known(rows: np.ndarray, signature: str, *, higher_is_better: bool | None = True) -> Scores:
        """As `mean`, of the rows that have a score: one that is nan counts neither above nor below."""
        rows = np.asarray(rows, dtype=np.float64)
        known = ~np.isnan(rows)
        stats = np.stack([np.where(known, rows, 0.0), known.astype(np.float64)], -1)
        return Scores(stats, rows, signature, higher_is_better, known_mean)

    @staticmethod
    def order(
        rows: np.ndarray,
        statistic: Callable[[np.ndarray], np.ndarray],
        signature: str,
        *,
        higher_is_better: bool | None = True,
        resampled: bool = True,
    ) -> Scores:
        """Scores of a metric that is a function of its rows in order: a quantile, a maximum. [..., M] → [...]."""
        rows = np.asarray(rows, dtype=np.float64)
        return Scores(rows[:, None], rows, signature, higher_is_better, of_rows=statistic, resampled=resampled)

    def on(self, chosen: np.ndarray) -> np.ndarray:
        """The metric on multisets of rows, given by their indices [..., M] → [...]."""
        if self.of_rows is not None:
            return self.of_rows(self.rows[chosen])
        return self.aggregate(self.stats[chosen].sum(-2))

    @property
    def scored(self) -> int:
        """Rows that have a score."""
        return int(np.count_nonzero(~np.isnan(self.rows)))

    @property
    def value(self) -> float:
        return float(self.on(np.arange(len(self.rows))))
