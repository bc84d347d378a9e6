"""Words, a file and the YAML groups of `conf/` become one mapping of stated values, each with the place it came from.

Layers lie one over another: preset, then the user's file, then the words. In each layer a group option
(`schedule=linear`) is the keys that its file states, put together by Hydra's compose API, and single keys lie over
them. A later layer replaces a key's value whole. Only what somebody stated is in the result; defaults are the
dataclasses' own.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from deltune.config import references, yaml_file
from deltune.config.check import joined, shown
from deltune.config.fields import Choice, Key, default_of, members, walk
from deltune.config.suggest import closest, nearest
from deltune.config.words import read_word
from deltune.errors import ConfigError
from deltune.log import logger

CONF = Path(__file__).resolve().parent.parent / "conf"
COMMAND_LINE = "command line"
PYTHON = "Python"
PRESET = ("preset",)

KeyPath = tuple[str, ...]


class Stated(NamedTuple):
    """A value, and the place where somebody stated it."""

    value: Any
    origin: str


Layer = dict[KeyPath, Stated]


def options(group: str) -> list[str]:
    """Names of a group's YAML files, any of which `group=name` chooses."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def compose(
    root: type, words: Sequence[str] = (), *, file: Path | None = None, mapping: Mapping[str, Any] | None = None,
    presets: bool = False,
) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """What words state for a dataclass, over a YAML file or a mapping from Python, over a preset.

    Returns nested plain values for `check.build`, and the origin of each by its path of keys. `presets` allows
    `preset=NAME`. Keys and values are judged by `check.build`; ConfigError is raised here for what has no single
    meaning: a file or word that cannot be read, a key given twice, an option or a reference that does not exist.
    """
    composer = _Composer(root, presets)
    layers = []
    if mapping is not None:
        layers.append(composer.layer([(path_of(key), Stated(references.escaped(value), PYTHON)) for key, value in mapping.items()]))
    if file is not None:
        layers.append(composer.file_layer(file))
    layers.append(composer.word_layer(words))
    return composer.finish(layers)


def hydra_compose(overrides: list[str]) -> dict[str, Any]:
    """What Hydra makes of group options in `conf/`, as plain values. Touches nothing outside: no argv, folder, logging."""
    from hydra import compose as compose_groups
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF), job_name="deltune", version_base="1.3"):
        return OmegaConf.to_container(compose_groups(overrides=overrides))


