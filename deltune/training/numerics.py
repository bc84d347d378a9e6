"""When a number breaks: where it broke first, so that the message can name it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deltune.training import randomness
from deltune.training.loss import ForwardStep


def _finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, (tuple, list)):
        return all(_finite(v) for v in value)
    if isinstance(value, dict):
        return all(_finite(v) for v in value.values())
    return True


def first_bad_weight(model: torch.nn.Module) -> str | None:
    """Name of the first parameter with a value that is not finite."""
    return next((name for name, p in model.named_parameters() if not _finite(p.detach())), None)


def first_bad_gradient(model: torch.nn.Module) -> str | None:
    """Name of the parameter nearest the loss whose gradient is not finite: gradients flow from the last to the first."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return next((name for name, grad in reversed(named) if not _finite(grad)), None)


def first_bad_module(model: torch.nn.Module, batch: Any, forward: ForwardStep) -> str | None:
    """Name of the first module, in order of execution, that turns finite inputs into an output that is not.

    Runs the forward pass again with hooks; random numbers drawn by it are given back.
    """
    found: list[str] = []

    def watch(name: str):
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if not found and _finite(inputs) and not _finite(output):
                found.append(name or type(module).__name__)

        return hook

    # innermost modules report first, since a parent's hook runs after its children's
    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    state = randomness.capture()
    try:
        with torch.no_grad():
            forward(model, batch)
    finally:
        randomness.restore(*state)
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def diagnose(model: torch.nn.Module, batches: Sequence[Any], forward: ForwardStep) -> str:
    """One clause saying what broke: a weight, a module's output on which rows, or a gradient."""
    weight = first_bad_weight(model)
    if weight is not None:
        return f"the weight {weight} holds values that are not finite"
    for batch in batches:
        module = first_bad_module(model, batch, forward)
        if module is not None:
            return f"the first output that is not finite is that of {module}, on rows {_rows([batch])}"
    gradient = first_bad_gradient(model)
    if gradient is not None:
        return f"the forward pass is finite, the first gradient that is not is that of {gradient}; rows {_rows(batches)}"
    return f"rows {_rows(batches)}"


def _rows(batches: Sequence[Any], most: int = 16) -> str:
    rows = [row for batch in batches for row in batch.rows]
    return ", ".join(rows[:most]) + (f" and {len(rows) - most} more" if len(rows) > most else "")
