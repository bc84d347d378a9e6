"""Settings described from their dataclasses: help for the terminal, Markdown for the docs, JSON Schema for editors.

Nothing is written twice: names, defaults, ranges, choices and meanings are the fields' own.
"""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from deltune.config.check import range_text, shown, wanted
from deltune.config.fields import Choice, Key, default_of, hints, members, walk

_JSON_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}
_JSON_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One key as it is told to a reader: options of a section that treat it alike share an entry."""

    key: str
    default: str
    values: str
    help: str
    options: tuple[str, ...]  # those that have it; empty where all have


def entries(cls: type, section: str | None, *, load: bool, chosen: Mapping[str, str] | None = None) -> list[Entry]:
    """The keys of one section, or with None those that stand at the top. `chosen` narrows a section to one option."""
    field = {field.name: field for field in dataclasses.fields(cls)}.get(section or "")
    table: Choice | None = field.metadata.get("table") if field else None
    if table is not None and section in (chosen or {}):
        keys = list(walk(table.resolve(chosen[section]), path=(section,)))
    else:
        keys = [key for key in walk(cls, load=load) if (key.path[0] if len(key.path) > 1 else None) == section]
    names = list(dict.fromkeys(key.option for key in keys))
    alike: dict[tuple[str, ...], list[Key]] = {}
    for key in keys:
        alike.setdefault((key.dotted, *_facts(key, table)), []).append(key)
    found = []
    for (dotted, default, values, help), group in alike.items():
        having = tuple(dict.fromkeys(key.option for key in group if key.option))
        everywhere = len(having) == len([name for name in names if name])
        found.append(Entry(dotted, default, values, help, () if everywhere else having))
    order = {entry.key: i for i, entry in reversed(list(enumerate(found)))}
    return sorted(found, key=lambda entry: (bool(entry.options), order[entry.key]))


def _facts(key: Key, table: Choice | None) -> tuple[str, str, str]:
    if table is not None and key.path[-1] == table.key:
        return shown(table.default), " | ".join(table.options), key.field.metadata.get("help", "")
    default = default_of(key.field)
    return "" if default is dataclasses.MISSING else shown(default), _values(key), key.field.metadata.get("help", "")


def _values(key: Key) -> str:
    """Type, range or choices, in few words."""
    limits = key.field.metadata
    if limits.get("choices"):
        return " | ".join(map(shown, limits["choices"])) + (" | null" if type(None) in members(key.hint) else "")
    unit = f" ({limits['unit']})" if limits.get("unit") else ""
    reach = range_text(limits)
    null = " or null" if type(None) in members(key.hint) else ""
    kinds = [kind for kind in members(key.hint) if kind is not type(None)]
    text = " or ".join(wanted(kind) for kind in kinds)
    return f"{text}{' ' + reach if reach else ''}{null}{unit}"


def sections(cls: type) -> Iterator[tuple[str, str, str]]:
    """Each section's name, what it is for, and what it may be when it can be null."""
    for field in dataclasses.fields(cls):
        if "table" in field.metadata:
            table: Choice = field.metadata["table"]
            yield field.name, table.help, "null" if table.optional else ""
        elif "section" in field.metadata:
            yield field.name, field.metadata["help"], ""


# -- the terminal -----------------------------------------------------------------------------------------------


def help_text(cls: type, groups: Mapping[str, list[str]], chosen: Mapping[str, str], width: int) -> str:
    """Every key of a verb's settings, section by section. Options that must be imported are only shown when chosen."""
    lines = [*_entry_lines(entries(cls, None, load=False), width)]
    for name, meaning, _ in sections(cls):
        lines += ["", f"{name}: {meaning}"]
        if groups.get(name):
            lines += textwrap.wrap(f"options: {', '.join(f'{name}={option}' for option in groups[name])}", width, initial_indent="  ", subsequent_indent="    ")
        field = next(field for field in dataclasses.fields(cls) if field.name == name)
        table: Choice | None = field.metadata.get("table")
        lines += _entry_lines(entries(cls, name, load=False, chosen=chosen), width)
        if table is not None and name not in chosen and any(isinstance(option, str) for option in table.options.values()):
            lines.append(f"  and the keys of each {table.key}: see them with {name}={next(iter(table.options))} --help")
    return "\n".join(lines).strip("\n")


