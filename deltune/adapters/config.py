"""The `adapter` section: what every method has. Light to import; a method's own fields live beside its formula."""

from __future__ import annotations

import dataclasses
import operator
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltune.config.fields import Choice, hints, members, option

if TYPE_CHECKING:
    from deltune.adapters.delta import Delta


@dataclass(frozen=True)
class AdapterConfig:
    """Where an adapter goes. Methods add their own fields."""

    method: str = option(help="Adaptation method.")
    targets: list[str] | str = option("all-linear", "Modules to adapt: `all-linear` (every linear layer but the output head), module name endings, full names, or one regular expression over the full name.")
    exclude: list[str] = option([], "Module name endings or full names never adapted.")
    modules_to_save: list[str] = option([], "Modules trained in full beside the adapter and saved with it, e.g. lm_head.")
    dropout: float = option(0.0, "Dropout on the adapter's own input while training; an embedding's input has none.", ge=0, lt=1)
    dtype: str = option("float32", "Storage type of the adapter's weights; they compute in the type of the activations. auto takes the base weight's.", choices=("float32", "bfloat16", "float16", "auto"))

    @staticmethod
    def delta() -> type[Delta]:
        """The class that computes this method."""
        raise NotImplementedError


# name -> dataclass of the method's hyperparameters
METHODS = {"lora": "deltune.adapters.methods.lora:LoraConfig"}

ADAPTERS = Choice("method", METHODS, default="lora", optional=True, base=AdapterConfig, help="Adaptation method and where it goes; null trains the model's own weights.")

_LIMITS = {"ge": (operator.ge, "at least"), "gt": (operator.gt, "above"), "le": (operator.le, "at most"), "lt": (operator.lt, "below")}


def complaint(config: AdapterConfig) -> str | None:
    """What is wrong with a config's values, if anything. One that was made in Python, or read from a file of another
    program, has not been through the checks of the command line."""
    types = hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        choices = field.metadata.get("choices")
        if not any(_fits(value, hint) for hint in members(types[field.name])):
            return f"{field.name} is {value!r}; it must be {field.type}"
        if choices and value not in choices:
            return f"{field.name} is {value!r}; it can be {', '.join(map(str, choices))}"
        for key, (holds, words) in _LIMITS.items():
            limit = field.metadata.get(key)
            if limit is not None and not holds(value, limit):
                return f"{field.name} is {value!r}; it must be {words} {limit:g}"
    return None


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0  # finite
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
