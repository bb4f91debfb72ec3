"""Intervals and tests against scipy, enumeration by hand and simulation."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest
import scipy.stats

from temper import metrics, statistics
from temper.metrics.toxicity import highest, p95
from temper.statistics import compare, holm, interval
from temper.types import Outputs, Scores


def mean(rows) -> Scores:
    return Scores.mean(np.asarray(rows), "score|v1")


def likelihoods(nll, tokens, name="loss") -> Scores:
    n = len(nll)
    out = Outputs([""] * n, [""] * n, [""] * n, [True] * n, np.asarray(nll, float), np.asarray(tokens))
    return metrics.compute([name], out)[name]


@pytest.fixture
def skewed():
    return np.random.default_rng(1).lognormal(0, 1.2, 40)


def test_the_worked_numbers_in_docstrings_hold():
    assert doctest.testmod(statistics).failed == 0


# Interval


def test_bca_is_scipys(skewed):
    def scipys(method):
        result = scipy.stats.bootstrap(
            (skewed,), np.mean, n_resamples=40_000, method=method, rng=np.random.default_rng(5)
        )
        return np.array(result.confidence_interval)

    ours = np.array(interval(mean(skewed), seed=3, resamples=40_000))
    far = np.abs(scipys("BCa") - scipys("percentile"))
    assert np.all(np.abs(ours - scipys("BCa")) < 0.25 * far), "nearer to BCa than BCa is to the percentile interval"
    assert ours == pytest.approx(scipys("BCa"), rel=0.02)


def test_level_is_coverage(skewed):
    ours = interval(mean(skewed), seed=3, resamples=20_000, level=0.8)
    result = scipy.stats.bootstrap(
        (skewed,), np.mean, n_resamples=20_000, confidence_level=0.8, method="BCa", rng=np.random.default_rng(5)
    )
    assert ours == pytest.approx(tuple(result.confidence_interval), rel=0.03)


def test_coverage_on_a_skewed_distribution():
    rng = np.random.default_rng(7)
    hits = 0
    for seed in range(300):
        low, high = interval(mean(rng.exponential(1.0, 60)), seed=seed, resamples=2_000)
        hits += low <= 1.0 <= high
    # 95 % of 300 has a standard error of 1.3 %; BCa at n = 60 is known to fall a percent or two short.
    assert 0.90 <= hits / 300 <= 0.985


def test_a_corpus_metric_is_resampled_as_rows_not_as_a_mean_of_rows():
    rng = np.random.default_rng(2)
    tokens = rng.integers(1, 200, 50)
    nll = tokens * rng.gamma(4, 0.5, 50)
    low, high = interval(likelihoods(nll, tokens, "perplexity"), seed=0, resamples=20_000)

    def perplexity(nll, tokens):
        return np.exp(nll.sum(-1) / tokens.sum(-1))

    result = scipy.stats.bootstrap(
        (nll, tokens), perplexity, paired=True, vectorized=False, n_resamples=4_000, rng=np.random.default_rng(1)
    )
    assert (low, high) == pytest.approx(tuple(result.confidence_interval), rel=0.05)
    assert high < np.exp(nll / tokens).mean()  # the mean of the rows' perplexities is another quantity


def test_a_seed_decides_and_memory_does_not(skewed, monkeypatch):
    first = interval(mean(skewed), seed=3)
    assert interval(mean(skewed), seed=3) == first and interval(mean(skewed), seed=4) != first
    one = compare(mean(skewed), mean(skewed[::-1]), seed=3)
    monkeypatch.setattr(statistics, "_CHUNK", 40 * 7)  # 10,000 is no multiple of 7: the last piece is smaller
    assert interval(mean(skewed), seed=3) == pytest.approx(first, rel=1e-12)
    assert compare(mean(skewed), mean(skewed[::-1]), seed=3).p == one.p


def test_where_there_is_no_interval():
    assert interval(mean([0.3] * 20), seed=0) == pytest.approx((0.3, 0.3))
    assert interval(mean([0.0] * 20), seed=0) == (0, 0)
    assert interval(likelihoods(0.1 * np.arange(1, 30), np.arange(1, 30)), seed=0) == pytest.approx((0.1, 0.1))
    assert interval(mean([0.3]), seed=0) is None
    assert interval(mean([0.3, np.nan, 0.4]), seed=0) is None
    assert interval(likelihoods([1e5, 1.0], [1, 1], "perplexity"), seed=0) is None


def test_rows_without_a_score_are_left_out_unless_all_hangs_on_one():
    def distinct(predictions):
        n = len(predictions)
        return metrics.compute(["distinct_1"], Outputs([""] * n, predictions, [""] * n, [True] * n))["distinct_1"]

    texts = ["a b c", "a a", "a a b", "b b b b", "b c d d"] * 3
    assert interval(distinct([*texts, "", ""]), seed=0) == pytest.approx(interval(distinct(texts), seed=0), rel=0.1)
    assert interval(distinct(["a a b", "", ""]), seed=0) is None
    assert interval(distinct(["", "", ""]), seed=0) is None
    nothing = compare(distinct(["", ""]), distinct(["a", "b"]), seed=0)
    assert nothing.difference is None and nothing.p is None


def test_ties_of_a_metric_with_few_levels_do_not_bias(skewed):
    rows = [1.0] * 10 + [0.0] * 10
    low, high = interval(mean(rows), seed=0)
    assert low + high == pytest.approx(1.0, abs=0.051)  # symmetric but for one level of 1/20
    assert 0.2 < low < 0.35


# Comparison


def test_p_is_scipys_paired_permutation_test():
    rng = np.random.default_rng(3)
    for n, shift in [(9, 0.5), (12, 0.0), (40, 0.25)]:  # all swaps, all swaps, 10,000 of them
        a = rng.normal(size=n)
        b = a + shift + rng.normal(size=n) * 0.6
        theirs = scipy.stats.permutation_test(
            (a, b),
            lambda x, y, axis: np.mean(y, axis) - np.mean(x, axis),
            permutation_type="samples",
            n_resamples=10_000,
            rng=np.random.default_rng(0),
        )
        ours = compare(mean(a), mean(b), seed=1)
        assert ours.difference == pytest.approx(theirs.statistic)
        assert (
            ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
            if n <= 13
            else ours.p == pytest.approx(theirs.pvalue, abs=0.01)
        )


def test_exact_p_of_a_ratio_by_enumeration():
    tokens, n = np.array([3, 50, 7, 20, 11, 2]), 6
    a, b = np.array([6.0, 60, 9, 30, 25, 8]), np.array([5.0, 40, 8, 31, 20, 7])
    losses = []
    for swap in itertools.product([False, True], repeat=n):
        left, right = np.where(swap, b, a), np.where(swap, a, b)
        losses.append(right.sum() / tokens.sum() - left.sum() / tokens.sum())
    expected = np.mean(np.abs(losses) >= abs(losses[0]) - 1e-12)
    assert compare(likelihoods(a, tokens), likelihoods(b, tokens), seed=0).p == expected
    # Few random swaps instead of all 64 estimate the same p, and never 0.
    sampled = compare(likelihoods(a, tokens), likelihoods(b, tokens), seed=0, resamples=63).p
    assert sampled is not None and sampled == pytest.approx(expected, abs=0.1) and (sampled * 64) % 1 == 0


def test_p_is_never_zero_and_equal_models_have_one():
    rows = np.random.default_rng(0).normal(size=100)
    assert compare(mean(rows), mean(rows + 1), seed=0, resamples=999).p == 1 / 1000
    same = compare(mean(rows), mean(rows), seed=0)
    assert (same.difference, same.low, same.high, same.p, same.smallest_detectable()) == (0, 0, 0, 1, None)
    tokens = np.random.default_rng(0).integers(1, 9, 100)
    losses = likelihoods(tokens * 0.7, tokens)
    assert compare(losses, losses, seed=0).p == 1


def test_p_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(11)
    p = [
        compare(mean(rng.exponential(size=15)), mean(rng.exponential(size=15)), seed=s, resamples=500).p
        for s in range(300)
    ]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


def test_the_interval_of_a_difference_is_paired_and_bca(skewed):
    rng = np.random.default_rng(4)
    a = skewed * 10
    b = a + rng.exponential(0.5, 40) - 0.2
    ours = compare(mean(a), mean(b), seed=0, resamples=20_000)
    of_differences = interval(mean(b - a), seed=0, resamples=20_000)
    assert (ours.low, ours.high) == pytest.approx(of_differences, abs=1e-9)  # the same rows drawn for both
    assert ours.difference == pytest.approx((b - a).mean())


def test_silence_20_a_paired_comparison_sees_what_an_unpaired_one_does_not():
    """Rows differ by far more than models do, and each model meets the same rows."""
    rng = np.random.default_rng(20)
    a = rng.uniform(0, 1, 100)
    b = a + 0.02 + rng.normal(0, 0.03, 100)
    assert scipy.stats.ttest_ind(a, b).pvalue > 0.3
    assert scipy.stats.mannwhitneyu(a, b).pvalue > 0.3
    alone = interval(mean(a), seed=0), interval(mean(b), seed=0)
    assert alone[0][1] > alone[1][0], "the two intervals overlap"
    ours = compare(mean(a), mean(b), seed=0)
    assert ours.p < 0.001 and 0 < ours.low < 0.02 < ours.high


def test_the_smallest_detectable_difference_is_detected_four_times_in_five():
    rng = np.random.default_rng(6)
    n, sd = 60, 0.3
    base = rng.normal(size=n)
    noise = rng.normal(0, sd, n)
    noise = (noise - noise.mean()) / noise.std(ddof=1) * sd
    least = compare(mean(base), mean(base + noise), seed=0).smallest_detectable()
    assert least == pytest.approx((1.959964 + 0.841621) * sd / np.sqrt(n), rel=1e-5)
    found = sum(
        compare(mean(base), mean(base + rng.normal(least, sd, n)), seed=s, resamples=400).p < 0.05 for s in range(300)
    )
    assert 0.72 <= found / 300 <= 0.87  # standard error 2.3 %


def test_the_smallest_detectable_difference_holds_after_holm():
    """Eight comparisons of which one is true: at least four times in five its adjusted p is below 0.05."""
    rng = np.random.default_rng(7)
    n, sd, together = 60, 0.3, 8
    base = rng.normal(size=n)
    noise = rng.normal(0, sd, n)
    least = compare(mean(base), mean(base + noise), seed=0).smallest_detectable(together)
    z = scipy.stats.norm.isf(0.05 / together / 2) + scipy.stats.norm.isf(0.2)
    assert least == pytest.approx(z * scipy.stats.sem(noise), rel=1e-5)
    least *= sd / np.std(noise, ddof=1)
    found = 0
    for seed in range(200):
        true = compare(mean(base), mean(base + rng.normal(least, sd, n)), seed=seed, resamples=1000).p
        adjusted = holm([true, *rng.uniform(size=together - 1)])  # where nothing differs, p is uniform
        found += adjusted[0] < 0.05
    assert 0.72 <= found / 200 <= 0.9  # standard error 2.8 %


def test_five_rows_can_show_nothing():
    five = compare(mean([1, 2, 3, 4, 5.0]), mean([2, 3.5, 4, 6, 7.0]), seed=0)
    assert five.p == 2 / 32 == five.least_p and five.smallest_detectable() is None
    assert compare(mean([1.0]), mean([2.0]), seed=0).p == 1


def test_too_few_rows_or_resamples_for_the_level_can_show_nothing():
    rng = np.random.default_rng(8)
    a = rng.normal(size=7)
    seven = compare(mean(a), mean(a + rng.normal(5, 1, 7)), seed=0)
    assert seven.p == 2 / 128  # the clearest there is
    assert seven.smallest_detectable(3) is not None and seven.smallest_detectable(4) is None
    a = rng.normal(size=50)
    few = compare(mean(a), mean(a + rng.normal(5, 1, 50)), seed=0, resamples=100)
    assert few.p == 1 / 101
    assert few.smallest_detectable(5) is not None and few.smallest_detectable(6) is None


def test_only_the_same_metric_on_the_same_rows_is_compared():
    with pytest.raises(ValueError, match="different rows"):
        compare(mean([1, 2, 3]), mean([1, 2]), seed=0)
    with pytest.raises(ValueError, match="different metrics"):
        compare(likelihoods([1, 2], [1, 1]), likelihoods([1, 2], [1, 1], "perplexity"), seed=0)


# Many comparisons


def test_holm_by_hand():
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04, and none below the one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9, 0.6]) == [1, 1, 1]
    assert holm([0.02, None, 0.03]) == pytest.approx([0.04, None, 0.04])
    assert holm([]) == [] and holm([0.2]) == [0.2]
    for wrong in (float("nan"), -0.1, 1.1):
        with pytest.raises(ValueError, match="not all are p-values"):
            holm([0.1, wrong])


def test_many_rows_take_little_memory():
    import tracemalloc

    scores = mean(np.random.default_rng(0).normal(size=50_000))
    tracemalloc.start()
    interval(scores, seed=0, resamples=60)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # all counts at once: 24 MB a copy; in pieces of 8 MB, three live at a time


# Rows in order


def quantile(rows) -> Scores:
    return Scores.order(np.asarray(rows), p95, "p95|v1")


def test_the_interval_of_a_quantile_is_scipys_percentile_bootstrap(skewed):
    result = scipy.stats.bootstrap(
        (skewed,), p95, n_resamples=40_000, method="percentile", rng=np.random.default_rng(5)
    )
    ours = interval(quantile(skewed), seed=3, resamples=40_000)
    assert ours == pytest.approx(tuple(result.confidence_interval), rel=0.02)
    assert ours[0] < quantile(skewed).value < ours[1]
    assert interval(quantile(skewed), seed=3, resamples=2_000) == interval(quantile(skewed), seed=3, resamples=2_000)


def test_quantiles_are_compared_by_swapping_rows():
    """Every swap of seven rows by hand."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 7), rng.normal(1, 1, 7)
    found = compare(quantile(a), quantile(b), seed=0, resamples=5_000)
    assert found.difference == pytest.approx(np.quantile(b, 0.95) - np.quantile(a, 0.95))
    all_swaps = [np.array(s, bool) for s in itertools.product([0, 1], repeat=7)]
    differences = [np.quantile(np.where(s, a, b), 0.95) - np.quantile(np.where(s, b, a), 0.95) for s in all_swaps]
    assert found.p == np.mean(np.abs(differences) >= abs(found.difference) - 1e-12)

    def paired(a, b, axis=-1):
        return np.quantile(b, 0.95, axis=axis) - np.quantile(a, 0.95, axis=axis)

    result = scipy.stats.bootstrap(
        (a, b), paired, paired=True, n_resamples=20_000, method="percentile", rng=np.random.default_rng(5)
    )
    found = compare(quantile(a), quantile(b), seed=0, resamples=20_000)
    assert (found.low, found.high) == pytest.approx(tuple(result.confidence_interval), abs=0.03)
    assert found.error == pytest.approx(result.standard_error, rel=0.05)


def test_a_quantile_of_equal_rows_is_certain_and_of_one_row_is_not():
    assert interval(quantile([0.5] * 9), seed=0, resamples=200) == (0.5, 0.5)
    assert interval(quantile([0.5]), seed=0, resamples=200) is None
    same = compare(quantile([0.1, 0.5, 0.9]), quantile([0.1, 0.5, 0.9]), seed=0, resamples=200)
    assert (same.difference, same.p, same.error) == (0, 1, None)


def test_a_maximum_has_neither_interval_nor_test():
    a, b = (Scores.order(rows, highest, "max|v1", resampled=False) for rows in (np.arange(9.0), np.arange(1.0, 10.0)))
    assert interval(a, seed=0) is None
    found = compare(a, b, seed=0)
    assert found.difference == 1 and (found.low, found.high, found.p, found.smallest_detectable()) == (None,) * 4