def _entry_lines(found: list[Entry], width: int) -> list[str]:
    lines = []
    for entry in found:
        head = f"  {entry.key}" + (f" = {entry.default}" if entry.default else "")
        only = f" Only {', '.join(entry.options)}." if entry.options else ""
        lines.append(head)
        lines += textwrap.wrap(f"{entry.help}{only} [{entry.values}]", width, initial_indent="      ", subsequent_indent="      ")
    return lines


# -- the docs ---------------------------------------------------------------------------------------------------


def markdown(cls: type, *, skip: tuple[str, ...] = ()) -> str:
    """Tables of a verb's keys, all options included; sections in `skip` are left out."""
    parts = [_table(entries(cls, None, load=True))]
    for name, meaning, null in sections(cls):
        if name not in skip:
            parts.append(f"### {name}\n\n{meaning}{' `null` switches it off.' if null and 'null' not in meaning else ''}\n\n{_table(entries(cls, name, load=True))}")
    return "\n\n".join(part for part in parts if part)


def _table(found: list[Entry]) -> str:
    if not found:
        return ""
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for entry in found:
        only = f" *Only {', '.join(entry.options)}.*" if entry.options else ""
        default = f"`{_cell(entry.default)}`" if entry.default else "must be given"
        rows.append(f"| `{entry.key}` | {default} | {_cell(entry.values)} | {_cell(entry.help)}{only} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# -- editors ----------------------------------------------------------------------------------------------------


def schema(cls: type, groups: Mapping[str, list[str]]) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a config file for a dataclass; keys written short or dotted are not in it."""
    properties = {}
    for field in dataclasses.fields(cls):
        made = _field_schema(field, hints(cls)[field.name])
        others = [{"enum": groups[field.name]}] if groups.get(field.name) else []
        if field.metadata.get("primary"):  # a plain value for the whole section
            others = [{"type": "string"}, made["properties"][field.metadata["primary"]]]
        if others:
            made = {"anyOf": [*others, made], "description": made.pop("description")}
        properties[field.name] = made
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": cls.__name__, "type": "object",
        "properties": properties, "additionalProperties": False,
    }


def _object(cls: type, fixed: Mapping[str, str] | None = None) -> dict[str, Any]:
    types = hints(cls)
    properties = {field.name: _field_schema(field, types[field.name]) for field in dataclasses.fields(cls)}
    for name, value in (fixed or {}).items():
        properties[name] = {"const": value, "description": properties[name].get("description", "")}
    required = [field.name for field in dataclasses.fields(cls) if default_of(field) is dataclasses.MISSING]
    made = {"type": "object", "properties": properties, "additionalProperties": False}
    return made | ({"required": required} if required else {})


def _field_schema(field: dataclasses.Field, hint: Any) -> dict[str, Any]:
    limits = field.metadata
    if "table" in limits:
        table: Choice = limits["table"]
        made = [_option_schema(table, name) for name in table.options]
        return {"anyOf": [*made, *([{"type": "null"}] if table.optional else [])], "description": table.help}
    if "section" in limits:
        return _object(limits["section"]) | {"description": limits["help"]}
    made = _type_schema(hint, limits)
    default = default_of(field)
    return made | {"description": limits["help"]} | ({} if default is dataclasses.MISSING else {"default": default})


def _option_schema(table: Choice, name: str) -> dict[str, Any]:
    made = _object(table.resolve(name), {table.key: name})
    return made if name == table.default else made | {"required": [table.key]}


def _type_schema(hint: Any, limits: Mapping[str, Any]) -> dict[str, Any]:
    made = [_one_type(member, limits) for member in members(hint)]
    return made[0] if len(made) == 1 else {"anyOf": made}


def _one_type(kind: Any, limits: Mapping[str, Any]) -> dict[str, Any]:
    container, inner = typing.get_origin(kind), typing.get_args(kind)
    if container is list:
        return {"type": "array", "items": _type_schema(inner[0], limits)}
    if container is dict:
        return {"type": "object", "additionalProperties": _type_schema(inner[1], limits)}
    if dataclasses.is_dataclass(kind):
        return _object(kind)
    made: dict[str, Any] = {"type": _JSON_TYPES[kind]}
    if limits.get("choices") and kind is not type(None):
        made["enum"] = list(limits["choices"])
    if kind in (int, float):
        made |= {word: limits[name] for name, word in _JSON_LIMITS.items() if limits.get(name) is not None}
    return made
