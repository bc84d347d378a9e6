"""Optimizers by name, and their state as named tensors and plain values, exact to the bit and without pickle."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deltune.errors import CheckpointError
from deltune.log import logger
from deltune.optim.blockwise import BLOCK
from deltune.optim.config import SGD, AdamW, Lion, OptimConfig
from deltune.optim.kernels import Kernels, why_not
from deltune.optim.moments import SMALLEST_IN_8_BITS, Moments, Place, shapes


def build_optimizer(groups: Sequence[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of a config over groups of `parameter_groups`. What it comes to is said in the log."""
    device = groups[0]["params"][0].device
    told = described(config, device)
    if told:
        logger.info("%s", told)
    if isinstance(config, AdamW) and config.name == "adamw":
        return _adamw(list(groups), config)
    if isinstance(config, (AdamW, Lion)):
        kind, eps = KINDS[config.name], config.eps if isinstance(config, AdamW) else 0.0
        place = Place() if why_not(device) else Kernels(kind.paged)
        return Moments(groups, rule=kind.rule, bits=kind.bits, place=place, betas=(config.beta1, config.beta2), eps=eps)
    assert isinstance(config, SGD)
    return torch.optim.SGD(list(groups), lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def _adamw(groups: list[dict[str, Any]], config: AdamW) -> torch.optim.Optimizer:
    parameters = [p for group in groups for p in group["params"]]
    fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused)


@dataclass(frozen=True)
class Kind:
    """An optimizer of `moments`."""

    rule: str
    bits: int
    paged: bool


# a name of the config to what it is, where that is not torch's own
KINDS = {
    "paged_adamw": Kind("adamw", 32, True),
    "adamw_8bit": Kind("adamw", 8, False),
    "paged_adamw_8bit": Kind("adamw", 8, True),
    "lion": Kind("lion", 32, False),
    "lion_8bit": Kind("lion", 8, False),
    "paged_lion": Kind("lion", 32, True),
    "paged_lion_8bit": Kind("lion", 8, True),
}


def described(config: OptimConfig, device: torch.device) -> str:
    """One line on where the moments of a config lie and what computes with them on a device; "" for torch's own optimizers."""
    if config.name not in KINDS:
        return ""
    kind, reason = KINDS[config.name], why_not(device)
    held = f"{config.name}: moments in 8 bits by blocks of {BLOCK} (float32 below {SMALLEST_IN_8_BITS:,} values)" if kind.bits == 8 else f"{config.name}: moments in float32"
    if not reason:
        return held + (", in memory that is paged between the device and the CPU" if kind.paged else "") + ", computed by bitsandbytes"
    return held + f", computed in plain torch: {reason}" + (f"; not paged, so they lie in the memory of {device.type}" if kind.paged else "")


def state_bytes(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> int:
    """What the optimizer of a config remembers of these parameters from their first step on."""
    if config.name in KINDS:
        kind = KINDS[config.name]
        return sum(math.prod(shape) * dtype.itemsize for p in parameters for shape, dtype in shapes(p, kind.rule, kind.bits).values())
    moments = 2 if isinstance(config, AdamW) else int(isinstance(config, SGD) and config.momentum > 0)
    return moments * sum(p.numel() * p.element_size() for p in parameters)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All that the optimizer remembers: its tensors by "<parameter>|<entry>", and a JSON-able description.

    The description names the optimizer, lists the entries of every parameter that has any (one that no gradient has
    reached yet has none), and holds entries that are no tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    description: dict[str, Any] = {"optimizer": _kind(optimizer), "entries": {}, "values": {}}
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
    if description["optimizer"] != _kind(optimizer):
        raise CheckpointError(f"the checkpoint is of {description['optimizer']}, this run uses {_kind(optimizer)}")
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
        if isinstance(optimizer, Moments):
            wanted = {"step", *shapes(named[name], optimizer.rule, optimizer.bits)}
            if wanted != set(entries):
                raise CheckpointError(f"the checkpoint's optimizer remembers {', '.join(sorted(entries))} of {name}, this run keeps {', '.join(sorted(wanted))}")
    if found:
        raise CheckpointError(f"the checkpoint's optimizer state has {len(found)} entries too many, first {min(found)}")
    optimizer.state.clear()
    for name, entries in state.items():
        optimizer.state[named[name]] = entries


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return optimizer.kind if isinstance(optimizer, Moments) else type(optimizer).__name__


def _placed(key: str, value: Any, parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> Any:
    """A copy where the optimizer expects it: moments beside their parameter or paged, a step count (a scalar) there too if fused."""
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(optimizer, Moments):
        entry = key.rpartition("|")[2]
        shape, dtype = shapes(parameter, optimizer.rule, optimizer.bits).get(entry, ((), torch.float32))
        _check(key, value, shape, dtype, "this run keeps")
        return optimizer.place.zeros(parameter, entry, shape, dtype).copy_(value)
    if value.ndim:
        _check(key, value, tuple(parameter.shape), parameter.dtype, "the parameter is")
    if value.ndim or optimizer.defaults["fused"]:
        return value.to(parameter.device, copy=True)
    return value.clone()


def _check(key: str, value: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, fitting: str) -> None:
    if value.shape != shape or value.dtype != dtype:
        raise CheckpointError(f"the checkpoint's optimizer has {tuple(value.shape)} {value.dtype} for {key}, {fitting} {shape} {dtype}")


def _named(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.nn.Parameter]]:
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
