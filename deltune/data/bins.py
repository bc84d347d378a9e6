"""Micro-batches by tokens: bins of a capacity, filled best-fit over windows of the seeded order, a pure function of (seed, bin).

Bins are formed inside a window and a window lies inside an epoch, so every example is in one bin of each epoch, and
only a window's last bins are not full. How many bins a window makes depends on its lengths, so the windows before a
bin are counted once, at some microseconds an example.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict

import numpy as np

from deltune.data.order import BATCHES, Order, Permutation, key
from deltune.errors import DataError

BINS_PER_WINDOW = 256  # so that half an empty bin at a window's end is 0.2 % of it
ALIKE = 16  # bins whose fill differs by less than this part of the capacity count as filled alike


def best_fit(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Items of these lengths [items] in few bins of a capacity: the indices of each bin, ascending.

    Best fit decreasing: long items first, each into the fullest bin that still takes it (Johnson 1974). Items count as
    equally long within a 64th of the capacity and keep their order: in strict order half of the examples of a bin would
    be together again in the next epoch, whatever its shuffling; this costs no room to speak of (docs/data.md). Open bins
    are found by the room that they have left, a bit of one number, so an item costs capacity / 64 machine words at most.
    Raises DataError where an item is longer than a bin.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-(lengths * 64 // capacity), kind="stable")
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> bins that have it
    rooms = 0  # bit r is set where a bin has r left
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if length > capacity:
            raise too_long(length, capacity)
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            waiting = with_room[room]
            chosen = waiting.pop()
            if not waiting:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        left = room - length
        with_room.setdefault(left, []).append(chosen)
        rooms |= 1 << left
    return [np.sort(np.array(items, dtype=np.int64)) for items in bins]


def too_long(length: int, capacity: int, row: str = "an example") -> DataError:
    """The error for an example that no bin takes."""
    return DataError(
        f"{row} has {length:,} tokens, and train.micro_batch_tokens={capacity} holds only whole examples. "
        f"What fits: data.max_length={capacity} or below, or a larger train.micro_batch_tokens."
    )


class Bins:
    """The endless sequence of epochs as bins of at most `capacity` tokens, `per_step` of which make an optimizer step.

    A window's bins are dealt so that a step has bins that are filled alike, since its ranks wait for one another; the
    least filled come last. Without shuffling they stand in the order of their first examples.
    """

    def __init__(self, order: Order, lengths: np.ndarray, *, capacity: int, per_step: int, num_examples: int | None):
        self.order, self.lengths, self.capacity, self.per_step = order, lengths, capacity, per_step
        self.num_examples = num_examples
        tokens = order.num_per_epoch * float(np.mean(lengths))
        self.windows_per_epoch = max(1, round(tokens / (capacity * max(BINS_PER_WINDOW, 8 * per_step))))
        self._starts = [0]  # bins before each window, as far as they are counted
        self._recent: OrderedDict[int, list[np.ndarray]] = OrderedDict()

    def __getitem__(self, bins: slice) -> list[np.ndarray]:
        """The examples of bins [start, stop): int64 [examples of a bin] each; fewer bins past the end."""
        found: list[np.ndarray] = []
        at = bins.start
        while at < bins.stop and (window := self._window_of(at)) is not None:
            within = self._arranged(window)[at - self._starts[window] :][: bins.stop - at]
            found += within
            at += len(within)
        return found

    def count(self) -> int:
        """Bins up to the end, which `num_examples` says."""
        assert self.num_examples is not None
        while self._count_next():
            pass
        return self._starts[-1]

    def num_examples_before(self, bin: int) -> int:
        """Examples in the bins before this one."""
        window = self._window_of(bin)
        if window is None:
            return self.num_examples or 0
        first, _ = self._span(window)
        return first + sum(map(len, self._arranged(window)[: bin - self._starts[window]]))

    def _span(self, window: int) -> tuple[int, int]:
        """Positions [start, stop) of the order; the same where the end has passed."""
        epoch, place = divmod(window, self.windows_per_epoch)
        n = self.order.num_per_epoch
        start, stop = (epoch * n + n * k // self.windows_per_epoch for k in (place, place + 1))
        limit = stop if self.num_examples is None else self.num_examples
        return min(start, limit), min(stop, limit)

    def _window_of(self, bin: int) -> int | None:
        """The window that a bin is in; None past the end."""
        while self._starts[-1] <= bin:
            if not self._count_next():
                return None
        return bisect_right(self._starts, bin) - 1

    def _count_next(self) -> bool:
        """Count one window more; False at the end."""
        window = len(self._starts) - 1
        start, stop = self._span(window)
        if start == stop:
            return False
        self._starts.append(self._starts[-1] + len(self._arranged(window)))
        return True

    def _arranged(self, window: int) -> list[np.ndarray]:
        """The bins of a window whose predecessors are counted, in their order."""
        if window not in self._recent:
            self._recent[window] = self._arrange(window)
            if len(self._recent) > 2:  # a step may begin in one window and end in the next
                self._recent.popitem(last=False)
        return self._recent[window]

    def _arrange(self, window: int) -> list[np.ndarray]:
        indices = self.order.at(np.arange(*self._span(window), dtype=np.int64))
        lengths = self.lengths[indices].astype(np.int64)
        bins = best_fit(lengths, self.capacity)
        if self.order.shuffle:
            bins = dealt(bins, key(self.order.seed, BATCHES, window))
            fills = np.array([int(lengths[bin].sum()) for bin in bins])
            bins = [bins[i] for i in np.argsort(-(fills * ALIKE // self.capacity), kind="stable")]
            lead = -self._starts[window] % self.per_step  # these end the step that the window before began
            whole = (len(bins) - lead) // self.per_step
            if whole > 1:
                steps = Permutation(whole, key(self.order.seed, BATCHES, window, 1))(np.arange(whole))
                moved = (lead + steps[:, None] * self.per_step + np.arange(self.per_step)).reshape(-1)
                bins[lead : lead + len(moved)] = [bins[i] for i in moved]
        else:
            bins = dealt(bins, None)
        return [indices[bin] for bin in bins]


def dealt(bins: list[np.ndarray], key: int | None) -> list[np.ndarray]:
    """Bins in a random order, or without a key by their first items: best fit leaves those of long items in front."""
    if key is None:
        return sorted(bins, key=lambda bin: int(bin[0]))
    return [bins[i] for i in Permutation(len(bins), key)(np.arange(len(bins)))]
