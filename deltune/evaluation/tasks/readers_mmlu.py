"""MMLU's files: prompts in QLoRA's JSON lines, taken apart into question, choices and exemplars; the CSV release.

Texts are kept to the byte, so that the same prompt can be built again; what does not fit is a DataError with its line.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from deltune.evaluation.tasks.item import Item
from deltune.evaluation.tasks.reading import bad, json_rows, string_of

HEADER = "The following are multiple choice questions (with answers) about  {}.\n\n"
_SOLVED = re.compile(r"\nAnswer: ?([A-D])\n\n")
_CHOICES = tuple(f"\n{letter}. " for letter in "ABCD")


def question_of(text: str, where: str) -> tuple[str, tuple[str, ...]]:
    """(question, four choices) of a block that ends with its last choice."""
    choices: list[str] = []
    for mark in reversed(_CHOICES):  # from the end: a question may itself hold a line that begins with "A. "
        text, found, choice = text.rpartition(mark)
        if not found:
            raise bad(where, f"no line {mark.strip()!r}", "a question, four lines 'A. …' to 'D. …', and 'Answer:'")
        choices.insert(0, choice)
    return text, tuple(choices)


def prompt_item(row: dict[str, Any], id: str, where: str) -> tuple[Item, list[Item]]:
    """(item, its exemplars) of one row {subject, input, output}. Exemplars are named "<id>#<number>"."""
    subject, text, output = (string_of(row, key, where) for key in ("subject", "input", "output"))
    header = HEADER.format(subject.replace("_", " "))
    if not text.startswith(header) or not text.endswith("\nAnswer:"):
        raise bad(where, f"input begins {text[:80]!r} and ends {text[-10:]!r}", f"{header!r} … '\\nAnswer:'")
    if output.strip() not in tuple("ABCD"):
        raise bad(where, f"output={output!r}", "one of A, B, C, D")
    pieces = _SOLVED.split(text.removeprefix(header).removesuffix("\nAnswer:"))
    exemplars = []
    for number, (block, letter) in enumerate(zip(pieces[:-1:2], pieces[1::2], strict=True), 1):
        question, choices = question_of(block, f"{where}, exemplar {number}")
        exemplars.append(Item(f"{id}#{number}", subject, "", question, choices, "ABCD".index(letter)))
    question, choices = question_of(pieces[-1], where)
    return Item(id, subject, "", question, choices, "ABCD".index(output.strip())), exemplars


def _prompt_rows(path: Path) -> list[tuple[Item, list[Item]]]:
    return [prompt_item(row, f"{path.stem}:{number}", where) for number, where, row in json_rows(path)]


def read(path: Path) -> list[Item]:
    """All questions of a file of prompts."""
    return [item for item, _ in _prompt_rows(path)]


def exemplars(path: Path) -> list[Item]:
    """The solved questions inside five-shot prompts, each once, in their order."""
    found: dict[tuple, Item] = {}
    for _, shots in _prompt_rows(path):
        for shot in shots:
            found.setdefault((shot.group, shot.content), shot)
    return list(found.values())
