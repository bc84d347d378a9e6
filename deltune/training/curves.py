"""Numbers made from series of records: smoothing, robust averages, remaining time, thinning. Pure functions of lists."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence


class Smooth:
    """An exponential moving average without the pull of its start (Adam's bias correction); not-finite values are passed over."""

    def __init__(self, beta: float):
        self.beta = beta
        self.total = 0.0
        self.weight = 0.0

    def add(self, value: float) -> float:
        """The average after one more value; NaN until a finite one has come."""
        if math.isfinite(value):
            self.total = self.beta * self.total + (1 - self.beta) * value
            self.weight = self.beta * self.weight + (1 - self.beta)
        return self.total / self.weight if self.weight else math.nan


def smooth(values: Sequence[float], beta: float | None = None) -> list[float]:
    """The mean of a moving average from the left and one from the right, so that a slope is followed without delay.

    Without `beta` each spans a fiftieth of the series. Not-finite values are passed over; NaN where there is no other.
    """
    if beta is None:
        beta = 1 - 1 / max(1.0, len(values) / 50)
    forth, back = Smooth(beta), Smooth(beta)
    left = [forth.add(value) for value in values]
    right = [back.add(value) for value in reversed(values)][::-1]
    return [a if math.isnan(b) else b if math.isnan(a) else (a + b) / 2 for a, b in zip(left, right, strict=True)]


def trimmed_mean(values: Sequence[float]) -> float:
    """The mean without the tenth that is lowest and the tenth that is highest (one of each at least, from three values on)."""
    ordered = sorted(values)
    cut = max(1, len(ordered) // 10) if len(ordered) >= 3 else 0
    kept = ordered[cut : len(ordered) - cut]
    return sum(kept) / len(kept)


class RemainingTime:
    """Seconds until the last step, from the last hundred steps and the evaluations still due.

    Averages are trimmed, so that one slow step (the first, a save, a compile) does not move them.
    """

    def __init__(self, num_steps: int, eval_every: int | None):
        self.num_steps = num_steps
        self.eval_every = eval_every
        self.steps: deque[float] = deque(maxlen=100)
        self.evals: deque[float] = deque(maxlen=10)

    def seconds(self, step: int) -> float | None:
        """None before the first step has been timed."""
        if not self.steps:
            return None
        left = (self.num_steps - step) * trimmed_mean(self.steps)
        if self.eval_every and self.evals:
            due = self.num_steps // self.eval_every - step // self.eval_every
            left += due * trimmed_mean(self.evals)
        return left


def thin(x: Sequence[float], y: Sequence[float], limit: int = 600) -> tuple[list[float], list[float]]:
    """At most `limit` points of a curve: each bucket keeps its lowest and its highest point, so no spike is lost."""
    if len(x) <= limit:
        return list(x), list(y)
    buckets = limit // 2
    kept: list[int] = []
    for bucket in range(buckets):
        span = range(bucket * len(x) // buckets, (bucket + 1) * len(x) // buckets)
        finite = [i for i in span if math.isfinite(y[i])] or list(span)
        kept += sorted({min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)})
    return [x[i] for i in kept], [y[i] for i in kept]


def spans_decades(values: Sequence[float]) -> bool:
    """Whether a curve is better read on a logarithmic axis: all positive, and the largest a hundred times the smallest."""
    finite = [v for v in values if math.isfinite(v)]
    return len(finite) > 1 and min(finite) > 0 and max(finite) >= 100 * min(finite)
