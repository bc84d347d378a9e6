"""The visiting order: a permutation, even over all outcomes, seekable, weighted, and the same everywhere."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltune.data.order import Group, LengthGroups, Order, Permutation, key


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_every_index_comes_once(n, seed):
    assert sorted(Permutation(n, key(seed))(np.arange(n))) == list(range(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 2**61), data=st.data())
def test_points_of_any_range_stay_in_it_and_apart(n, data):
    points = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8, unique=True)))
    values = Permutation(n, 7)(points)
    assert len(set(values.tolist())) == len(points)
    assert values.min() >= 0 and values.max() < n


def test_order_is_the_same_on_every_platform():
    # written down once; a change here changes the order of every run
    assert Permutation(10, key(42, 1, 0))(np.arange(10)).tolist() == [7, 5, 8, 6, 2, 3, 4, 1, 0, 9]
    assert Permutation(10**12, key(42, 1, 0))(np.arange(3)).tolist() == [441130869157, 691943194396, 520408524541]


@pytest.mark.parametrize(("n", "expected"), [(3, 60), (4, 25), (5, 8)])
def test_all_permutations_are_equally_likely(n, expected):
    outcomes = list(itertools.permutations(range(n)))
    seeds = range(expected * len(outcomes))
    counts = Counter(tuple(Permutation(n, key(seed, n))(np.arange(n)).tolist()) for seed in seeds)
    chi2 = sum((counts[o] - expected) ** 2 / expected for o in outcomes)
    freedom = len(outcomes) - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations; seeds are fixed, so no flake


def test_positions_and_neighbours_are_even():
    n, trials = 97, 1200
    first, together = np.zeros(n), 0
    for seed in range(trials):
        order = Permutation(n, key(seed, 9))(np.arange(n))
        first[order[0]] += 1
        together += int((np.diff(order) == 1).sum())
    expected = trials / n
    assert ((first - expected) ** 2 / expected).sum() < (n - 1) + 5 * (2 * (n - 1)) ** 0.5
    # in a random permutation a neighbour follows with (n - 1) / n on average, Poisson-like
    assert abs(together - trials * (n - 1) / n) < 5 * trials**0.5


def visits(order: Order, epoch: int) -> list[int]:
    n = order.num_per_epoch
    return order.at(np.arange(epoch * n, (epoch + 1) * n)).tolist()


def test_epochs_differ_and_each_is_whole():
    order = Order([Group("a", 0, 50)], seed=3, shuffle=True)
    epochs = [visits(order, e) for e in range(3)]
    assert all(sorted(e) == list(range(50)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != visits(Order([Group("a", 0, 50)], seed=4, shuffle=True), 0)


def test_unshuffled_is_reading_order():
    order = Order([Group("a", 0, 3), Group("b", 3, 5)], seed=0, shuffle=False)
    assert order.at(np.arange(7)).tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_far_positions_equal_walking_there():
    order = Order([Group("a", 0, 7, 1.5), Group("b", 7, 12)], seed=1, shuffle=True)
    walked = np.concatenate([order.at(np.array([i])) for i in range(60)])
    assert order.at(np.arange(60)).tolist() == walked.tolist()
    assert 0 <= order.at(np.array([2**60]))[0] < 12


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0, 2.0, 2.5, 1.25])
def test_a_weight_is_how_often_rows_come(weight, shuffle):
    n = 40
    order = Order([Group("a", 0, n, weight), Group("b", n, n + 10)], seed=5, shuffle=shuffle)
    seen: Counter[int] = Counter()
    subsets = []
    for epoch in range(4):
        counts = Counter(visits(order, epoch))
        rows = [counts[i] for i in range(n)]
        assert sum(rows) == round(n * weight)
        assert set(rows) <= {int(weight), int(weight) + (weight > int(weight))}
        assert all(counts[i] == 1 for i in range(n, n + 10))
        subsets.append(tuple(rows))
        seen.update(counts)
    assert {seen[i] for i in range(n)} == {round(4 * weight)}  # over four epochs rows take turns exactly
    if weight != int(weight):
        assert subsets[0] != subsets[1]


def test_length_groups_keep_the_examples_of_a_window():
    lengths = np.random.default_rng(0).integers(1, 500, 3000).astype(np.int32)
    order = Order([Group("a", 0, 3000)], seed=2, shuffle=True)
    grouped = LengthGroups(order, lengths, global_batch=8, num_examples=2500)
    window = 50 * 8
    batches = [grouped.batch(i) for i in range(-(-2500 // 8))]
    assert [len(b) for b in batches[:-1]] == [8] * (len(batches) - 1) and len(batches[-1]) == 2500 % 8
    for w in range(7):
        mine = np.concatenate(batches[w * 50 : (w + 1) * 50])
        plain = order.at(np.arange(w * window, min((w + 1) * window, 2500)))
        assert sorted(mine) == sorted(plain)
    waste = lambda b: sum(lengths[x].max() * len(x) - lengths[x].sum() for x in b) / sum(lengths[x].sum() for x in b)  # noqa: E731
    plain = [order.at(np.arange(i * 8, i * 8 + 8)) for i in range(200)]
    assert waste(batches) < 0.1 * waste(plain)
    maxima = [int(lengths[b].max()) for b in batches[:50]]
    assert maxima != sorted(maxima) and maxima != sorted(maxima, reverse=True)  # batches are shuffled inside a window
    fresh = LengthGroups(order, lengths, global_batch=8, num_examples=2500)
    assert fresh.batch(131).tolist() == batches[131].tolist()  # asked for out of turn
