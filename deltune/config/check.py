"""Plain values become an instance of a section's dataclass, or one ConfigError that lists everything wrong with them.

Nothing is guessed: a value is taken as it is, or as the one thing it can only mean (8.0 for a whole number, "1e-4" for
a number, a single value for a list of one). Everything else is a problem with its key, its place and what would fit.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from deltune.config.fields import Choice, default_of, hints, members, walk
from deltune.config.foreign import value_here
from deltune.config.suggest import closest, nearest, nearest_keys
from deltune.errors import ConfigError

T = TypeVar("T")
Origins = Mapping[tuple[str, ...], str]

_NOTHING = object()
_YES, _NO = ("true", "yes", "on"), ("false", "no", "off")
_LONGEST_SHOWN = 80


def build(cls: type[T], mapping: Mapping[str, Any], where: str | Origins = "") -> T:
    """An instance of a dataclass from nested plain values, checked all through, cross-field rules included.

    `where` names the place that the values came from: one label, or a label for each path of keys. A class with a
    method `problems() -> list[str]`, each beginning with the key it is about, is asked once all its values fit.
    Raises one ConfigError with every problem found.
    """
    builder = _Builder(cls, where)
    instance = builder.instance(cls, mapping, ())
    if builder.problems:
        raise ConfigError(joined(builder.problems))
    return instance


def joined(problems: Iterable[str]) -> str:
    """One message of one or several problems."""
    found = list(dict.fromkeys(problems))
    if len(found) == 1:
        return found[0]
    return "\n  ".join([f"{len(found)} problems in the config:", *found])


def shown(value: Any) -> str:
    """A value as a user would write it, shortened."""
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if getattr(value, field.name) != default_of(field)}
    if isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(map(shown, value)) + "]"
    elif isinstance(value, str):
        text = value if value and value.isprintable() and value == value.strip() else repr(value)
    else:
        text = str(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"


class _Unfit(Exception):
    """A value that cannot be what its key wants; the text says what would fit."""


class _Builder:
    def __init__(self, root: type, where: str | Origins):
        self.root, self.where = root, where
        self.problems: list[str] = []

    # -- messages -------------------------------------------------------------------------------------------------

    def origin(self, path: tuple[str, ...]) -> str:
        """Where a path's value came from; the nearest path above it that has a label speaks for it."""
        if isinstance(self.where, str):
            return f" ({self.where})" if self.where else ""
        for end in range(len(path), 0, -1):
            if path[:end] in self.where:
                return f" ({self.where[path[:end]]})"
        return ""

    def problem(self, path: tuple[str, ...], text: str, value: Any = _NOTHING) -> None:
        key = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(path))
        stated = key if value is _NOTHING else f"{key}={shown(value)}"
        self.problems.append(f"{stated}{self.origin(path)}: {text}")

    # -- sections -------------------------------------------------------------------------------------------------

    def instance(self, cls: type[T], mapping: Any, path: tuple[str, ...]) -> T | None:
        """The dataclass with every key checked; None if any problem was noted for it."""
        if not isinstance(mapping, Mapping):
            self.problem(path, f"wants keys of its own: {self.keys_of(cls, path)}", mapping)
            return None
        before, values, types = len(self.problems), {}, hints(cls)
        known = {field.name: field for field in dataclasses.fields(cls)}
        for key in mapping:
            if key not in known:
                self.unknown((*path, str(key)), mapping[key], cls)
        for name, field in known.items():
            values[name] = self.member(field, types[name], mapping.get(name, _NOTHING), (*path, name))
        if len(self.problems) > before:
            return None
        made = cls(**values)
        if hasattr(made, "problems"):
            for problem in made.problems():
                self.broken_rule(problem, made, path)
        return made

    def broken_rule(self, problem: str, made: Any, path: tuple[str, ...]) -> None:
        """Note what a dataclass found wrong with its values: the key it begins with, then a space, then the fault."""
        key, _, text = problem.partition(" ")
        value = made
        for name in key.split("."):
            value = getattr(value, name)
        here = (*path, *key.split("."))
        self.problem(here, text, value if self.origin(here) else _NOTHING)

    def member(self, field: dataclasses.Field, hint: Any, value: Any, path: tuple[str, ...]) -> Any:
        if "table" in field.metadata:
            return self.chosen(field.metadata["table"], value, path)
        if "section" in field.metadata:
            return self.instance(field.metadata["section"], {} if value is _NOTHING else value, path)
        if value is _NOTHING:
            value = default_of(field)
            if value is dataclasses.MISSING:
                self.problem(path, f"must be given: {field.metadata.get('help') or wanted(hint)}")
            return value
        try:
            value = self.convert(hint, value, path)
            _within(field, value)
        except _Unfit as unfit:
            self.problem(path, str(unfit), value)
        return value

    def chosen(self, table: Choice, value: Any, path: tuple[str, ...]) -> Any:
        """The instance of the option that the section's own key names."""
        if value is None and table.optional:
            return None
        if value is _NOTHING:
            if table.default is None:
                if not table.optional:
                    self.problem((*path, table.key), f"must be given: {', '.join(table.options)}")
                return None
            value = {}
        if not isinstance(value, Mapping):
            self.problem(path, f"wants keys of its own, e.g. {path[-1]}.{table.key}={next(iter(table.options))}", value)
            return None
        name = value.get(table.key, table.default)
        if name is None:
            self.problem((*path, table.key), f"must be given: {', '.join(table.options)}")
            return None
        if not isinstance(name, str) or name not in table.options:
            null = "; null for none" if table.optional else ""
            meant = value_here(".".join((*path, table.key)), str(name))
            hint = f"; {name} of other tools is {meant} here" if meant else closest(name, list(table.options))
            self.problem((*path, table.key), f"there are {', '.join(table.options)}{null}{hint}", name)
            return None
        return self.instance(table.resolve(name), {table.key: name, **value}, path)

    # -- unknown keys ---------------------------------------------------------------------------------------------

    def unknown(self, path: tuple[str, ...], value: Any, cls: type) -> None:
        if path[-1] == "_target_":
            return self.problem(path, "refused: a config cannot name Python to run", value)
        if isinstance(value, Mapping) and value and len(path) == 1:
            # a section that does not exist is best answered key by key: `training.lr`
            for key, inner in value.items():
                self.problem((*path, str(key)), explain(self.root, (*path, str(key)), cls), inner)
            return None
        self.problem(path, explain(self.root, path, cls), value)

    def keys_of(self, cls: type, path: tuple[str, ...]) -> str:
        return ", ".join(".".join((*path, field.name)) for field in dataclasses.fields(cls))

    # -- values ---------------------------------------------------------------------------------------------------

    def convert(self, hint: Any, value: Any, path: tuple[str, ...]) -> Any:
        """The value as its type wants it; raises _Unfit. Problems inside a nested mapping are noted at their own keys."""
        choices = members(hint)
        if value is None and type(None) in choices:
            return None
        reasons = []
        for member in sorted(choices, key=lambda member: not _exactly(member, value)):
            if member is type(None):
                continue
            try:
                return self.convert_one(member, value, path)
            except _Unfit as unfit:
                reasons.append(str(unfit))
        raise _Unfit(reasons[0] if len(reasons) == 1 else f"must be {wanted(hint)}")

    def convert_one(self, kind: Any, value: Any, path: tuple[str, ...]) -> Any:
        container = typing.get_origin(kind)
        if container is list:
            (item,) = typing.get_args(kind)
            listed = list(value) if isinstance(value, (list, tuple)) else [value]
            if value is None or (isinstance(value, Mapping) and not _takes_mapping(item)):
                raise _Unfit(f"must be {wanted(kind)}")
            return [self.item(item, entry, (*path, str(i))) for i, entry in enumerate(listed)]
        if container is dict:
            _, item = typing.get_args(kind)
            if not isinstance(value, Mapping):
                raise _Unfit(f"must be {wanted(kind)}")
            return {str(key): self.item(item, entry, (*path, str(key))) for key, entry in value.items()}
        if dataclasses.is_dataclass(kind):
            if isinstance(value, kind):
                value = dataclasses.asdict(value)
            if not isinstance(value, Mapping):
                raise _Unfit(f"must be {wanted(kind)}")
            return self.instance(kind, value, path)
        return _SCALARS[kind](value)

    def item(self, hint: Any, value: Any, path: tuple[str, ...]) -> Any:
        try:
            return self.convert(hint, value, path)
        except _Unfit as unfit:
            self.problem(path, str(unfit), value)
            return value


