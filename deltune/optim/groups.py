"""Which parameters move together: groups by weight decay and learning rate, each parameter in exactly one.

A pattern that decides nothing is refused: what its author meant by it would not happen.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from deltune.errors import ConfigError
from deltune.optim.config import NO_DECAY, OptimConfig


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimConfig, ratios: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, each with `params`, `names`, `lr` (its peak) and `weight_decay`, in order of first
    appearance.

    Only parameters that require a gradient. Tensors of fewer than two dimensions (norms, biases, vectors) and names
    that match a pattern of no_decay have no weight decay. The first matching pattern of lr_scales or lr_values sets
    the rate; without one in lr_values it is multiplied by the parameter's entry in `ratios`. ConfigError for a pattern that decides nothing, and for a rate that is not a positive number.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trained:
        raise ConfigError("no parameter is trained: nothing to optimize")
    names = [name for name, _ in trained]
    for key, rates in (("optim.lr_scales", config.lr_scales), ("optim.lr_values", config.lr_values)):
        _check_rates(key, rates, names)
    if config.weight_decay:
        for pattern in config.no_decay:
            if pattern not in NO_DECAY:  # the defaults are meant for any model, of which each has some of them
                _check_matches("optim.no_decay", pattern, names)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trained:
        decays = parameter.ndim >= 2 and _first_match(name, config.no_decay) is None
        decay, rate = config.weight_decay if decays else 0.0, _rate(name, config, (ratios or {}).get(name, 1.0))
        group = groups.setdefault((decay, rate), {"params": [], "names": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _rate(name: str, config: OptimConfig, ratio: float) -> float:
    own, scaled = _first_match(name, config.lr_values), _first_match(name, config.lr_scales)
    if own is not None:
        return config.lr_values[own]
    return config.lr * ratio if scaled is None else config.lr * ratio * config.lr_scales[scaled]


def _first_match(name: str, patterns: Iterable[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def _check_rates(key: str, rates: Mapping[str, float], names: Sequence[str]) -> None:
    deciding = {_first_match(name, rates) for name in names}
    for pattern, rate in rates.items():
        if not (rate > 0 and math.isfinite(rate)):
            raise ConfigError(f"{key}: {pattern!r} is given {rate:g}; it must be above 0. To freeze parameters: model.disable.")
        _check_matches(key, pattern, names)
        if pattern not in deciding:
            example = next(name for name in names if fnmatchcase(name, pattern))
            raise ConfigError(
                f"{key}: the pattern {pattern!r} has no effect: the first pattern that matches counts, and "
                f"{_first_match(example, rates)!r} before it takes {example}. What fits: the narrower pattern first."
            )


def _check_matches(key: str, pattern: str, names: Sequence[str]) -> None:
    if not any(fnmatchcase(name, pattern) for name in names):
        text = pattern.replace("*", "").replace("?", "")
        near = [name for name in names if text and text in name][:3]
        near = near or difflib.get_close_matches(text, names, n=3, cutoff=0.3) or names[:3]
        raise ConfigError(f"{key}: the pattern {pattern!r} matches no trained parameter. Nearest: {', '.join(near)}.")
