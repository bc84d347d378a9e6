"""Learning-rate schedules: pure functions of the step, so that a checkpoint has nothing of them to remember.

Step 1 is the first. With W warm-up steps of N: up to W the factor is step / W; after it the shape runs over
progress = (step - W) / (N - W), from 0 at the end of warm-up to 1 at the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from deltune.errors import ConfigError
from deltune.optim.config import WSD, CosineRestarts, ScheduleConfig

Shape = Callable[[float], float]


def count_of(value: float, num_steps: int) -> int:
    """Steps meant by a number that is a fraction of all steps below 1 and a count from 1 on."""
    return math.ceil(value * num_steps) if value < 1 else int(value)


def schedule(config: ScheduleConfig, num_steps: int) -> Callable[[int], float]:
    """Factor of the peak rate at a step from 1 to `num_steps`. ConfigError where its parts do not fit into the run."""
    warmup = count_of(config.warmup, num_steps)
    if config.warmup >= 1 and warmup >= num_steps:
        raise ConfigError(f"schedule.warmup={warmup}: the run has {num_steps} steps. What fits: less than that, or a fraction.")
    warmup = min(warmup, num_steps - 1)
    after = SHAPES[config.name](config, num_steps - warmup)

    def factor(step: int) -> float:
        warm = step / warmup if step < warmup else 1.0
        value = warm if step <= warmup else after(step - warmup)
        if step <= config.auto_warmup_steps:
            value = min(config.auto_warmup_rate, warm)
        return value

    return factor


def _from_progress(shape: Callable[[ScheduleConfig, float], float]) -> Callable[[ScheduleConfig, int], Callable[[int], float]]:
    """A schedule whose shape is a function of progress, 0 to 1, over the `left` steps after warm-up."""
    return lambda config, left: lambda step: shape(config, step / left)


def _cosine(floor: float, progress: float) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def _restarts(config: CosineRestarts, left: int) -> Callable[[int], float]:
    """`cycles` half cosines of equal length; after each restart `cycle_warmup` steps lead back to the peak."""
    length = left / config.cycles
    if config.cycle_warmup >= length:
        raise ConfigError(
            f"schedule.cycle_warmup={config.cycle_warmup}: a cycle has {length:g} steps ({left} after warm-up, {config.cycles} cycles). "
            "What fits: less than that."
        )

    def factor(step: int) -> float:
        cycle = min(math.ceil(step / length) - 1, config.cycles - 1)
        within = step - cycle * length  # above 0, to `length`
        warm = config.cycle_warmup if cycle else 0
        if within < warm:
            return within / warm
        return _cosine(config.floor, (within - warm) / (length - warm))

    return factor


DECAYS: dict[str, Shape] = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "sqrt": lambda p: 1 - math.sqrt(p),
}


def _wsd(config: WSD, left: int) -> Callable[[int], float]:
    """The peak, then a decay to the floor over the last steps of the run."""
    warmed = left  # steps after warm-up
    decay = math.ceil(config.decay * warmed) if config.decay < 1 else int(config.decay)
    if decay > warmed:
        raise ConfigError(f"schedule.decay={decay}: only {warmed} steps are left after warm-up. What fits: at most that, or a fraction.")
    shape = DECAYS[config.shape]

    def factor(step: int) -> float:
        progress = (step - (warmed - decay)) / decay
        return 1.0 if progress <= 0 else config.floor + (1 - config.floor) * shape(progress)

    return factor


SHAPES: dict[str, Callable[..., Callable[[int], float]]] = {
    "constant": _from_progress(lambda c, p: 1.0),
    "linear": _from_progress(lambda c, p: 1 - (1 - c.floor) * p),
    "cosine": _from_progress(lambda c, p: _cosine(c.floor, p)),
    "exponential": _from_progress(lambda c, p: c.floor**p),
    "polynomial": _from_progress(lambda c, p: c.floor + (1 - c.floor) * (1 - p) ** c.power),
    "cosine_restarts": _restarts,
    "wsd": _wsd,
}
