"""A config file as plain values with the line of each: read safely, and written so that it reads back to the same values.

Scalars follow YAML 1.2 (only true and false are booleans, 1e-4 is a number, 12:30 and 2024-01-01 are text). Nothing in
a file can name Python, pull in another file, or grow: tags, aliases and empty values are refused, and << is a key like any other.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from deltune.config.references import escaped
from deltune.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_DIGITS = 100

_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SCALARS = {
    "tag:yaml.org,2002:null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "tag:yaml.org,2002:bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "tag:yaml.org,2002:int": (_INT, list("-+0123456789")),
    "tag:yaml.org,2002:float": (_FLOAT, list("-+.0123456789")),
}
_STRING = "tag:yaml.org,2002:str"

Lines = dict[tuple[str, ...], int]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern.pattern})$"), _first)


def read(path: Path) -> tuple[dict[str, Any], Lines]:
    """The file's mapping, and the line (1 is the first) of each key in it, by path. ConfigError for anything unfit."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_neighbours(path)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES:,} bytes; that is no config")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    return parse(text, str(path))


def _neighbours(path: Path) -> str:
    if not os.path.isdir(path.parent):
        return f", and no folder {path.parent}"
    found = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))[:8]
    return f"; in that folder: {', '.join(found)}" if found else ""


def parse(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    """As `read`, from text; `name` stands for the file in messages."""
    lines: Lines = {}
    try:
        _refuse_growth(text, name)
        node = yaml.compose(text, Loader=_Loader)
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{_at(name, node)}: a config is a mapping of keys to values, e.g. `model: ./folder`")
        return _value(node, name, (), lines), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"{where}: not valid YAML: {error.problem}{context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}:{line}: character {error.character:#06x} cannot be in a YAML file") from None


def _at(name: str, item: Any) -> str:
    return f"{name}:{item.start_mark.line + 1}:{item.start_mark.column + 1}"


def _refuse_growth(text: str, name: str) -> None:
    """Depth and aliases are judged on the event stream, which needs no recursion."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise ConfigError(f"{_at(name, event)}: anchors and aliases (& and *) are refused; refer to another key as ${{section.key}}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{_at(name, event)}: nested more than {MAX_DEPTH} deep")


def _value(node: yaml.Node, name: str, path: tuple[str, ...], lines: Lines) -> Any:
    if isinstance(node, yaml.MappingNode):
        _refuse_tag(node, "tag:yaml.org,2002:map", name)
        return _mapping(node, name, path, lines)
    if isinstance(node, yaml.SequenceNode):
        _refuse_tag(node, "tag:yaml.org,2002:seq", name)
        return [_value(item, name, (*path, str(i)), lines) for i, item in enumerate(node.value)]
    return _scalar(node, name)


def _mapping(node: yaml.MappingNode, name: str, path: tuple[str, ...], lines: Lines) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key is None or key_node.tag == "tag:yaml.org,2002:null":
            raise ConfigError(f"{_at(name, key_node)}: a key must be text")
        here = (*path, key)
        if key in found:
            raise ConfigError(f"{_at(name, key_node)}: {key} is given twice; first in line {lines[here]}")
        lines[here] = key_node.start_mark.line + 1
        found[key] = _value(value_node, name, here, lines)
    return found


def _refuse_tag(node: yaml.Node, plain: str, name: str) -> None:
    if node.tag != plain:
        raise ConfigError(f"{_at(name, node)}: the tag {node.tag} is refused; a config holds plain values only")


def _scalar(node: yaml.ScalarNode, name: str) -> Any:
    text, kind = node.value, node.tag.rpartition(":")[2]
    if text == "" and kind == "null":
        raise ConfigError(f"{_at(name, node)}: a value is missing here; write null if there is to be none, or leave the key out")
    if node.tag == _STRING:
        return text
    if node.tag not in _SCALARS or not _SCALARS[node.tag][0].fullmatch(text):
        raise ConfigError(f"{_at(name, node)}: the tag {node.tag} is refused here; a config holds plain values only")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    plain = text.replace("_", "").lower()
    if kind == "int" and len(plain) > MAX_DIGITS:
        raise ConfigError(f"{_at(name, node)}: a number of {len(plain)} digits")
    if kind == "int":
        return int(plain)
    return float(plain.replace(".inf", "inf").replace(".nan", "nan"))


def write(values: dict[str, Any]) -> str:
    """YAML text that `read` turns back into equal values."""
    return yaml.dump(escaped(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
