"""From generated text to an answer. Only what the model wrote is looked at, never the prompt; where no answer is found
the result is None, which counts as wrong, and never an error or a guess.

A label is a letter (or word) that stands by itself: no letter, digit or apostrophe touches it, it is not part of an
abbreviation (U.S.A.), a hyphened word (D-Day) or a contraction. `A` and `I` are also English words: before a space and a further
word they are read as such ("A dog barked"), unless that word is one that no article precedes ("A is right", "A because").
Case counts for letters and not for words like yes.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltune.evaluation.tasks.item import Item
    from deltune.evaluation.tasks.templates import Template

# full-width forms of ASCII (Ａ, （, ：) as ASCII; superscripts and the like stay, since 5² is not 52
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0x2212: "-", 0x2019: "'"}
_AFTER_A_LABEL = "is|was|are|were|would|must|can|cannot|seems|follows|because|since|as|and|or|but|not|best|correct"
_NUMBER = re.compile(
    r"(?P<sign>(?<![A-Za-z0-9_.)\]])-)?\$?(?<![A-Za-z0-9_.])(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<part>\.\d+)?(?:/(?P<below>0*[1-9]\d*))?"
)


def extract(text: str, item: Item, template: Template) -> int | str | None:
    """The answer in generated text: the place of a choice; of an open question a number in its plain form; or None.

    Looked at is what follows the template's trigger up to where that occurs again, and of that, what the cleaner's group
    matches; all of the text where the template has neither. The first candidate counts, or with `reverse` the last.
    """
    text = text.translate(_NARROW)
    if template.trigger:
        pieces = re.split(re.escape(template.trigger.translate(_NARROW)), text, maxsplit=2, flags=re.IGNORECASE)
        if len(pieces) == 1:
            return None
        text = pieces[1]
    texts = [match[1] or "" for match in re.finditer(template.cleaner, text)] if template.cleaner else [text]
    candidates = [found for one in texts for found in (choices_in(one, item, template) if item.choices else numbers_in(one))]
    return candidates[-1 if template.reverse else 0] if candidates else None


def choices_in(text: str, item: Item, template: Template) -> list[int]:
    """Places of the labels in a text; of one choice if the text is that choice word by word, since choices may speak of
    letters ("both A and B"); where there is no label, of the one choice that the text names in full."""
    labels = tuple(label.translate(_NARROW) for label in template.labels[: len(item.choices)])
    words = _spaced(text)
    same = [place for place, choice in enumerate(item.choices) if words and _spaced(choice) == words]
    if len(same) == 1 and words not in map(_spaced, labels):
        return same
    found = [labels.index(_folded(match.group(), labels)) for match in _labels(labels).finditer(text)]
    return found or _named(text, item)


def numbers_in(text: str) -> list[str]:
    """Numbers of a text in their plain form."""
    return [plain_number(match) for match in _NUMBER.finditer(text)]


def number(text: str) -> str | None:
    """The plain form of a text that is one number and nothing else, else None: "$1,234.50" is "1234.5", "4/2" is "2"."""
    match = _NUMBER.fullmatch(text.translate(_NARROW).strip().removesuffix("."))
    return plain_number(match) if match else None


def plain_number(match: re.Match) -> str:
    """Exact, so that equal numbers have equal texts: a whole number, a decimal that ends, or a fraction in lowest terms."""
    value = Fraction(match["whole"].replace(",", "") + (match["part"] or "")) / Fraction(match["below"] or 1)
    value = -value if match["sign"] else value
    below, digits = value.denominator, 0
    while below % 10 == 0 or below % 5 == 0 or below % 2 == 0:
        below, digits = below // (10 if below % 10 == 0 else 5 if below % 5 == 0 else 2), digits + 1
    if below != 1:
        return f"{value.numerator}/{value.denominator}"
    if digits == 0:
        return str(value.numerator)
    whole, part = divmod(abs(value.numerator) * 10**digits // value.denominator, 10**digits)
    return f"{'-' if value < 0 else ''}{whole}.{part:0{digits}}".rstrip("0")


@cache
def _labels(labels: tuple[str, ...]) -> re.Pattern:
    """One pattern for all labels that stand by themselves."""
    patterns = []
    for label in sorted(labels, key=len, reverse=True):
        letters, pattern = label.isascii(), re.escape(label)
        if letters and label.isalpha():
            if len(label) > 1:
                pattern = f"(?i:{pattern})"
            elif label in "AIa":
                pattern += rf"(?![ \t]+(?!(?i:{_AFTER_A_LABEL})\b)[A-Za-z])"
        if letters:
            pattern = rf"(?<![A-Za-z0-9_'])(?<![A-Za-z]-)(?<![^A-Za-z][A-Za-z]\.)(?<!^[A-Za-z]\.){pattern}(?![A-Za-z0-9_']|-[A-Za-z]|\.[A-Za-z](?![A-Za-z]))"
        patterns.append(pattern)
    return re.compile("|".join(patterns))


def _folded(found: str, labels: tuple[str, ...]) -> str:
    return found if found in labels else next(label for label in labels if label.casefold() == found.casefold())


def _named(text: str, item: Item) -> list[int]:
    """The choice whose text occurs, if only one does; one inside a longer one that occurs does not count."""
    words, found = _spaced(text), []
    for place in sorted(range(len(item.choices)), key=lambda i: len(item.choices[i]), reverse=True):
        choice = _spaced(item.choices[place])
        if not choice:
            continue
        before = "(?<![a-z0-9])" if choice[0].isascii() and choice[0].isalnum() else ""
        after = "(?![a-z0-9])" if choice[-1].isascii() and choice[-1].isalnum() else ""
        words, count = re.subn(before + re.escape(choice) + after, "\0", words)
        if count:
            found.append(place)
    return found if len(found) == 1 else []


def _spaced(text: str) -> str:
    return " ".join(text.translate(_NARROW).casefold().split()).rstrip(".。")
