"""What holds adapters in a model: a Wrapper in a layer's place, with the layer as it was, or a Beside within a module.

Neither changes the module that it serves, so taking it away gives back the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from deltune.adapters.layers import Stack, stacks_of
from deltune.errors import AdapterError

BASE = "base_layer"  # PEFT's word too, so that tools which undo its prefix undo ours
BESIDE = "adapters_beside"  # the name under which a host holds what acts beside it


def base_name(name: str) -> str:
    """A module's or parameter's name as it was before any wrapper. The one place that knows the wrapper's prefix."""
    return ".".join(part for part in name.split(".") if part != BASE)


class Holder(nn.Module):
    """By adapter name, the part that each adapter adds in one place of the model."""

    def __init__(self):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []  # the model's active adapters in their order, also those without a part here
        self.enabled = True
        self.fixed: set[str] = set()  # adapters that are not trained

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

    def extra_repr(self) -> str:
        return f"active={self.running}"


class Wrapper(Holder):
    """A frozen layer and the parts of adapters, in the layer's place."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.base_layer = layer
        self.train(layer.training)

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


class Beside(Holder):
    """Parts of adapters that act through hooks on a module, their host, which stays where and what it is.

    It is a submodule of its host, so that its parameters are the model's, and does not hold the host.
    """

    def __init__(self, host: nn.Module):
        super().__init__()
        self.train(host.training)
        host.add_module(BESIDE, self)
        self._handles = self.hooks(host)

    def hooks(self, host: nn.Module) -> list[RemovableHandle]:
        """Register this holder's own methods on the host. Not closures: a copy of the model must hook its own copy."""
        raise NotImplementedError

    def take_off(self, host: nn.Module) -> None:
        for handle in self._handles:
            handle.remove()
        delattr(host, BESIDE)


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

    def stands_for(self) -> nn.Module:
        """What a call comes down to: `models.head` reads its weight, and computes the loss from that."""
        return self.answering()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answering()(*args, **kwargs)


def walk(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its name before any adapter. Wrappers come whole: their insides are left out, and so is
    whatever stands beside a module. A parameter with the weights of experts comes as a layer of its name.

    A module that the model holds under two names comes twice.
    """
    yield name, model
    if isinstance(model, Wrapper):
        return
    inside: dict[str, nn.Module | None] = dict(model._modules)
    for leaf, transposed in stacks_of(model).items():
        stack = Stack(model, leaf, transposed)
        inside[leaf] = inside.pop(stack.holder, stack)
    for child_name, child in inside.items():
        if child is not None and not isinstance(child, Beside):
            yield from walk(child, f"{name}.{child_name}" if name else child_name)


def original(module: nn.Module) -> nn.Module:
    """The module itself, or what a wrapper holds."""
    return module.base_layer if isinstance(module, Wrapper) else module


def wrappers(model: nn.Module) -> list[tuple[str, Holder]]:
    """Every holder with the name of its layer, or of its host; one that stands in two places comes once."""
    found: dict[int, tuple[str, Holder]] = {}
    for name, module in reversed(list(walk(model))):
        holder = module if isinstance(module, Wrapper) else module._modules.get(BESIDE)
        if holder is not None:
            found[id(holder)] = (name, holder)
    return list(reversed(found.values()))


def hosts(model: nn.Module) -> list[tuple[nn.Module, Beside]]:
    """Every module with something beside it, and that."""
    found = {id(module): module for _, module in walk(model) if not isinstance(module, Wrapper) and BESIDE in module._modules}
    return [(module, module._modules[BESIDE]) for module in found.values()]


def replace(model: nn.Module, exchange: dict[int, nn.Module]) -> None:
    """Put new modules where old ones are, in every place that holds them. `exchange`: id of the old one to the new one."""
    for _, parent in list(walk(model)):
        if isinstance(parent, Wrapper):
            continue
        for child_name, child in parent._modules.items():
            if id(child) in exchange:
                setattr(parent, child_name, exchange[id(child)])