# -- scalars ----------------------------------------------------------------------------------------------------


def _integer(value: Any) -> int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value) and value == int(value):
        return int(value)
    raise _Unfit("must be a whole number")


def _number(value: Any) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _Unfit("must be a number") from None
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise _Unfit("must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _Unfit("must be a finite number")
    return number


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _YES + _NO:
        return value.lower() in _YES
    raise _Unfit("must be true or false")


def _text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise _Unfit("must be text (put it in quotes if it is)")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _Unfit("must be text in UTF-8") from None
    if "\0" in value:
        raise _Unfit("must be text without NUL characters")
    return value


_SCALARS = {int: _integer, float: _number, bool: _boolean, str: _text}
_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def wanted(hint: Any) -> str:
    """A type in plain words."""
    words = []
    for member in members(hint):
        if typing.get_origin(member) is list:
            words.append(f"a list [..] of {wanted(typing.get_args(member)[0])}")
        elif typing.get_origin(member) is dict:
            words.append(f"a mapping {{name: ..}} to {wanted(typing.get_args(member)[1])}")
        elif dataclasses.is_dataclass(member):
            words.append("a mapping with " + ", ".join(field.name for field in dataclasses.fields(member)))
        else:
            words.append(_WANTED[member])
    return " or ".join(words)


def _exactly(kind: Any, value: Any) -> bool:
    """Whether a value is of a type already, so that a union prefers it to types that it could be turned into."""
    container = typing.get_origin(kind) or kind
    if dataclasses.is_dataclass(container):
        return isinstance(value, (container, Mapping))
    # on a command line a truth value is a word, and no text means the same
    return type(value) is container or (container is bool and value in ("true", "false"))


def _takes_mapping(hint: Any) -> bool:
    return any(dataclasses.is_dataclass(member) or typing.get_origin(member) is dict for member in members(hint))


def _within(field: dataclasses.Field, value: Any) -> None:
    """Raise _Unfit for a value outside the field's range or choices; each item of a list is held to the choices."""
    limits = field.metadata
    if limits.get("choices") and value is not None:
        for item in value if isinstance(value, list) else [value]:
            if item not in limits["choices"]:
                raise _Unfit(f"must be one of {', '.join(map(shown, limits['choices']))}{closest(item, [str(c) for c in limits['choices']])}")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not _in_range(limits, value):
        raise _Unfit(f"must be {range_text(limits)}")


def _in_range(limits: Mapping[str, Any], value: float) -> bool:
    ge, gt, le, lt = (limits.get(name) for name in ("ge", "gt", "le", "lt"))
    return (ge is None or value >= ge) and (gt is None or value > gt) and (le is None or value <= le) and (lt is None or value < lt)


def range_text(limits: Mapping[str, Any]) -> str:
    """A field's range in words, or nothing."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(f"{word} {limits[name]:g}" for name, word in words.items() if limits.get(name) is not None)


# -- what an unknown key may mean -------------------------------------------------------------------------------


def explain(root: type, path: tuple[str, ...], cls: type) -> str:
    """What to say of a key that `cls`, found below `root`, does not have: which option has it, what other tools call it,
    or the nearest real keys."""
    from deltune.config.foreign import FOREIGN

    if path[-2:-1] and path[-2].isdigit():  # inside an item of a list
        return _nearest_text(nearest(path[-1], [field.name for field in dataclasses.fields(cls)]))
    dotted, keys = ".".join(path), list(walk(root))
    having = [key.option for key in keys if key.dotted == dotted and key.option]
    if having:
        chosen = next(key.option for key in keys if key.path[:-1] == path[:-1] and key.section is cls)
        return f"{'.'.join(path[:-1])}={chosen} has no such key; {_and(having)} {'has' if len(having) == 1 else 'have'} it"
    same_leaf = list(dict.fromkeys(key.dotted for key in keys if key.path[-1] == path[-1]))
    if len(path) == 1 and len(same_leaf) > 1:
        return f"stands in several sections; write one of {', '.join(same_leaf)}"
    names = {key.dotted for key in keys}
    foreign = FOREIGN.get(path[-1].lower().replace("-", "_"))
    if foreign is not None and not same_leaf and foreign.text(names):
        return f"there is no such key; {foreign.text(names)}"
    return _nearest_text(nearest_keys(dotted, names))


def _nearest_text(found: list[str]) -> str:
    return "there is no such key" + (f"; nearest: {', '.join(found)}" if found else f"; see `{_LIST_KEYS}`")


_LIST_KEYS = "deltune list keys"


def _and(names: list[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
