"""Optimizers by name, and their state as named tensors and plain values, exact to the bit and without pickle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

# tensors of a parameter's own size that the optimizer keeps for it from the first step on
MOMENTS = {"adamw": lambda config: 2, "sgd": lambda config: 1 if config.momentum else 0}


def state_bytes(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> int:
    """What the optimizer of a config remembers of these parameters."""
    return MOMENTS[config.name](config) * sum(p.numel() * p.element_size() for p in parameters)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All that the optimizer remembers: its tensors by "<parameter>|<entry>", and a JSON-able description.

    The description names the optimizer, lists the entries of every parameter that has any (one that no gradient has
    reached yet has none), and holds entries that are no tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    description: dict[str, Any] = {"optimizer": type(optimizer).__name__, "entries": {}, "values": {}}
    for name, parameter in _named(optimizer):
        remembered = optimizer.state.get(parameter, {})
        if remembered:
            description["entries"][name] = sorted(remembered)
        for entry, value in remembered.items():
            (tensors if isinstance(value, torch.Tensor) else description["values"])[f"{name}|{entry}"] = value
    return tensors, description


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], description: dict[str, Any]
) -> None:
    """Put back what `optimizer_state` gave. CheckpointError if it is another optimizer's, or tensors are missing, left
    over or of another shape or type; the optimizer is then as it was."""
    if description["optimizer"] != type(optimizer).__name__:
        raise CheckpointError(f"the checkpoint is of {description['optimizer']}, this run uses {type(optimizer).__name__}")
    named, found = dict(_named(optimizer)), tensors | description["values"]
    state: dict[str, dict[str, Any]] = {}
    for name, entries in description["entries"].items():
        if name not in named:
            raise CheckpointError(f"the checkpoint's optimizer remembers {name}, which this run does not train")
        for entry in entries:
            key = f"{name}|{entry}"
            if key not in found:
                raise CheckpointError(f"the checkpoint's optimizer state lacks {key}")
            state.setdefault(name, {})[entry] = _placed(key, found.pop(key), named[name], optimizer)
    if found:
        raise CheckpointError(f"the checkpoint's optimizer state has {len(found)} entries too many, first {min(found)}")
    optimizer.state.clear()
    for name, entries in state.items():
        optimizer.state[named[name]] = entries


def _placed(key: str, value: Any, parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> Any:
    """A copy where the optimizer expects it: moments beside their parameter, a step count (a scalar) there too if fused."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.ndim and (value.shape != parameter.shape or value.dtype != parameter.dtype):
        raise CheckpointError(
            f"the checkpoint's optimizer has {tuple(value.shape)} {value.dtype} for {key}, "
            f"the parameter is {tuple(parameter.shape)} {parameter.dtype}"
        )
    if value.ndim or optimizer.defaults["fused"]:
        return value.to(parameter.device, copy=True)
    return value.clone()


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
