"""How many parameters a model has and trains, by module. Layers that differ only in a number share a row."""

from __future__ import annotations

from typing import Any

from torch import nn

from deltune.adapters.wrapper import TrainedCopy, Wrapper, original, walk


def parameter_table(model: nn.Module) -> list[dict[str, Any]]:
    """Rows with `module` (numbers as *), `type`, `tensors`, `trainable` and `total` parameters, in the model's order.

    An adapter's parameters are in its layer's row. A tensor that several modules share is counted in the first.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    seen: set[int] = set()
    for name, module in walk(model):
        wrapped = isinstance(module, Wrapper)
        parameters = [p for p in module.parameters(recurse=wrapped) if id(p) not in seen]
        seen.update(map(id, parameters))
        if not parameters:
            continue
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        kind = type(original(module)).__name__
        if isinstance(module, TrainedCopy):
            kind += " + copy"
        elif isinstance(module, Wrapper):
            kind += "".join(f" + {delta.config.method}" for delta in module.adapters.values())
        row = rows.setdefault((pattern, kind), {"module": pattern, "type": kind, "tensors": 0, "trainable": 0, "total": 0})
        row["tensors"] += len(parameters)
        row["trainable"] += sum(p.numel() for p in parameters if p.requires_grad)
        row["total"] += sum(p.numel() for p in parameters)
    return list(rows.values())
