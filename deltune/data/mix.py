"""How often each task is visited in an epoch: one formula over rows counted, so that the order stays a pure function of (seed, step).

A task is a source, or the rows of a source that share a value of data.mix_by. With m = min(rows, data.mix_cap), T =
data.mix_temperature and w the weight of the source, an epoch has E visits, in proportion to w m^(1/T) (Raffel et al.
2020, section 3.5.2: examples-proportional mixing with a maximum K, and temperature): E = sum of w m, so that with
T = 1 a task below the cap is seen w times. With data.weights=shares a source has the part w / sum(w) of E = sum of m,
whatever its size, and the formula holds for the tasks inside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from deltune.data.config import DataConfig
from deltune.data.conversation import BadRow, keys_of, kind_of


class Task(NamedTuple):
    """Rows that are mixed as one."""

    source: int
    name: str  # "" where the source is the task
    num_rows: float  # a whole number, but where it is estimated


def mixes(config: DataConfig) -> bool:
    """Whether rows must be counted before it is known how often they are seen."""
    return config.weights == "shares" or config.mix_by is not None or config.mix_cap is not None or config.mix_temperature != 1


def problems(config: DataConfig) -> Iterator[str]:
    """Settings that would have no effect."""
    if config.mix_by is None and config.mix_temperature != 1 and (config.weights == "shares" or len(config.train) == 1):
        why = "the shares of sources do not depend on their rows" if config.weights == "shares" else "there is one source"
        yield f"data.mix_temperature has no effect without data.mix_by, since {why}"
    if config.mix_by is None and config.mix_cap is not None and config.weights == "shares":
        yield "data.mix_cap has no effect without data.mix_by, since the shares of sources do not depend on their rows"
    if config.mix_by is not None and config.mix_cap is None and config.mix_temperature == 1:
        yield "data.mix_by has no effect without data.mix_cap or data.mix_temperature: every row would be seen as often"


def visits(tasks: Sequence[Task], weights: Sequence[float], config: DataConfig) -> list[float]:
    """How many rows of each task an epoch visits; `weights` are those of the sources."""
    counted = [min(task.num_rows, config.mix_cap or task.num_rows) for task in tasks]
    shares = config.weights == "shares"
    rates = [(1.0 if shares else weights[t.source]) * m ** (1 / config.mix_temperature) for t, m in zip(tasks, counted, strict=True)]
    if not shares:
        total = sum(weights[t.source] * m for t, m in zip(tasks, counted, strict=True))
        return [total * rate / sum(rates) for rate in rates]
    present = sorted({task.source for task in tasks})
    inside = {source: sum(r for t, r in zip(tasks, rates, strict=True) if t.source == source) for source in present}
    part = {source: weights[source] / sum(weights[s] for s in present) for source in present}
    return [sum(counted) * part[t.source] * rate / inside[t.source] for t, rate in zip(tasks, rates, strict=True)]


def task_of(row: Any, column: str | None) -> str:
    """The task of a row; BadRow where the row does not say it."""
    if column is None:
        return ""
    value = row.get(column) if isinstance(row, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, str | int):
        found = f"; keys found: {keys_of(row)}" if isinstance(row, Mapping) and value is None else ""
        raise BadRow(f"{column!r} (data.mix_by) must be a name or a number, but is {kind_of(value)}{found}")
    return str(value)


def shown(tasks: Sequence[Task], found: Sequence[float], names: Sequence[str]) -> str:
    """The tasks with rows and visits for the log, those that are visited most first."""
    order = sorted(range(len(tasks)), key=lambda i: -found[i])
    told = [f"{names[tasks[i].source]}{'/' * bool(tasks[i].name)}{tasks[i].name} {found[i]:,.0f} of {tasks[i].num_rows:,}" for i in order[:8]]
    return ", ".join(told) + (f" and {len(tasks) - 8} more" if len(tasks) > 8 else "")
