"""How a section's dataclass describes its fields: default, meaning, range and choices in one place, checked by `check`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

_EMPTY: tuple = ()


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    choices: Sequence[Any] = _EMPTY,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    unit: str = "",
) -> Any:
    """A dataclass field with its help text and limits. A list or dict default is copied for each instance."""
    metadata = {"help": help, "choices": tuple(choices), "ge": ge, "gt": gt, "le": le, "lt": lt, "unit": unit}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls: type, help: str = "") -> Any:
    """A field that holds another section's dataclass with all its defaults."""
    return dataclasses.field(default_factory=cls, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Choice:
    """A section whose fields depend on a name in it: `schedule.name=cosine` makes the section a `Cosine`.

    `options` maps each name to a dataclass, or to "module:Class" so that heavy modules are imported only when chosen.
    `key` is the field that holds the name. `optional` allows the whole section to be null.
    """

    key: str
    options: Mapping[str, type | str]
    default: str | None
    optional: bool = False
    help: str = ""

    def resolve(self, name: str) -> type:
        """The dataclass of one name; KeyError if there is none."""
        found = self.options[name]
        if isinstance(found, str):
            import importlib

            module, _, attribute = found.partition(":")
            found = getattr(importlib.import_module(module), attribute)
        return found


def choice(table: Choice) -> Any:
    """A field whose value is an instance of one of the table's dataclasses."""

    def build() -> Any:
        return None if table.default is None else table.resolve(table.default)()

    return dataclasses.field(default_factory=build, metadata={"help": table.help, "table": table})
