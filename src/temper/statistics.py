"""How sure a number is, and whether two differ. Rows are the units: they are resampled, swapped and left out.

Nearly everything works on additive statistics (`Scores.stats`), so a corpus metric is resampled as exactly as a mean:
what a resample needs is how often each row is in it, and the metric is `aggregate(counts @ stats)`. Statistics of the
rows in order (`Scores.of_rows`, a quantile) are worked out anew for each resample.

Legend: n rows, d statistics a row, r resamples.
Sources: Efron and Tibshirani 1993, "An introduction to the bootstrap", chapters 11 (jackknife), 14 (BCa) and 15
(permutation); Phipson and Smyth 2010 (a permutation p is never 0); Holm 1979.
Covered is the sampling of test rows alone, not that of training runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from temper.types import Scores, mean_of_rows

Statistic = Callable[[np.ndarray], np.ndarray]  # sums [..., d] → [...]

_CHUNK = 1 << 20  # numbers held at once while resampling (8 MB)
_ROUNDING = 1e-10  # of the metric's own size: sums of the same rows in another order differ by less
_UNDEFINED = 0.05  # share of resamples without a value beyond which there is no interval
POWER, ALPHA = 0.8, 0.05  # of the smallest detectable difference; ALPHA over all comparisons together


@dataclass(frozen=True)
class Comparison:
    """b against a on the same rows. A field that does not exist is None.

    Attributes:
        difference: value of b minus value of a.
        low, high: its paired bootstrap interval (BCa).
        p: two-sided, of the paired permutation test; not corrected for other comparisons (`holm` does that).
        error: standard error of the difference, the jackknife's (of a mean: sd/√n exactly); of a quantile the bootstrap's.
        least_p: the smallest p that so many rows and resamples can give.
    """

    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    error: float | None
    least_p: float | None

    def smallest_detectable(self, comparisons: int = 1) -> float | None:
        """The least true difference that so many rows, with differences that vary as these do, would show in at least
        80 % of cases where `comparisons` p-values are adjusted together by `holm` and 0.05 is the limit.

        (z of the test + z of the power) · standard error at the level 0.05 / comparisons: a p below that is significant
        after Holm's correction whatever the other comparisons give; where others are clear too, a smaller difference
        may do. A normal approximation.

        Returns:
            None where the rows say nothing of the spread (they all differ alike), or where rows or resamples are so few
            that no p can come below that level.

        >>> round(Comparison(0.1, None, None, 0.2, error=1.0, least_p=0.0).smallest_detectable(), 4)  # 1.9600 + 0.8416
        2.8016
        >>> round(Comparison(0.1, None, None, 0.2, error=1.0, least_p=0.0).smallest_detectable(10), 4)  # 2.8070 + 0.8416
        3.6487
        """
        level = ALPHA / comparisons
        if self.error is None or self.least_p is None or self.least_p >= level:
            return None
        return float(ndtri(1 - level / 2) + ndtri(POWER)) * self.error


def interval(scores: Scores, *, seed: int, resamples: int = 10_000, level: float = 0.95) -> tuple[float, float] | None:
    """Bias-corrected and accelerated bootstrap interval of `scores.value` over rows.

    Of statistics of rows in order the percentile interval: the acceleration is the jackknife's, which is wrong for a
    quantile whatever the number of rows (Efron and Tibshirani 1993, section 11.6).

    The same seed gives the same interval, and draws the same rows for every metric on them.

    Returns:
        (low, high); (value, value) where no resample differs; None where n < 2 or the value is undefined, infinite or
        hangs on one row, and where `scores.resampled` is False.
    """
    if not scores.resampled:
        return None
    if scores.of_rows is not None:
        drawn = _ordered(scores.on, len(scores.rows), seed, resamples)
        return _percentiles(scores.value, drawn, level, _ROUNDING * abs(scores.value))
    stats = scores.stats.astype(np.float64)
    value = _quiet(scores.aggregate)
    return _interval(stats, value, abs(float(value(stats.sum(0)))), seed, resamples, level)


def compare(a: Scores, b: Scores, *, seed: int, resamples: int = 10_000, level: float = 0.95) -> Comparison:
    """b against a, row by row: what both find hard or easy cancels out.

    Raises:
        ValueError: a and b have different rows or are different metrics.
    """
    if a.stats.shape != b.stats.shape:
        raise ValueError(f"paired comparison of different rows: statistics {a.stats.shape} and {b.stats.shape}")
    if a.signature != b.signature:
        raise ValueError(f"comparison of different metrics: {a.signature} and {b.signature}")
    if not a.resampled:
        return Comparison(b.value - a.value, None, None, None, None, None)
    if a.of_rows is not None:
        return _compare_ordered(a, b, seed, resamples, level)
    width = a.stats.shape[1]
    value = _quiet(a.aggregate)

    def difference(sums: np.ndarray) -> np.ndarray:
        return value(sums[..., width:]) - value(sums[..., :width])

    stats = np.concatenate([a.stats, b.stats], axis=1).astype(np.float64)
    value_a, value_b = float(value(a.stats.sum(0))), float(value(b.stats.sum(0)))
    if not np.isfinite([value_a, value_b]).all():
        return Comparison(None, None, None, None, None, None)
    scale = max(abs(value_a), abs(value_b))
    low, high = _interval(stats, difference, scale, seed, resamples, level) or (None, None)
    total, change = stats.sum(0), np.roll(stats, width, axis=1) - stats  # what swapping a row adds to the sums
    p = _permutation_p(len(stats), lambda swaps: difference(total + swaps @ change), scale, seed, resamples)
    error = _standard_error(stats, difference, scale)
    return Comparison(value_b - value_a, low, high, p, error, _least_p(len(stats), resamples))


def _compare_ordered(a: Scores, b: Scores, seed: int, resamples: int, level: float) -> Comparison:
    """`compare` for statistics of rows in order."""
    of_rows, n = a.of_rows, len(a.rows)
    assert of_rows is not None
    difference, scale = b.value - a.value, max(abs(a.value), abs(b.value))
    drawn = _ordered(lambda rows: b.on(rows) - a.on(rows), n, seed, resamples)
    low, high = _percentiles(difference, drawn, level, _ROUNDING * scale) or (None, None)

    def swapped(swaps: np.ndarray) -> np.ndarray:
        return of_rows(np.where(swaps, a.rows, b.rows)) - of_rows(np.where(swaps, b.rows, a.rows))

    p = _permutation_p(n, swapped, scale, seed, resamples)
    error = float(drawn.std(ddof=1)) if n > 1 else 0.0
    return Comparison(difference, low, high, p, error if error > _ROUNDING * scale else None, _least_p(n, resamples))


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for how many there are (Holm's step-down); None stays None and is not counted.

    Raises:
        ValueError: a value outside 0–1.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    known = sorted((value, i) for i, value in enumerate(p) if value is not None)
    if not all(0 <= value <= 1 for value, _ in known):  # nan is outside too
        raise ValueError(f"not all are p-values: {list(p)}")
    adjusted: list[float | None] = [None] * len(p)
    floor = 0.0
    for rank, (value, i) in enumerate(known):
        floor = max(floor, min(1.0, (len(known) - rank) * value))
        adjusted[i] = floor
    return adjusted


def of_kept_rows(
    rows: np.ndarray, value: float, signature: str, higher: bool | None, tokens: np.ndarray | None = None
) -> Scores | None:
    """A metric's scores from what rows.parquet keeps of it: the mean of its rows, or of losses weighed by their tokens.

    Args:
        rows: the score of each row [N]; nan where it has none.
        value: what the evaluation says the metric is: whatever gives another value is not what was measured.
        tokens: of each row [N], where they were kept.

    Returns:
        None where neither gives that value: a corpus metric, a quantile.
    """
    known = ~np.isnan(rows)
    kind = signature.partition("|")[0]
    plain = np.stack([np.where(known, rows, 0.0), known.astype(np.float64)], axis=-1)
    found = Scores(plain, rows, signature, higher)
    if kind in ("loss", "perplexity") and tokens is not None:
        with np.errstate(divide="ignore"):
            nats = np.log(rows) if kind == "perplexity" else rows
        weighed = np.where(known[:, None], np.stack([nats * tokens, tokens], axis=-1), 0.0)
        found = Scores(weighed, rows, signature, higher, _exp_of_mean if kind == "perplexity" else mean_of_rows)
    if not known.any() or not np.isclose(found.value, value, rtol=1e-9, atol=1e-12):
        return None
    return found


def _exp_of_mean(sums: np.ndarray) -> np.ndarray:
    return np.exp(mean_of_rows(sums))


def _quiet(aggregate: Statistic) -> Statistic:
    """A resample may have no value (0/0) or be beyond floats; that is handled here, not warned of."""

    def value(sums: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.asarray(aggregate(sums), dtype=np.float64)

    return value


def _interval(
    stats: np.ndarray, statistic: Statistic, scale: float, seed: int, resamples: int, level: float
) -> tuple[float, float] | None:
    """scale: the size of the metric (not of a difference of it), against which rounding is told from spread."""
    value = float(statistic(stats.sum(0)))
    if len(stats) < 2 or not np.isfinite(value):
        return None
    left_out = _jackknife(stats, statistic)
    drawn = np.concatenate([statistic(sums) for sums in _bootstrap_sums(stats, seed, resamples)])
    drawn = drawn[np.isfinite(drawn)]
    if not np.isfinite(left_out).all() or len(drawn) < (1 - _UNDEFINED) * resamples:
        return None
    return _bca(value, drawn, left_out, level, _ROUNDING * scale)


def _bca(value: float, drawn: np.ndarray, left_out: np.ndarray, level: float, tolerance: float) -> tuple[float, float]:
    """Efron and Tibshirani 1993, equations 14.9 to 14.15, from bootstrap values [≤ r] and leave-one-out values [n]."""
    if np.ptp(drawn) <= tolerance:
        return value, value
    # Resamples that tie with the value count half, or a metric of few levels would look biased.
    below = np.mean(drawn < value - tolerance) / 2 + np.mean(drawn <= value + tolerance) / 2
    bias = ndtri(np.clip(below, 0.5 / len(drawn), 1 - 0.5 / len(drawn)))
    spread = left_out.mean() - left_out
    skew = np.sum(spread**3) / (6 * np.sum(spread**2) ** 1.5) if np.any(spread) else 0.0
    shift = bias + ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
    share = ndtr(bias + shift / np.maximum(1 - skew * shift, 1e-9))
    low, high = np.quantile(drawn, share)
    return float(low), float(high)


def _percentiles(value: float, drawn: np.ndarray, level: float, tolerance: float) -> tuple[float, float] | None:
    if len(drawn) < 2 or not np.isfinite(value):
        return None
    if np.ptp(drawn) <= tolerance:
        return value, value
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _ordered(statistic: Statistic, n: int, seed: int, resamples: int) -> np.ndarray:
    """A statistic of row indices [..., n] on bootstrap resamples [r]; none where one row is all there is."""
    return np.concatenate([statistic(rows) for rows in _bootstrap_rows(n, seed, resamples)]) if n > 1 else np.zeros(0)


def _bootstrap_rows(n: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Indices of rows drawn with replacement: [≤ r, n] at a time."""
    rng = np.random.default_rng([seed, 0])
    for size in _chunks(n, resamples):
        yield rng.integers(0, n, (size, n))


