"""The order in which examples are visited: a pure function of (seed, epoch, index), without a table and the same on every platform.

An epoch is one visit to every group of rows, as often as its weight says; positions count examples through epoch
ends. Any position is found in O(1), so a run that resumes at step ten million starts at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_MASK = 0xFFFFFFFFFFFFFFFF
_ROUNDS = 8  # with fewer than six, neighbours stay neighbours too often (tests/test_data_order.py)
_SMALLEST_SIDE = 8  # the round functions of a 3x3 domain cannot reach all permutations evenly

# streams of keys: what a permutation is used for, so that no two uses share one
VISIT, FRACTION, BATCHES, HELD_OUT, BLOCK, ROW = range(1, 7)


def key(*words: int) -> int:
    """64 bits from a sequence of integers, by splitmix64 (Steele, Lea, Flood 2014) over a running state."""
    state = 0
    for word in words:
        x = ((state ^ (word & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        state = x ^ (x >> 31)
    return state


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64, which wraps around in numpy as it does in C."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Permutation:
    """A seeded permutation of range(n), n < 2^62, evaluated at any points without building it.

    A Feistel network over pairs (l, r) in a square of side s >= sqrt(n), with additions modulo s; points that fall
    outside range(n) walk on until they are inside (Black, Rogaway 2002, cycle walking), on average once or less for
    n > 64.
    """

    n: int
    key: int

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """int64 [k] in range(n) -> int64 [k]."""
        side = max(math.isqrt(self.n - 1) + 1, _SMALLEST_SIDE)
        modulus, limit = np.uint64(side), np.uint64(self.n)
        rounds = [np.uint64(key(self.key, i)) for i in range(_ROUNDS)]
        found = np.empty(len(points), dtype=np.int64)
        open_places, x = np.arange(len(points)), np.asarray(points).astype(np.uint64)
        while len(x):
            left, right = x // modulus, x % modulus
            for round_key in rounds:
                left, right = right, (left + _mixed(right ^ round_key) % modulus) % modulus
            x = left * modulus + right
            inside = x < limit
            found[open_places[inside]] = x[inside]
            open_places, x = open_places[~inside], x[~inside]
        return found


@dataclass(frozen=True)
class Group:
    """Examples [start, stop) of a data set that share a weight: those of one source."""

    name: str
    start: int
    stop: int
    weight: float = 1.0

    @property
    def num_per_epoch(self) -> int:
        """Visits in one epoch, at least one."""
        n = self.stop - self.start
        return max(1, round(n * self.weight)) if n else 0


class Order:
    """Which example stands at a position of the endless sequence of epochs.

    A group of weight 2.3 is visited twice in full, and three tenths of it once more: a window of one fixed seeded
    permutation of the group, which moves on from epoch to epoch, so that rows take turns and no row comes a fourth
    time before all have come a third.
    """

    def __init__(self, groups: list[Group], *, seed: int, shuffle: bool):
        self.groups, self.seed, self.shuffle = groups, seed, shuffle
        self._ends = np.cumsum([group.num_per_epoch for group in groups], dtype=np.int64)
        self.num_per_epoch = int(self._ends[-1]) if groups else 0

    def at(self, positions: np.ndarray) -> np.ndarray:
        """int64 [k] positions, from 0 without end -> int64 [k] indices of examples."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = np.divmod(positions, self.num_per_epoch)
        found = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = self._in_epoch(int(epoch), places[chosen])
        return found

    def _in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if self.shuffle:
            places = Permutation(self.num_per_epoch, key(self.seed, VISIT, epoch))(places)
        found = np.empty(len(places), dtype=np.int64)
        owner = np.searchsorted(self._ends, places, side="right")
        for number, group in enumerate(self.groups):
            mine = owner == number
            if mine.any():
                before = int(self._ends[number]) - group.num_per_epoch
                found[mine] = group.start + self._in_group(number, group, epoch, places[mine] - before)
        return found

    def _in_group(self, number: int, group: Group, epoch: int, visits: np.ndarray) -> np.ndarray:
        """Visit v of an epoch -> row of the group: whole passes first, then the window of the fraction."""
        n = group.stop - group.start
        in_full = group.num_per_epoch // n * n
        window = group.num_per_epoch - in_full
        rows = visits % n
        last = visits >= in_full
        if last.any():
            turn = (epoch * window + visits[last] - in_full) % n
            rows[last] = Permutation(n, key(self.seed, FRACTION, number))(turn) if self.shuffle else turn
        return rows


class LengthGroups:
    """Batches of like length: inside each window of 50 global batches, examples are sorted by length, cut into
    batches, and the batches put in random order again. The examples of a window are those that the plain order has
    there, so that epochs and ends stay where they are, and a window is a pure function of its number."""

    batches_per_window = 50

    def __init__(self, order: Order, lengths: np.ndarray, *, global_batch: int, num_examples: int | None):
        self.order, self.lengths = order, lengths
        self.global_batch, self.num_examples = global_batch, num_examples
        self._window: tuple[int, np.ndarray] | None = None  # the last one asked for

    def batch(self, step: int) -> np.ndarray:
        """int64 [<= global_batch] indices of step i's examples, longest first."""
        number, place = divmod(step, self.batches_per_window)
        if self._window is None or self._window[0] != number:
            self._window = (number, self._arrange(number))
        return self._window[1][place * self.global_batch : (place + 1) * self.global_batch]

    def _arrange(self, number: int) -> np.ndarray:
        size = self.batches_per_window * self.global_batch
        stop = (number + 1) * size if self.num_examples is None else min((number + 1) * size, self.num_examples)
        indices = self.order.at(np.arange(number * size, max(stop, number * size), dtype=np.int64))
        indices = indices[np.argsort(-self.lengths[indices].astype(np.int64), kind="stable")]
        num_full = len(indices) // self.global_batch
        if num_full < 2:
            return indices
        full = indices[: num_full * self.global_batch].reshape(num_full, self.global_batch)
        shuffled = Permutation(num_full, key(self.order.seed, BATCHES, number))(np.arange(num_full))
        return np.concatenate([full[shuffled].reshape(-1), indices[num_full * self.global_batch :]])
