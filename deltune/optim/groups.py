"""Which parameters move together: groups by weight decay and learning rate, each parameter in exactly one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch

from deltune.errors import ConfigError
from deltune.optim.config import OptimConfig


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimConfig
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, each with `params`, `names`, `lr`, `weight_decay`; order is that of first appearance.

    Only parameters that require a gradient. Tensors of fewer than two dimensions (norms, biases, vectors) and names
    that match a pattern of no_decay have no weight decay. The first matching pattern of lr_scales or lr_values sets
    the rate. ConfigError for a rate's pattern that matches nothing.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    names = []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        names.append(name)
        decays = parameter.ndim >= 2 and not any(fnmatchcase(name, pattern) for pattern in config.no_decay)
        decay, rate = config.weight_decay if decays else 0.0, _rate(name, config)
        group = groups.setdefault((decay, rate), {"params": [], "names": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    if not names:
        raise ConfigError("no parameter is trained: nothing to optimize")
    for key, patterns in (("optim.lr_scales", config.lr_scales), ("optim.lr_values", config.lr_values)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3) or names[:3]
                raise ConfigError(f"{key}: the pattern {pattern!r} matches no trained parameter. Nearest: {', '.join(near)}.")
    return list(groups.values())


def _rate(name: str, config: OptimConfig) -> float:
    for pattern, value in config.lr_values.items():
        if fnmatchcase(name, pattern):
            return value
    for pattern, scale in config.lr_scales.items():
        if fnmatchcase(name, pattern):
            return config.lr * scale
    return config.lr
