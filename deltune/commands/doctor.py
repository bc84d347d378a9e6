"""deltune doctor [quick=true] [json=true]

What is installed, and which devices, types, attention and engines work here, each tried and not guessed. What is broken
comes with its remedy. quick=true leaves out what takes seconds: two processes that talk, and the hub. json=true prints
the same for programs. The exit code is 1 if something that every run needs is broken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from deltune.errors import ConfigError

if TYPE_CHECKING:
    from deltune.commands.checks import Check

WORDS = {"quick": "leave out what takes seconds", "json": "print JSON"}
BROKEN_EXIT_CODE = 1


def main(words: list[str], file: Path | None = None) -> int:
    """The verb."""
    from deltune.commands.checks import sections

    asked = read_words(words)
    found = sections(quick=asked["quick"])
    broken = [check for checks in found.values() for check in checks if check.state == "broken"]
    if asked["json"]:
        plain = {title: [asdict(check) for check in checks] for title, checks in found.items()}
        print(json.dumps({"ok": not broken, "sections": plain}, indent=2, ensure_ascii=False))
    else:
        print("\n".join(page(found)))
    return BROKEN_EXIT_CODE if broken else 0


def read_words(words: list[str]) -> dict[str, bool]:
    """What was asked for. ConfigError for any other word."""
    asked = dict.fromkeys(WORDS, False)
    for word in words:
        key, _, value = word.partition("=")
        if key not in WORDS or value not in ("true", "false"):
            from deltune.config.suggest import closest

            known = ", ".join(f"{name}=true ({meaning})" for name, meaning in WORDS.items())
            raise ConfigError(f"doctor {word}: there are {known}{closest(key, list(WORDS))}")
        asked[key] = value == "true"
    return asked


def page(found: dict[str, list[Check]]) -> Iterator[str]:
    """Sections of aligned lines; remedies under what needs them."""
    width = max(len(check.name) for checks in found.values() for check in checks)
    for title, checks in found.items():
        yield title
        for check in checks:
            yield f"  {check.state:<7} {check.name:<{width}}  {check.found}".rstrip()
            if check.remedy:
                yield f"  {'':<7} {'':<{width}}  {check.remedy}"
        yield ""
    broken = [check.name for checks in found.values() for check in checks if check.state == "broken"]
    yield f"Broken: {', '.join(broken)}." if broken else "Everything that a run needs works here."
