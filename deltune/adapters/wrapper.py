"""What stands in a layer's place while adapters are attached: the layer as it was, and one part for each adapter.

A wrapper never changes the layer it holds, so taking it away gives back the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from deltune.errors import AdapterError

BASE = "base_layer"  # PEFT's word too, so that tools which undo its prefix undo ours


def base_name(name: str) -> str:
    """A module's or parameter's name as it was before any wrapper. The one place that knows the wrapper's prefix."""
    return ".".join(part for part in name.split(".") if part != BASE)


class Wrapper(nn.Module):
    """A frozen layer and, by adapter name, the part that each adapter adds to it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.base_layer = layer
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []  # the model's active adapters in their order, also those without a part here
        self.enabled = True
        self.fixed: set[str] = set()  # adapters that are not trained
        self.train(layer.training)

    @property
    def running(self) -> list[str]:
        """The adapters that act here, in their order."""
        return [name for name in self.active if name in self.adapters] if self.enabled else []

    def add(self, name: str, part: nn.Module, *, trainable: bool) -> None:
        self.adapters[name] = part.train(self.training)
        if not trainable:
            self.fixed.add(name)

    def remove(self, name: str) -> None:
        del self.adapters[name]
        self.fixed.discard(name)

    def set_active(self, names: Sequence[str]) -> None:
        """Run these adapters, in this order; the others rest and are not trained."""
        self.active = list(names)
        for name, part in self.adapters.items():
            part.requires_grad_(name in self.active and name not in self.fixed)

    def __getattr__(self, name: str) -> Any:
        # Models ask a layer for its weight, in_features, padding_idx … and get the base layer's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or BASE not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.answering(), name)

    def answering(self) -> nn.Module:
        """The module whose attributes are this wrapper's."""
        return self.base_layer

    def extra_repr(self) -> str:
        return f"active={self.running}"


class TrainedCopy(Wrapper):
    """A module that adapters train in full: the active adapter's copy answers in its place (PEFT's modules_to_save)."""

    def check_active(self, names: Sequence[str]) -> None:
        """Raise AdapterError if more than one of these adapters has a copy here."""
        names = [name for name in names if name in self.adapters]
        if len(names) > 1:
            raise AdapterError(
                f"adapters {' and '.join(names)} each train a copy of the same {type(self.base_layer).__name__}, and only "
                "one copy can answer; switch one of them off"
            )

    def answering(self) -> nn.Module:
        return self.adapters[self.running[0]] if self.running else self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answering()(*args, **kwargs)


def walk(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name before any wrapper. Wrappers come whole: their insides are left out.

    A module that the model holds under two names comes twice.
    """
    yield name, model
    if isinstance(model, Wrapper):
        return
    for child_name, child in model._modules.items():
        if child is not None:
            yield from walk(child, f"{name}.{child_name}" if name else child_name)


def original(module: nn.Module) -> nn.Module:
    """The module itself, or what a wrapper holds."""
    return module.base_layer if isinstance(module, Wrapper) else module


def wrappers(model: nn.Module) -> list[tuple[str, Wrapper]]:
    """Every wrapper with its layer's name; one that stands in two places comes once."""
    found = {id(module): (name, module) for name, module in reversed(list(walk(model))) if isinstance(module, Wrapper)}
    return list(reversed(found.values()))


def replace(model: nn.Module, exchange: dict[int, nn.Module]) -> None:
    """Put new modules where old ones are, in every place that holds them. `exchange`: id of the old one to the new one."""
    for _, parent in list(walk(model)):
        if isinstance(parent, Wrapper):
            continue
        for child_name, child in parent._modules.items():
            if id(child) in exchange:
                setattr(parent, child_name, exchange[id(child)])
