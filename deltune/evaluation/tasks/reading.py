"""What readers of tasks share: rows with their place, and one form of error that names file:line, what was found and
what would fit."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltune.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_SPACE = re.compile(r"[ \t\r\n]*")


def bad(where: str, found: str, fits: str) -> DataError:
    return DataError(f"{where}: {found}. What fits: {fits}.")


def text_of(path: Path) -> str:
    """A file's text in UTF-8, with or without a byte order mark. DataError for what cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise bad(str(path), f"byte {error.start} is not UTF-8", "a text file in UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None


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
        except (ValueError, RecursionError) as error:
            raise bad(where, f"not JSON ({_fault(error)})", "one JSON object a line") from None
        if not isinstance(row, dict):
            raise bad(where, f"a {type(row).__name__}", "one JSON object a line")
        yield number, where, row


def _fault(error: ValueError | RecursionError) -> str:
    """Text that is no JSON, a number with thousands of digits, or thousands of brackets."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deep" if isinstance(error, RecursionError) else "a number with too many digits"


def is_text(value: Any) -> bool:
    """Whether a value is a string that can be written in UTF-8: JSON can name halves of characters (\\ud800)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def value_of(row: dict[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise bad(where, f"no key {key!r} among {', '.join(map(repr, row)) or 'none'}", f"a row with {key!r}")
    return row[key]


def string_of(row: dict[str, Any], key: str, where: str) -> str:
    value = value_of(row, key, where)
    if not is_text(value):
        raise bad(where, f"{key}={value!r:.200}", f"text in {key!r}")
    return value


def json_list(path: Path) -> Iterator[tuple[int, str, Any]]:
    """(number from 1, "file:line", element) of a file that is one JSON list; the line is where the element begins."""
    text, decoder = text_of(path), json.JSONDecoder()

    def place(at: int) -> str:
        return f"{path}:{text.count(chr(10), 0, at) + 1}"

    def skipped(at: int) -> int:
        return _SPACE.match(text, at).end()

    at = skipped(0)
    if text[at : at + 1] != "[":
        raise bad(place(at), f"begins with {text[at : at + 20]!r}", "one JSON list")
    at, number, line, counted = skipped(at + 1), 0, 1, 0
    while text[at : at + 1] != "]":
        number, line, counted = number + 1, line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            raise bad(f"{path}:{line}", f"not JSON ({_fault(error)})", "one JSON list") from None
        yield number, where, value
        at = skipped(at)
        if text[at : at + 1] == ",":
            at = skipped(at + 1)
        elif text[at : at + 1] != "]":
            raise bad(place(at), "the list does not go on with ',' or end with ']'", "one JSON list")


def csv_rows(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """(number from 1, "file:line", fields) of each row of a CSV file; the line is where the row begins."""
    reader, begins = csv.reader(io.StringIO(text_of(path), newline=""), strict=True), 1
    number = 0
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise bad(f"{path}:{begins}", f"not CSV ({error})", "fields separated by commas, quoted with \"") from None
        if row is None:
            return
        where, begins = f"{path}:{begins}", reader.line_num + 1
        if row:
            number += 1
            yield number, where, row


def strings_of(row: dict[str, Any], key: str, where: str) -> list[str]:
    """A list of at least two texts."""
    value = value_of(row, key, where)
    if not isinstance(value, list) or len(value) < 2 or not all(is_text(text) for text in value):
        raise bad(where, f"{key}={value!r:.200}", f"a list of texts in {key!r}")
    return value


def place_of(row: dict[str, Any], key: str, count: int, where: str) -> int:
    """The place of the right choice, given as a number from 0."""
    value = value_of(row, key, where)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise bad(where, f"{key}={value!r:.200}", f"a whole number from 0 to {count - 1}")
    return value


def letter_place(letter: Any, count: int, where: str) -> int:
    """The place of the right choice, given as its letter in either case."""
    found = LETTERS.find(letter.strip().upper()) if isinstance(letter, str) and len(letter.strip()) == 1 else -1
    if not 0 <= found < count:
        raise bad(where, f"the answer is {letter!r:.200}", f"a letter from A to {LETTERS[count - 1]}")
    return found


def unlabelled(choices: list[str]) -> tuple[str, ...]:
    """Choices without the letters that some files put before them ("A.…"), so that none is shown twice.

    They are taken off where at least half of an item's choices begin with their own letter and a mark; then also from
    a choice that lost its mark ("C只要"). A letter alone stays: "A国", "B国" are names.
    """
    marked = [re.match(rf"\s*{letter}\s*[.．、,，:：)）]\s*", text) for letter, text in zip(LETTERS, choices, strict=False)]
    if 2 * sum(map(bool, marked)) < len(choices):
        return tuple(text.strip() for text in choices)
    bare = [re.match(rf"\s*{letter}(?![A-Za-z\s])", text) for letter, text in zip(LETTERS, choices, strict=False)]
    found = [one or other for one, other in zip(marked, bare, strict=True)]
    return tuple((text[match.end() :] if match else text).strip() for match, text in zip(found, choices, strict=True))


def chosen(path: Path, names: tuple[str, ...]) -> Path:
    """The file itself, or of a folder the first of the released names that it holds."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder.")
    for name in names:
        if (path / name).is_file():
            return path / name
    present = ", ".join(sorted(one.name for one in path.iterdir())[:8]) or "nothing"
    raise DataError(f"{path}: none of the released files is in it. What fits: {', '.join(names)}, or a file by its name; it holds {present}.")