class _Composer:
    """Knows the root dataclass, and gathers problems until all of them can be told."""

    def __init__(self, root: type, presets: bool):
        self.root, self.presets = root, presets
        self.fields = {field.name: field for field in dataclasses.fields(root)}
        self.problems: list[str] = []

    def problem(self, path: KeyPath, stated: Stated, text: str) -> None:
        self.problems.append(f"{'.'.join(path)}={shown(stated.value)} ({stated.origin}): {text}")

    # -- what the root has ----------------------------------------------------------------------------------------

    @cached_property
    def keys(self) -> dict[KeyPath, list[Key]]:
        """Every key by its path; several where options of a section share it."""
        found: dict[KeyPath, list[Key]] = {}
        for key in walk(self.root):
            found.setdefault(key.path, []).append(key)
        return found

    def is_section(self, name: str) -> bool:
        return name in self.fields and ("section" in self.fields[name].metadata or "table" in self.fields[name].metadata)

    def table(self, name: str) -> Choice | None:
        return self.fields[name].metadata.get("table")

    def full(self, path: KeyPath) -> KeyPath:
        """A path as the root has it. A short key (`lr`) is completed where only one section has it; the rest of a path
        that leads into a mapping is one name (`optim.lr_scales.layers.0.*`)."""
        if path == PRESET or (len(path) == 1 and path[0] in self.fields):
            return path
        if path[0] not in self.fields:
            found = [full for full in self.keys if full[-1] == path[0]]
            if len(found) != 1:
                return path
            path = (*found[0], *path[1:])
        for end in range(1, len(path)):
            if self.is_mapping(path[:end]):
                return (*path[:end], ".".join(path[end:]))
        return path

    def is_mapping(self, path: KeyPath) -> bool:
        return path in self.keys and any(typing.get_origin(kind) is dict for kind in members(self.keys[path][0].hint))

    def hint(self, path: KeyPath) -> Any:
        """The type of a key's value, for reading a word; None where the key is unknown."""
        path = self.full(path)
        if path == PRESET:
            return str
        if len(path) == 1 and self.is_section(path[0]):
            return list[str]  # plain text, or what stands in brackets
        if path in self.keys:
            return self.keys[path][0].hint
        return str if self.is_method(path) else None

    # -- one layer ------------------------------------------------------------------------------------------------

    def file_layer(self, file: Path) -> Layer:
        content, lines = yaml_file.read(file)
        entries = []
        for key, value in content.items():
            if self.is_section(key) and isinstance(value, Mapping):
                entries += [((key, inner), Stated(item, f"{file}:{lines[key, inner]}")) for inner, item in value.items()]
            else:
                entries.append((path_of(key), Stated(value, f"{file}:{lines[key,]}")))
        return self.layer(entries)

    def word_layer(self, words: Sequence[str]) -> Layer:
        entries = []
        for text in words:
            try:
                word = read_word(text, self.hint)
            except ConfigError as error:
                self.problems.append(str(error))
            else:
                entries.append((word.path, Stated(word.value, COMMAND_LINE)))
        return self.layer(entries)

    def layer(self, entries: Sequence[tuple[KeyPath, Stated]]) -> Layer:
        """Entries by full paths, down to single keys, over what the chosen group options state."""
        given: Layer = {}
        groups: dict[str, Stated] = {}
        for path, stated in entries:
            for key, item in self.spread(self.full(path), stated):
                if key in given or (len(key) == 1 and key[0] in groups):
                    first = given.get(key) or groups[key[0]]
                    self.problem(key, item, f"is given twice; first as {shown(first.value)} ({first.origin})")
                elif len(key) == 1 and self.is_section(key[0]) and item.value is not None:
                    groups[key[0]] = item
                else:
                    given[key] = item
        grouped = self.grouped(groups)
        for key in grouped.keys() & given.keys():
            table = self.table(key[0])
            if table is not None and not table.named and key[1] == table.key and grouped[key].value != given[key].value:
                self.problem(key, given[key], f"is given twice; first as {shown(grouped[key].value)} ({grouped[key].origin})")
        return grouped | given

    def spread(self, path: KeyPath, stated: Stated) -> Iterator[tuple[KeyPath, Stated]]:
        """A value for a whole section as its keys, its primary key, or itself where it is null or a group option."""
        value = stated.value
        if self.is_method(path):  # `adapter.method=pissa` says the same as `adapter=pissa`
            path = path[:1]
        inner = self.primary_within(path)
        if inner is not None and not isinstance(value, Mapping) and not dataclasses.is_dataclass(value):
            path = (*path, inner)
        if len(path) > 1 or not self.is_section(path[0]):
            if path == PRESET:
                self.judge_preset(stated)
            yield path, stated
            return
        table = self.table(path[0])
        primary = table.key if table is not None else self.fields[path[0]].metadata["primary"]
        if dataclasses.is_dataclass(value):
            value = references.escaped(dataclasses.asdict(value))
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from self.spread((*path, str(key)), Stated(item, stated.origin))
        elif (isinstance(value, str) and value in self.names(path[0])) or (value is None and table is not None and table.optional):
            yield path, stated
        elif table is not None and table.named and isinstance(value, str):
            names = self.names(path[0])
            self.problem(path, stated, f"there are {', '.join(names)}{closest(value, names)}")
        elif primary is not None:
            yield (*path, primary), stated
        else:
            names = self.names(path[0])
            known = f"there are {', '.join(names)}{closest(value, names).rstrip('?')}; " if names else ""
            example = next(key.dotted for key in walk(self.root, load=False) if key.path[0] == path[0])
            self.problem(path, stated, f"is no option; {known}or give single keys, e.g. {example}=..")

    def is_method(self, path: KeyPath) -> bool:
        table = self.table(path[0]) if path[0] in self.fields else None
        return len(path) == 2 and path[1] == "method" and table is not None and table.named is not None

    def primary_within(self, path: KeyPath) -> str | None:
        """The key that a plain value means, where the path is a section within a section (`adapter.schedule=relora`)."""
        table = self.table(path[0]) if path[0] in self.fields else None
        if len(path) != 2 or table is None or table.base is None:
            return None
        field = next((field for field in dataclasses.fields(table.base) if field.name == path[1]), None)
        return field.metadata.get("primary") if field is not None else None

    def names(self, group: str) -> list[str]:
        """What `group=name` can choose: the group's files, and the table's named sets of choices."""
        table = self.table(group)
        return sorted({*options(group), *((table.named or {}) if table is not None else {})})

    def judge_preset(self, stated: Stated) -> None:
        names = options("preset")
        if not self.presets:
            self.problem(PRESET, stated, "presets are for training runs only")
        elif stated.value not in names:
            self.problem(PRESET, stated, f"there are {', '.join(names)}{closest(stated.value, names)}")

    def grouped(self, groups: Mapping[str, Stated]) -> Layer:
        """The keys that the chosen options' files state."""
        found: Layer = {}
        files: dict[str, Stated] = {}
        for group, stated in groups.items():
            table = self.table(group)
            if table is None or stated.value not in (table.named or {}):
                files[group] = stated
                continue
            for key, value in table.named[stated.value].items():
                found[path_of(key)] = Stated(value, f"{group}={stated.value}, {stated.origin}")
        content = hydra_compose([f"+{group}={stated.value}" for group, stated in files.items()]) if files else {}
        return found | {
            (group, key): Stated(value, f"{group}={files[group].value}, {files[group].origin}")
            for group, section in content.items() for key, value in section.items()
        }

    # -- layers over each other -----------------------------------------------------------------------------------

    def finish(self, layers: list[Layer]) -> tuple[dict[str, Any], dict[KeyPath, str]]:
        self.stop_at_problems()
        chosen = [layer.pop(PRESET) for layer in layers if PRESET in layer]
        if chosen:
            name, origin = chosen[-1]
            content = hydra_compose([f"+preset={name}"])
            layers.insert(0, self.layer([(path_of(key), Stated(value, f"preset={name}, {origin}")) for key, value in content.items()]))
        state: Layer = {}
        for layer in layers:
            self.lay(state, layer)
        nested = self.nested(state)
        self.stop_at_problems()
        return nested, {path: stated.origin for path, stated in state.items()}

    def stop_at_problems(self) -> None:
        if self.problems:
            raise ConfigError(joined(self.problems))

    def lay(self, state: Layer, layer: Layer) -> None:
        """Put a layer over what lies below."""
        for name in self.fields:
            table = self.table(name)
            if table is not None:
                self.choose(name, table, state, layer)
        for path in sorted(layer, key=len):  # a whole mapping before single entries of it
            value, origin = layer[path]
            if len(path) > 1 and self.is_mapping(path[:-1]):
                below = state.get(path[:-1], Stated({}, ""))
                if isinstance(below.value, Mapping):
                    path, value = path[:-1], {**below.value, path[-1]: value}
            state[path] = Stated(value, origin)

    def choose(self, name: str, table: Choice, state: Layer, layer: Layer) -> None:
        """Where a layer chooses another option, keys below it that the option does not have fall away, with a warning.
        Where it switches the section off, all of them do."""
        key = (name, table.key)
        by_name = f"{name}="
        if table.named and any(stated.origin.startswith(by_name) for stated in layer.values()):
            for path in [path for path in state if state[path].origin.startswith(by_name)]:
                del state[path]  # another named set of choices takes the place of the lower one, whole
        if (name,) in layer:
            for path in [path for path in state if path[0] == name]:
                del state[path]
        elif key in layer:
            state.pop((name,), None)
            option, origin = layer[key]
            old = state[key].value if key in state and isinstance(state[key].value, str) else table.default
            if option == old or not (isinstance(option, str) and option in table.options and old in table.options):
                return
            fits = {field.name for field in dataclasses.fields(table.resolve(option))}
            had = {field.name for field in dataclasses.fields(table.resolve(old))}
            for path in [path for path in state if path[0] == name and path[1] in had - fits]:
                value, where = state.pop(path)
                logger.warning("%s=%s (%s) is left out: %s=%s (%s) has no such key", ".".join(path), shown(value), where, name, option, origin)

    def nested(self, state: Layer) -> dict[str, Any]:
        """Flat values as nested ones, references followed."""
        result: dict[str, Any] = {}
        for path in sorted(state, key=len):
            stated = state[path]
            if len(path) > 1 and path[:1] in state and self.is_section(path[0]):
                off = state[path[:1]].origin
                self.problem(path, stated, f"has no effect, since {path[0]} is null ({off}); choose {path[0]}=.. as well")
                continue
            inner: Any = result
            for key in path[:-1]:
                inner = inner.setdefault(key, {}) if isinstance(inner, dict) else None
            if not isinstance(inner, dict):
                self.problem(path, stated, f"{'.'.join(path[:-1])} has no keys of its own")
                continue
            try:
                inner[path[-1]] = references.follow(stated.value, lambda name: self.look_up(name, state))
            except ConfigError as error:
                self.problem(path, stated, str(error))
        return result

    def look_up(self, name: str, state: Layer) -> Any:
        """The value that a reference names: what is stated for the key, or its default. ConfigError if there is none."""
        path = self.full(path_of(name))
        if path in state:
            return state[path].value
        if path not in self.keys:
            raise ConfigError(f"refers to {name}, which does not exist; nearest: {', '.join(nearest(name, ('.'.join(p) for p in self.keys)))}")
        table = self.table(path[0])
        found = self.keys[path]
        if table is not None:
            chosen = state[path[0], table.key].value if (path[0], table.key) in state else table.default
            found = [key for key in found if key.option == chosen and (path[0],) not in state]
        default = default_of(found[0].field) if found else dataclasses.MISSING
        if default is dataclasses.MISSING:
            raise ConfigError(f"refers to {name}, which has no value")
        return references.escaped(default)


def path_of(key: Any) -> KeyPath:
    """The path that a dotted key of a mapping means."""
    return tuple(str(key).split("."))
