"""What readers of tasks share: rows with their place, and one form of error that names file:line, what was found and
what would fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltune.errors import DataError


def bad(where: str, found: str, fits: str) -> DataError:
    return DataError(f"{where}: {found}. What fits: {fits}.")


def text_of(path: Path) -> str:
    """A file's text in UTF-8, with or without a byte order mark. DataError for what cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad(str(path), f"byte {error.start} is not UTF-8", "a text file in UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}.") from None


def json_rows(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number from 1, "file:line", object) of each line of a JSON lines file; empty lines are passed over, not counted."""
    number = 0
    for line, text in enumerate(text_of(path).split("\n"), 1):
        if not text.strip():
            continue
        number += 1
        where = f"{path}:{line}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise bad(where, f"not JSON ({error.msg} at column {error.colno})", "one JSON object a line") from None
        if not isinstance(row, dict):
            raise bad(where, f"a {type(row).__name__}", "one JSON object a line")
        yield number, where, row


def value_of(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise bad(where, f"no key {key!r} among {', '.join(map(repr, row)) or 'none'}", f"a row with {key!r}")
    return row[key]


def string_of(row: dict[str, Any], key: str, where: str) -> str:
    value = value_of(row, key, where)
    if not isinstance(value, str):
        raise bad(where, f"{key}={value!r}", f"a string in {key!r}")
    return value
