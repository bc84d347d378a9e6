"""Intervals and tests: against closed forms, scipy, enumeration, and how often intervals cover what they are for."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from deltune.errors import DataError
from deltune.evaluation.statistics import (
    Z95,
    bootstrap,
    macro_mean,
    mcnemar,
    mean,
    paired,
    paired_by_id,
    paired_proportion_interval,
    percentiles,
    proportion,
    wilson_interval,
)


def test_wilson_interval_is_where_the_score_test_just_rejects():
    """The ends p solve (share - p)² = z² p (1 - p) / n, the definition of the interval."""
    for successes, count in [(0, 10), (1, 10), (5, 10), (10, 10), (37, 120)]:
        for end in wilson_interval(successes, count):
            assert (successes / count - end) ** 2 == pytest.approx(Z95**2 * end * (1 - end) / count, abs=1e-12)


def test_wilson_interval_against_values_worked_out_by_hand_and_scipy():
    """0 of n ends at z² / (n + z²)."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    for successes, count in [(0, 7), (3, 7), (381, 1531), (1531, 1531)]:
        theirs = stats.binomtest(successes, count).proportion_ci(method="wilson")
        assert wilson_interval(successes, count) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_a_mean_of_zeros_and_ones_is_a_proportion():
    assert mean([1, 0, 1, 1]) == proportion(3, 4)
    assert mean([True, False]) == proportion(1, 2)
    assert mean([1.0] * 5).low == pytest.approx(5 / (5 + Z95**2))
    assert mean([0.5, 0.25, 0.75]).value == 0.5 and mean([0.5, 0.25, 0.75]).n == 3


def test_bootstrap_of_a_mean_is_that_of_scipy():
    values = np.random.default_rng(3).gamma(2.0, size=150)
    ours = bootstrap(values, resamples=20000, seed=1)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(2))
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.value == pytest.approx(values.mean(), abs=1e-12)
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.05 * width)
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4) != bootstrap(values, seed=5)


def test_bootstrap_of_a_ratio_of_sums_resamples_the_items():
    """Each resample's ratio, worked out one by one from the same draws."""
    pairs = np.random.default_rng(0).uniform(1, 10, size=(12, 2))
    ours = bootstrap(pairs, lambda means: means[:, 0] / means[:, 1], resamples=300, seed=7)
    rng, drawn = np.random.default_rng(7), []
    for counts in rng.multinomial(12, [1 / 12] * 12, size=300):
        chosen = pairs[np.repeat(np.arange(12), counts)]
        drawn.append(chosen[:, 0].sum() / chosen[:, 1].sum())
    assert ours.value == pytest.approx(pairs[:, 0].sum() / pairs[:, 1].sum())
    assert (ours.low, ours.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))


def test_chunks_of_resamples_change_nothing(monkeypatch):
    values, others = np.random.default_rng(1).uniform(size=(2, 40))
    whole, test = bootstrap(values), paired(values, others)
    monkeypatch.setattr("deltune.evaluation.statistics.CHUNK", 40 * 7)
    parts = bootstrap(values)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)
    assert paired(values, others).p == test.p


