"""How a section's dataclass describes its fields: default, meaning, range and choices in one place, checked by `check`."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
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


def section(cls: type, help: str = "", *, primary: str | None = None) -> Any:
    """A field that holds another section's dataclass with all its defaults.

    `primary` is the key that a plain value given to the whole section means: `model=./folder` is `model.path=./folder`.
    """
    return dataclasses.field(default_factory=cls, metadata={"help": help, "section": cls, "primary": primary})


@dataclasses.dataclass(frozen=True)
class Choice:
    """A section whose fields depend on a name in it: `schedule.name=cosine` makes the section a `Cosine`.

    `options` maps each name to a dataclass, or to "module:Class" so that heavy modules are imported only when chosen.
    `key` is the field that holds the name. `optional` allows the whole section to be null. `base` is a dataclass with
    what every option has, so that help can be printed without importing the options. `named` holds sets of choices under one
    name, by dotted key of the root: `adapter=pissa` states them all.
    """

    key: str
    options: Mapping[str, type | str]
    default: str | None
    optional: bool = False
    help: str = ""
    base: type | None = None
    named: Mapping[str, Mapping[str, Any]] | None = None

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


def default_of(field: dataclasses.Field) -> Any:
    """A field's default, built if need be; dataclasses.MISSING where a value must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def changed(section: Any, name: str) -> bool:
    """Whether a section's field differs from its default."""
    return getattr(section, name) != default_of(next(field for field in dataclasses.fields(section) if field.name == name))


@functools.cache
def hints(cls: type) -> Mapping[str, Any]:
    """Each field's type, evaluated."""
    return typing.get_type_hints(cls)


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type there is."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting of a root dataclass: where it is, what it may be, and which options of its section have it."""

    path: tuple[str, ...]
    hint: Any
    field: dataclasses.Field
    section: type  # the dataclass that has the field
    option: str | None = None  # the option of the nearest Choice that this field belongs to

    @property
    def dotted(self) -> str:
        return ".".join(self.path)


def walk(cls: type, *, load: bool = True, path: tuple[str, ...] = (), option: str | None = None) -> Iterator[Key]:
    """Every key below a dataclass, those of a Choice once for each option that has them.

    With `load=False` options that would have to be imported are left out, and their table's `base` stands for them.
    """
    types_of = hints(cls)
    for field in dataclasses.fields(cls):
        here = (*path, field.name)
        if "table" in field.metadata:
            table: Choice = field.metadata["table"]
            for name, found in table.options.items():
                if load or not isinstance(found, str):
                    yield from walk(table.resolve(name), load=load, path=here, option=name)
            if not load and table.base is not None:
                yield from walk(table.base, load=load, path=here)
        elif "section" in field.metadata:
            yield from walk(field.metadata["section"], load=load, path=here)
        else:
            yield Key(here, types_of[field.name], field, cls, option)
