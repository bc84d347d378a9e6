"""Learning-rate schedules: pure functions of the step, so that a checkpoint has nothing of them to remember.

Step 1 is the first of N. Over W warm-up steps the factor is step / W; after them the shape of the schedule runs to the
last step, where it has reached its floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from deltune.errors import ConfigError
from deltune.optim.config import WSD, CosineRestarts, ScheduleConfig

Factor = Callable[[int], float]
ROUNDING = 1e-9  # 0.07 of 100 steps is 7.000000000000001 in binary, and means 7


def count_of(value: float, num_steps: int) -> int:
    """Steps meant by a number that is a fraction of all steps below 1 (rounded up) and a count from 1 on."""
    return math.ceil(value * num_steps - ROUNDING) if value < 1 else int(value)


def schedule(config: ScheduleConfig, num_steps: int) -> Factor:
    """Factor of the peak rate at a step from 1 to `num_steps`. ConfigError where its parts do not fit into the run."""
    warmup = count_of(config.warmup, num_steps)
    if config.warmup >= 1 and warmup >= num_steps:
        raise ConfigError(f"schedule.warmup={warmup}: the run has {num_steps} steps. What fits: less than that, or a fraction.")
    if config.auto_warmup_steps >= num_steps:
        raise ConfigError(
            f"schedule.auto_warmup_steps={config.auto_warmup_steps}: the run has {num_steps} steps, which would all have the "
            "small first rate. What fits: less than that."
        )
    warmup = min(warmup, num_steps - 1)
    after = SHAPES[config.name](config, warmup, num_steps)

    def factor(step: int) -> float:
        if step <= config.auto_warmup_steps:
            return min(config.auto_warmup_rate, step / warmup if warmup else 1.0)
        return step / warmup if step < warmup else after(step)

    return factor


# Each of these gives the factor at a step from the last one of warm-up (the peak) to the last one of the run.


def _over_progress(shape: Callable[[ScheduleConfig, float], float]) -> Callable[[ScheduleConfig, int, int], Factor]:
    """The schedule of a shape over progress, which is 0 at the end of warm-up and 1 at the last step."""
    return lambda config, warmup, num_steps: lambda step: shape(config, (step - warmup) / (num_steps - warmup))


def _half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _to_floor(floor: float, share: float) -> float:
    """The peak for a share of 1, the floor for 0."""
    return floor + (1 - floor) * share


def _restarts(config: CosineRestarts, warmup: int, num_steps: int) -> Factor:
    """`cycles` half cosines of equal length; after each restart `cycle_warmup` steps lead back to the peak."""
    left, cycles = num_steps - warmup, config.cycles
    length = left / cycles
    if cycles > left:
        raise ConfigError(f"schedule.cycles={cycles}: only {left} steps are left after warm-up. What fits: at most that.")
    if config.cycle_warmup >= length:
        raise ConfigError(
            f"schedule.cycle_warmup={config.cycle_warmup}: a cycle has {length:g} steps ({left} after warm-up, {cycles} cycles). "
            "What fits: less than that."
        )

    def factor(step: int) -> float:
        done = step - warmup
        # in whole numbers: a cycle's last step belongs to it, not to the next one, whatever its length
        cycle = max(0, done * cycles - 1) // left
        within = (done * cycles - cycle * left) / cycles
        rewarm = config.cycle_warmup if cycle else 0
        if within < rewarm:
            return within / rewarm
        return _to_floor(config.floor, _half_cosine((within - rewarm) / (length - rewarm)))

    return factor


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": _half_cosine,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}


def _wsd(config: WSD, warmup: int, num_steps: int) -> Factor:
    """The peak, then a decay to the floor over the last steps of the run."""
    decay = count_of(config.decay, num_steps)
    if warmup + decay > num_steps:
        raise ConfigError(
            f"schedule.decay={config.decay:g}: {decay} steps of decay after {warmup} of warm-up are more than the run's {num_steps}. "
            f"What fits: at most {num_steps - warmup}, or a fraction."
        )
    shape = DECAYS[config.shape]
    return lambda step: _to_floor(config.floor, shape(max(0, step - (num_steps - decay)) / decay))


SHAPES: dict[str, Callable[..., Factor]] = {
    "constant": _over_progress(lambda c, p: 1.0),
    "linear": _over_progress(lambda c, p: _to_floor(c.floor, 1 - p)),
    "cosine": _over_progress(lambda c, p: _to_floor(c.floor, _half_cosine(p))),
    "exponential": _over_progress(lambda c, p: c.floor**p),
    "polynomial": _over_progress(lambda c, p: _to_floor(c.floor, (1 - p) ** c.power)),
    "cosine_restarts": _restarts,
    "wsd": _wsd,
}
