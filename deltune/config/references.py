r"""References of one key to another: `${train.micro_batch}` stands for that key's value, and nothing else can be said so.

There are no resolvers: a config cannot read the environment, call anything or compute. `\${` is the text itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from deltune.config.check import shown
from deltune.errors import ConfigError

_REFERENCE = re.compile(r"(\\*)\$\{([^{}$\\]*)(\}?)")
_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def escaped(value: Any) -> Any:
    r"""A value in which all text is meant as it stands: `${` becomes `\${`, and backslashes before it are doubled."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def follow(value: Any, look_up: Callable[[str], Any], trail: tuple[str, ...] = ()) -> Any:
    """A value with its references replaced. One that is a whole text keeps its type; inside a text it is written out.

    `look_up(key)` gives a key's value, with references of its own, or raises ConfigError. Raises ConfigError for
    anything but a plain key in the braces, and for keys that refer to each other in a ring.
    """
    if isinstance(value, dict):
        return {key: follow(item, look_up, trail) for key, item in value.items()}
    if isinstance(value, list):
        return [follow(item, look_up, trail) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def one(match: re.Match[str]) -> Any:
        key = match[2].strip()
        if not match[3] or not _KEY.fullmatch(key):
            raise ConfigError(f"only ${{section.key}} can be referred to, not {shown(match[0])}; for the text itself write \\${{")
        if key in trail:
            raise ConfigError(f"refers to itself: {' -> '.join([*trail, key])}")
        return follow(look_up(key), look_up, (*trail, key))

    def written(match: re.Match[str]) -> str:
        backslashes = match[1][: len(match[1]) // 2]
        if len(match[1]) % 2:
            return f"{backslashes}${{{match[2]}{match[3]}"
        found = one(match)
        return backslashes + (found if isinstance(found, str) else shown(found))

    whole = _REFERENCE.fullmatch(value)
    return one(whole) if whole and not whole[1] else _REFERENCE.sub(written, value)
