"""Optimizers by name, and their state as named tensors and plain values, exact to the bit and without pickle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deltune.errors import CheckpointError
from deltune.optim.config import SGD, AdamW, OptimConfig


def build_optimizer(groups: Sequence[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of a config over groups of `parameter_groups`."""
    return BUILDERS[config.name](list(groups), config)


def _adamw(groups: list[dict[str, Any]], config: AdamW) -> torch.optim.Optimizer:
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)


def _sgd(groups: list[dict[str, Any]], config: SGD) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


BUILDERS = {"adamw": _adamw, "sgd": _sgd}


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """({"<parameter>|<entry>": tensor}, {"<parameter>|<entry>": plain value}) of all that the optimizer remembers."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for name, parameter in _named(optimizer):
        for entry, value in optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, torch.Tensor) else plain)[f"{name}|{entry}"] = value
    return tensors, plain


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], plain: dict[str, Any]
) -> None:
    """Put back what `optimizer_state` gave. CheckpointError for a name or shape that is not this optimizer's."""
    named = dict(_named(optimizer))
    optimizer.state.clear()
    for key, value in (tensors | plain).items():
        name, _, entry = key.rpartition("|")
        if name not in named:
            raise CheckpointError(f"the checkpoint's optimizer remembers {name}, which this run does not train")
        parameter = named[name]
        if isinstance(value, torch.Tensor):
            if value.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"the checkpoint's optimizer has {tuple(value.shape)} for {key}, the parameter is {tuple(parameter.shape)}"
                )
            # a step count is a scalar that stays where the optimizer keeps it; moments live beside their parameter
            value = value.to(parameter.device) if value.ndim or _fused(optimizer) else value.clone()
        optimizer.state[parameter][entry] = value


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