def test_macro_mean_of_groups_of_one_size_is_wilsons_of_all():
    groups = [[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    score = macro_mean(groups)
    assert (score.value, score.n) == (8 / 12, 12)
    assert (score.low, score.high) == pytest.approx(wilson_interval(8, 12))


def test_macro_mean_weighs_groups_alike():
    score = macro_mean([[1] * 90 + [0] * 10, [0, 1]])
    assert score.value == pytest.approx(0.7) and score.n == 102
    effective = 4 / (1 / 100 + 1 / 2)
    assert (score.low, score.high) == pytest.approx(wilson_interval(0.7 * effective, effective))
    everything = macro_mean([[1] * 100, [1, 1]])
    assert everything.high == 1 and everything.low == pytest.approx(effective / (effective + Z95**2))


def test_macro_mean_of_other_values_has_the_variance_within_groups():
    groups = [[0.1, 0.5, 0.3], [0.9, 0.7], [0.4]]
    score = macro_mean(groups)
    first, second = np.var(groups[0], ddof=1), np.var(groups[1], ddof=1)
    pooled = (2 * first + second) / 3
    half = Z95 * math.sqrt(first / 3 + second / 2 + pooled) / 3
    assert score.value == pytest.approx((0.3 + 0.8 + 0.4) / 3)
    assert (score.low, score.high) == pytest.approx((score.value - half, score.value + half))


@pytest.mark.parametrize("low", [0.25, 0.6, 0.9])
def test_the_macro_interval_covers_the_truth(low):
    """57 groups of MMLU's kind of sizes, as hard as each other or not: 95 % of the intervals hold the true macro mean."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(8, 60, size=57)
    rates = rng.uniform(low, 1.0, size=57) if low > 0.25 else np.full(57, low)
    covered = 0
    for _ in range(400):
        score = macro_mean([rng.random(size) < rate for size, rate in zip(sizes, rates, strict=True)])
        covered += score.low <= rates.mean() <= score.high
    assert 0.92 <= covered / 400 <= 0.995


def test_mcnemar_is_scipys_binomial_test():
    for better, worse in [(0, 0), (1, 0), (5, 5), (10, 2), (2, 10), (60, 35), (1200, 1100)]:
        expected = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
        assert mcnemar(better, worse) == pytest.approx(expected, rel=1e-9)


def test_paired_zeros_and_ones():
    first = [1] * 30 + [1] * 8 + [0] * 2 + [0] * 10
    second = [1] * 30 + [0] * 8 + [1] * 2 + [0] * 10
    found = paired(first, second)
    assert (found.difference, found.better, found.worse, found.n, found.test) == (6 / 50, 8, 2, 50, "mcnemar")
    assert found.p == pytest.approx(stats.binomtest(2, 10).pvalue)
    # Bonett and Price: one more item on each side, then Wald
    up, down = 9 / 52, 3 / 52
    half = Z95 * math.sqrt((up + down - (up - down) ** 2) / 52)
    assert (found.low, found.high) == pytest.approx((up - down - half, up - down + half))
    swapped = paired(second, first)
    assert (swapped.difference, swapped.low, swapped.high) == pytest.approx((-found.difference, -found.high, -found.low))
    assert swapped.p == found.p
    same = paired(first, first)
    assert (same.difference, same.p) == (0, 1) and same.low < 0 < same.high


def test_the_paired_interval_covers_the_truth():
    rng, covered = np.random.default_rng(5), 0
    for _ in range(2000):
        better, worse, _ = rng.multinomial(60, [0.15, 0.05, 0.8])
        low, high = paired_proportion_interval(better, worse, 60)
        covered += low <= 0.1 <= high
    assert 0.93 <= covered / 2000 <= 0.98


def test_the_swap_test_is_the_enumeration_of_all_swaps():
    rng = np.random.default_rng(2)
    first, second = rng.uniform(size=11), rng.uniform(size=11) - 0.2
    gaps = first - second
    sums = [abs(np.dot(signs, gaps)) for signs in itertools.product([-1, 1], repeat=11)]
    exact = np.mean(np.array(sums) >= abs(gaps.sum()) - 1e-12)
    found = paired(first, second)
    assert found.test == "permutation" and found.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 1e4))
    assert found.difference == pytest.approx(gaps.mean())
    own = bootstrap(gaps)
    assert (found.low, found.high) == pytest.approx((own.low, own.high))


def test_p_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(9)
    found = [paired(*rng.normal(size=(2, 25))).p for _ in range(200)]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert paired([0.5, 0.25, 1.0], [0.5, 0.25, 1.0]).p == 1


def test_a_paired_statistic_that_is_no_mean():
    """A ratio of sums: swapping an item swaps all of its numbers."""
    rng = np.random.default_rng(4)
    first, second = rng.uniform(1, 2, size=(10, 2)), rng.uniform(1, 2, size=(10, 2))
    second[:, 0] *= 0.8
    def ratio(means):
        return means[:, 0] / means[:, 1]

    found = paired(first, second, ratio)
    gaps = []
    for swaps in itertools.product([False, True], repeat=10):
        mask = np.array(swaps)[:, None]
        one, two = np.where(mask, second, first).sum(axis=0), np.where(mask, first, second).sum(axis=0)
        gaps.append(abs(one[0] / one[1] - two[0] / two[1]))
    exact = np.mean(np.array(gaps) >= gaps[0] - 1e-12)
    assert found.difference == pytest.approx(first[:, 0].sum() / first[:, 1].sum() - second[:, 0].sum() / second[:, 1].sum())
    assert found.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 1e4) + 1e-4)


def test_a_paired_macro_mean():
    groups = ["a"] * 4 + ["b"] * 2
    first, second = [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0]
    found = paired(first, second, groups=groups)
    assert found.difference == pytest.approx((2 / 4 - 1 / 2) / 2) and found.test == "permutation"
    assert found.p == 1 and found.low < 0 < found.high and (found.better, found.worse) == (2, 1)
    alike = paired(first, second, groups=["a", "a", "a", "b", "b", "b"])
    plain = paired(first, second)
    assert (alike.difference, alike.low, alike.high) == pytest.approx((plain.difference, plain.low, plain.high))
    graded = paired([0.5, 0.7, 0.2, 0.4, 0.9, 0.6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], groups=groups)
    expected = macro_mean([[0.4, 0.5, -0.1, 0.0], [0.4, 0.0]])
    assert (graded.difference, graded.low, graded.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_pairs_are_joined_by_id():
    first, second = {"a": 1, "b": 0, "c": 1}, {"c": 0, "a": 1, "b": 0}
    assert paired_by_id(first, second) == paired([1, 0, 1], [1, 0, 0])
    groups = {"c": "z", "b": "y", "a": "y"}
    assert paired_by_id(first, second, groups=groups) == paired([1, 0, 1], [1, 0, 0], groups=["y", "y", "z"])
    with pytest.raises(DataError, match=r"2 only in the first \(such as b\) and 1 only in the second \(such as x\)"):
        paired_by_id(first, {"a": 1, "x": 0})


def test_what_cannot_be_averaged_is_refused():
    for empty in (lambda: mean([]), lambda: proportion(0, 0), lambda: macro_mean([]), lambda: macro_mean([[1], []]), lambda: paired([], [])):
        with pytest.raises(DataError, match="no items"):
            empty()
    with pytest.raises(DataError, match="not a number"):
        mean([0.1, math.nan])
    with pytest.raises(DataError, match="the same items on both sides: 2 and 3"):
        paired([1, 0], [1, 0, 1])
    with pytest.raises(DataError, match="the same items"):
        paired([1, 0], [1, 0], groups=["a"])
    assert all(math.isnan(end) for end in percentiles(np.array([math.nan])))
