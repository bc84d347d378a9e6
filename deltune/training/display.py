"""How numbers and users' text are written for people: one rule for console, report and model card. Pure functions."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

PREFIXES = ("", "k", "M", "G", "T", "P", "E")
FRACTIONS = ("exact_match", "token_accuracy", "accuracy")  # metrics in 0..1 that people read as percent


def si(value: float, unit: str = "") -> str:
    """Three digits and a thousands prefix: 12345 -> 12.3k, 950 -> 950, with a unit 2.7e12 -> 2.7 TFLOP."""
    if not math.isfinite(value):
        return f"{value} {unit}".rstrip()
    size, place = abs(value), 0
    # 999.5 would be written as 1000 of the smaller unit
    while size >= 999.5 and place < len(PREFIXES) - 1:
        size, value, place = size / 1000, value / 1000, place + 1
    return f"{value:.3g}{' ' if unit else ''}{PREFIXES[place]}{unit}"


def count(value: int) -> str:
    """A count in full up to a million, then with a prefix: 43,520 and 2.71M."""
    return f"{value:,}" if abs(value) < 1_000_000 else si(value)


def memory(num_bytes: float) -> str:
    """Decimal units: 1.2 GB, 812 MB."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.1f} GB"
    return f"{num_bytes / 1e6:.0f} MB"


def clock(seconds: float) -> str:
    """0:42, 12:05, 3:07:09, 2d 03:07."""
    total = round(max(0.0, seconds))
    minutes, second = divmod(total, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def duration(seconds: float) -> str:
    """4.2 s, 42 s, 12 min 5 s, 3 h 7 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours} h {minute} min" if hours else f"{minute} min {second} s"


def metric_name(name: str) -> str:
    return name.replace("_", " ")


def metric(name: str, value: float) -> str:
    """A metric's value: known fractions in percent, others with four digits."""
    if name.split("/")[-1] in FRACTIONS or name.endswith("_accuracy"):
        return f"{100 * value:.1f} %"
    return number(value)


def number(value: float) -> str:
    """Four digits that matter: 1.235, 0.0001200 as 0.00012, 123456 as 1.235e+05."""
    return f"{value:.4g}"


def plain(text: object) -> str:
    """Text that can do no harm on a terminal or a page: control characters become their visible signs.

    Newline and tab stay; escape (0x1b) becomes U+241B, lone surrogates and unassigned controls U+FFFD.
    """
    return "".join(_visible(c) for c in str(text).replace("\r\n", "\n"))


def one_line(text: object) -> str:
    """The same on one line, for tables and terminals."""
    return " ".join(plain(text).split())


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or (code >= 0x20 and unicodedata.category(character) not in ("Cc", "Cs")):
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "�"


def value(thing: Any) -> str:
    """Any plain value on one line: 84,210, yes, 0.002, a, b."""
    if isinstance(thing, bool):
        return "yes" if thing else "no"
    if isinstance(thing, int):
        return f"{thing:,}"
    if isinstance(thing, float):
        return number(thing)
    if isinstance(thing, list):
        return ", ".join(value(entry) for entry in thing)
    return one_line(thing)


def flat_facts(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested facts as (names in words, value); empty ones are left out."""
    found: list[tuple[str, Any]] = []
    for key, entry in facts.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(entry, dict):
            found += flat_facts(entry, f"{name} · ")
        elif entry not in (None, "", []):
            found.append((name, entry))
    return found


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as text lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]


def before_after(before: dict[str, float], after: dict[str, float]) -> list[list[str]]:
    """The closing table as rows of text, header first; a side that knows no metric is left out. [] without metrics."""
    sides = [("before", before), ("after", after)]
    sides = [(title, metrics) for title, metrics in sides if metrics]
    names = list(dict.fromkeys(name for _, metrics in sides for name in metrics))
    if not names:
        return []
    header = ["metric", *(title for title, _ in sides)]
    return [header] + [
        [metric_name(name), *(metric(name, metrics[name]) if name in metrics else "–" for _, metrics in sides)] for name in names
    ]