def _bootstrap_sums(stats: np.ndarray, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Summed statistics of rows drawn with replacement: [≤ r, d] at a time."""
    n = len(stats)
    for rows in _bootstrap_rows(n, seed, resamples):
        places = rows + np.arange(len(rows))[:, None] * n
        counts = np.bincount(places.ravel(), minlength=rows.size).reshape(rows.shape)
        yield counts.astype(np.float64) @ stats


def _chunks(n: int, resamples: int) -> Iterator[int]:
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        yield min(step, resamples - start)


def _jackknife(stats: np.ndarray, statistic: Statistic) -> np.ndarray:
    """The statistic without row i: [n]."""
    return statistic(stats.sum(0) - stats)


def _permutation_p(n: int, difference: Statistic, scale: float, seed: int, resamples: int) -> float:
    """Two-sided p of: nothing would change in distribution if a row's results of a and b were swapped.

    difference: which rows are swapped [≤ r, n], as 0 and 1 → b minus a [≤ r]. All 2^n swaps are tried where there are
    no more than `resamples`.
    """
    exact = _exact(n, resamples)
    least = abs(float(difference(np.zeros((1, n)))[0])) - _ROUNDING * scale
    as_large = 0
    for swaps in _all_swaps(n) if exact else _random_swaps(n, seed, resamples):
        as_large += np.count_nonzero(~(np.abs(difference(swaps)) < least))  # an undefined one counts against
    return as_large / 2**n if exact else (1 + as_large) / (1 + resamples)


def _all_swaps(n: int) -> Iterator[np.ndarray]:
    step = max(1, _CHUNK // n)
    for start in range(0, 2**n, step):
        codes = np.arange(start, min(start + step, 2**n))
        yield ((codes[:, None] >> np.arange(n)) & 1).astype(np.float64)


def _random_swaps(n: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng([seed, 1])
    for size in _chunks(n, resamples):
        yield rng.integers(0, 2, (size, n), dtype=np.int8).astype(np.float64)


def _exact(n: int, resamples: int) -> bool:
    """Whether all swaps of n rows are tried."""
    return n < 63 and 2**n <= resamples


def _least_p(n: int, resamples: int) -> float:
    """p of the clearest difference: no swap comes near it but the one of all rows, which turns its sign."""
    return 2 / 2**n if _exact(n, resamples) else max(1 / (1 + resamples), 2 / 2 ** min(n, 63))


def _standard_error(stats: np.ndarray, difference: Statistic, scale: float) -> float | None:
    """The jackknife's; None where the rows say nothing of the spread."""
    n = len(stats)
    left_out = _jackknife(stats, difference)
    if n < 2 or not np.isfinite(left_out).all():
        return None
    error = float(np.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2)))
    return error if error > _ROUNDING * scale else None
