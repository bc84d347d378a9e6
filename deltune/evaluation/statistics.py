"""How sure a number is: every score is a value with its 95 % interval and the count of items behind it.

The items (questions, rows) are what was sampled: intervals say what other items of the same kind would have given, not
what another training run would. Groups (subjects, categories) are fixed. What is drawn at random is drawn from a seed,
so that the same items give the same interval. Shapes: n items, k numbers per item, r resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from deltune.errors import DataError

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
RESAMPLES = 2000
FLIPS = 9999  # with the observed arrangement 10,000: the smallest p is 0.0001
CHUNK = 4_000_000  # items drawn at once: 32 MB
# a number for each row of means over items, [r, k] -> [r]
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Score:
    """A number with the ends of its 95 % interval; n is the count of items it was computed from."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Paired:
    """Two systems on the same items. `difference` is first minus second; p is two-sided, of no difference.

    `better` and `worse` count the items on which the first is above and below the second.
    """

    difference: float
    low: float
    high: float
    p: float
    n: int
    better: int
    worse: int
    test: str  # "mcnemar" | "permutation"

    def as_dict(self) -> dict[str, float | str]:
        return asdict(self)


def wilson_interval(successes: float, count: float, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95 % by default (E. B. Wilson, JASA 22, 1927)."""
    share, square = successes / count, z * z
    center = (share + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(max(0.0, share * (1 - share)) / count + square / (4 * count * count))
    return max(0.0, center - half), min(1.0, center + half)


def proportion(successes: int, count: int) -> Score:
    """successes / count with Wilson's interval. DataError where count is 0."""
    _require(count)
    return Score(successes / count, *wilson_interval(successes, count), count)


def mean(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> Score:
    """The mean of one value per item: with Wilson's interval where all are 0 or 1, else with that of the bootstrap."""
    values = _numbers(values)
    if _binary(values):
        return proportion(int(values.sum()), len(values))
    return bootstrap(values, seed=seed)


def macro_mean(groups: Sequence[Sequence[float] | np.ndarray]) -> Score:
    """The unweighted mean over groups of each group's mean; n counts items. DataError for an empty group.

    Of zeros and ones: Wilson's interval at the effective size G² / sum(1 / n_g), which is what G groups of these sizes
    are worth where the groups are alike; where they differ the interval is a little wide, never narrow, and it stays
    honest where all is right. Of other values: normal, from the variance within groups; a group of one item takes the
    pooled one.
    """
    parts = [_numbers(group) for group in groups]
    _require(len(parts))
    sizes = np.array([len(part) for part in parts], dtype=np.float64)
    value = float(np.mean([part.mean() for part in parts]))
    count = int(sizes.sum())
    if all(_binary(part) for part in parts):
        effective = len(parts) ** 2 / float((1 / sizes).sum())
        return Score(value, *wilson_interval(value * effective, effective), count)
    half = Z95 * math.sqrt(_macro_variance(parts, sizes))
    return Score(value, value - half, value + half, count)


def bootstrap(
    values: Sequence[float] | np.ndarray,
    statistic: Statistic | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Score:
    """A statistic of the means of `values` [n] or [n, k] over items, with its percentile interval (Efron, 1979).

    Ratios of sums and corpus scores are such statistics: `statistic` maps [r, k] to [r], by default the first column.
    Resamples on which it is not a number (a ratio whose denominator was not drawn) are left out.
    """
    table = _table(values)
    statistic = statistic or first_column
    drawn = np.concatenate([statistic(weights @ table / len(table)) for weights in _resampled(len(table), resamples, seed)])
    value = float(statistic(table.mean(axis=0, keepdims=True))[0])
    return Score(value, *percentiles(drawn), len(table))


def percentiles(drawn: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of what resamples gave; (nan, nan) where none gave a number."""
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) == 0:
        return math.nan, math.nan
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def paired(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    statistic: Statistic | None = None,
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Paired:
    """Whether two systems differ on the same items, given in the same order as [n] or [n, k].

    Zeros and ones: McNemar's exact test, and the interval of Bonett and Price (J. Educ. Behav. Stat. 37, 2012). Other
    values and statistics: each item's two values are swapped or not, 9,999 times, and p is the share of arrangements
    at least as far apart as the observed one, which is counted too (Phipson and Smyth, 2010); the interval is of the
    bootstrap over items. With `groups` (one name per item) the difference is that of macro means. DataError where the
    counts differ.
    """
    one, two = _table(first), _table(second)
    if one.shape != two.shape or (groups is not None and len(groups) != len(one)):
        raise DataError(f"a paired comparison needs the same items on both sides: {len(one)} and {len(two)} were given")
    better, worse = int((one[:, 0] > two[:, 0]).sum()), int((one[:, 0] < two[:, 0]).sum())
    if groups is not None:
        if statistic is not None:
            raise ValueError("a statistic of groups is their macro mean")
        return _paired_macro(one[:, 0], two[:, 0], groups, better, worse, seed)
    if statistic is None and one.shape[1] == 1 and _binary(one) and _binary(two):
        low, high = paired_proportion_interval(better, worse, len(one))
        return Paired((better - worse) / len(one), low, high, mcnemar(better, worse), len(one), better, worse, "mcnemar")
    statistic = statistic or first_column
    width = one.shape[1]
    both = np.concatenate([one, two], axis=1)
    score = bootstrap(both, lambda means: statistic(means[:, :width]) - statistic(means[:, width:]), seed=seed)
    return Paired(score.value, score.low, score.high, _swap_test(one, two, statistic, seed), len(one), better, worse, "permutation")


def paired_by_id(
    first: Mapping[str, float], second: Mapping[str, float], *, groups: Mapping[str, str] | None = None, seed: int = 0
) -> Paired:
    """`paired` of values by item id. `groups`, by id too, makes it one of macro means. DataError where ids differ."""
    require_same_ids(first, second)
    ids = list(first)
    names = None if groups is None else [groups[i] for i in ids]
    return paired([first[i] for i in ids], [second[i] for i in ids], groups=names, seed=seed)


def require_same_ids(first: Mapping[str, object], second: Mapping[str, object]) -> None:
    """DataError that counts and shows the items which only one side has."""
    lone = [
        f"{len(found)} only in the {side} (such as {min(found)})"
        for side, found in (("first", first.keys() - second.keys()), ("second", second.keys() - first.keys()))
        if found
    ]
    if lone:
        raise DataError(f"a paired comparison needs the same items on both sides: {' and '.join(lone)}")


def _paired_macro(one: np.ndarray, two: np.ndarray, groups: Sequence[str], better: int, worse: int, seed: int) -> Paired:
    """The difference of macro means, with the intervals of `macro_mean`'s two cases."""
    names, group_of, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    weights = len(one) / (len(names) * sizes[group_of])  # the mean of weighted items is the macro mean
    difference = float(((one - two) * weights).mean())
    if _binary(one) and _binary(two):
        effective = len(names) ** 2 / float((1 / sizes).sum())
        shares = ((one > two) * weights).mean(), ((one < two) * weights).mean()
        low, high = paired_proportion_interval(*(float(share) * effective for share in shares), effective)
    else:
        half = Z95 * math.sqrt(_macro_variance([(one - two)[group_of == i] for i in range(len(names))], sizes))
        low, high = difference - half, difference + half
    p = _swap_test((one * weights)[:, None], (two * weights)[:, None], first_column, seed)
    return Paired(difference, low, high, p, len(one), better, worse, "permutation")


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p of McNemar's test: how likely so uneven a split of the items that differ is by tosses of a coin."""
    count, fewer = better + worse, min(better, worse)
    below = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, float(2 * below / (1 << count)))


def paired_proportion_interval(better: float, worse: float, count: float) -> tuple[float, float]:
    """95 % interval of (better - worse) / count: Wald's after one item is added to each side (Bonett and Price, 2012)."""
    up, down = (better + 1) / (count + 2), (worse + 1) / (count + 2)
    half = Z95 * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def first_column(means: np.ndarray) -> np.ndarray:
    """The plain mean, where there is one number per item."""
    return means[:, 0]


def _swap_test(one: np.ndarray, two: np.ndarray, statistic: Statistic, seed: int) -> float:
    def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(statistic(a / len(one)) - statistic(b / len(one)))

    observed = apart(one.sum(axis=0, keepdims=True), two.sum(axis=0, keepdims=True))[0]
    rng = np.random.default_rng(seed)
    gap, left = two - one, FLIPS
    at_least = 1
    while left:
        rows = min(left, max(1, CHUNK // len(one)))
        moved = rng.integers(0, 2, (rows, len(one))).astype(np.float64) @ gap
        # sums in another order differ in the last bits; an equal arrangement must count as equal
        at_least += int((apart(one.sum(axis=0) + moved, two.sum(axis=0) - moved) >= observed * (1 - 1e-9) - 1e-12).sum())
        left -= rows
    return at_least / (FLIPS + 1)


def _resampled(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each item is drawn, [r, n] in chunks."""
    rng = np.random.default_rng(seed)
    even = np.full(count, 1 / count)
    rows = max(1, CHUNK // count)
    for start in range(0, resamples, rows):
        yield rng.multinomial(count, even, size=min(rows, resamples - start)).astype(np.float64)


def _macro_variance(parts: Sequence[np.ndarray], sizes: np.ndarray) -> float:
    """Variance of the unweighted mean of group means, from the spread within groups."""
    squares = np.array([float(((part - part.mean()) ** 2).sum()) for part in parts])
    freedom = float((sizes - 1).sum())
    pooled = squares.sum() / freedom if freedom else float(np.var(np.concatenate(parts)))
    within = np.where(sizes > 1, squares / np.maximum(sizes - 1, 1), pooled)
    return float((within / sizes).sum() / len(parts) ** 2)


def _binary(values: np.ndarray) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _numbers(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    _require(len(array))
    if not np.isfinite(array).all():
        raise DataError("a score is not a number; nothing can be averaged with it")
    return array


def _table(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = _numbers(values)
    return array[:, None] if array.ndim == 1 else array


def _require(count: int) -> None:
    if count == 0:
        raise DataError("there are no items, so there is nothing to average")
