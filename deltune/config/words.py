"""Words of the command line: `key=value` in Hydra's override grammar, read with the type that the key wants in mind.

A key that takes text takes the word's text as it stands, so that prompts, paths, urls and patterns need no quoting
beyond the shell's; quotes that do stand around a value are taken off. Everything else is Hydra's grammar. Where that
cannot read a value it stays text, and the check says what the key wants.
"""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deltune.config.fields import members
from deltune.errors import ConfigError

MAX_DEPTH = 20


@dataclass(frozen=True)
class Word:
    path: tuple[str, ...]
    value: Any


def read_word(text: str, hint: Callable[[tuple[str, ...]], Any]) -> Word:
    """One word as a path of keys and a plain value. `hint(path)` gives the key's type, or None for an unknown key."""
    key, value = split(text)
    path = tuple(key.split("."))
    return Word(path, read_value(key, value, hint(path)))


def split(text: str) -> tuple[str, str]:
    """Key and value of a word; ConfigError for what is no `key=value`."""
    key, equals, value = text.partition("=")
    plain = key.lstrip("-+~").strip()
    if text.startswith("-"):
        example = f"{plain.replace('-', '_')}={value if equals else 'VALUE'}"
        raise ConfigError(f"{text}: settings are written without dashes: {example}")
    if not equals:
        raise ConfigError(f"{text}: is neither key=value nor a YAML file")
    if key != plain:
        raise ConfigError(f"{text}: settings are written as key=value, without {key[0]} or spaces around the key")
    if not plain or any(not part for part in plain.split(".")):
        raise ConfigError(f"{text}: has no key before the =")
    return key, value


def read_value(key: str, text: str, hint: Any) -> Any:
    """A value as the key's type wants it, plain."""
    kinds = members(hint)
    if text.lower() == "null":
        return None
    quoted, bracketed, lists = text[:1] in ("'", '"'), text[:1] in ("[", "{"), _takes_list(kinds)
    if not quoted and str in kinds and not lists:
        return text
    if not quoted and not bracketed and lists and "," not in text:
        return text
    parsed = _parse(text)
    if isinstance(parsed, ConfigError):
        if bracketed and str not in kinds:
            raise ConfigError(f"{key}={text} (command line): {parsed}")
        return text
    if parsed.is_sweep_override():
        if str in kinds and not lists:
            return text
        raise ConfigError(f"{key}={text} (command line): several values are a sweep, which needs -m; a list is written [a,b], and text with commas in quotes")
    value = _plain(parsed.value())
    return value if str not in kinds or isinstance(value, (str, list, dict)) else text


def _takes_list(kinds: tuple[Any, ...]) -> bool:
    return any(typing.get_origin(kind) is list and str in members(typing.get_args(kind)[0]) for kind in kinds)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _parse(text: str) -> Any:
    """Hydra's reading of a value (an Override), or a ConfigError, returned, that says where it fails."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    depth = 0
    for character in text:
        depth += (character in "[{(") - (character in ")}]")
        if depth > MAX_DEPTH:
            return ConfigError(f"is nested more than {MAX_DEPTH} deep")
    try:
        return OverridesParser.create().parse_override(f"value={text}")
    except HydraException as error:
        return ConfigError(f"cannot be read: {str(error).splitlines()[0]}; text with signs or letters beyond ASCII needs quotes")
    except ValueError as error:  # a number with thousands of digits
        return ConfigError(f"cannot be read: {error}")


def expand_sweep(words: Sequence[str], options: Callable[[str], list[str]] = lambda group: []) -> list[list[str]]:
    """Every combination of the values that words with several of them have; the last such word varies fastest.

    Several values are Hydra's: `lr=1e-4,2e-4`, `seed=range(1,4)`, `schedule=choice(linear,cosine)`, `schedule=glob(*)`
    (names of `options(group)`).
    """
    return [list(combination) for combination in itertools.product(*(_alternatives(word, options) for word in words))]


def _alternatives(word: str, options: Callable[[str], list[str]]) -> list[str]:
    from hydra.core.override_parser.types import Glob

    key, value = split(word)
    parsed = _parse(value)
    if isinstance(parsed, ConfigError) and "," in value:
        raise ConfigError(f"{word} (command line): with -m commas separate values, and these {parsed}")
    if isinstance(parsed, ConfigError) or not parsed.is_sweep_override():
        return [word]
    if not parsed.is_discrete_sweep():
        raise ConfigError(f"{word} (command line): an interval has no end of values; list them, or use range(start,stop,step)")
    values = parsed.value()
    if isinstance(values, Glob):
        found = values.filter(options(key))
        if not found:
            raise ConfigError(f"{word} (command line): matches none of {', '.join(options(key)) or 'no options at all'}")
        return [f"{key}={name}" for name in found]
    return [f"{key}={_written(item)}" for item in parsed.sweep_iterator()]


def _written(item: Any) -> str:
    """One value of a sweep as the text of a word."""
    from hydra.core.override_parser.types import Quote, QuotedString, Transformer

    if isinstance(item, QuotedString):
        return item.with_quotes()
    if isinstance(item, str):
        return QuotedString(item, Quote.single).with_quotes() if set(item) & set(" \t,()[]{}=:\\'\"") else item
    return Transformer.str(item)
