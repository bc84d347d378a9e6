"""MMLU in its three layouts: prompts in QLoRA's JSON lines, the CSV release, PandaLLM's merged CSV.

Texts are kept to the byte, so that the same prompt can be built again; what does not fit is a DataError with its line.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from deltune.errors import DataError
from deltune.evaluation.tasks.item import Item
from deltune.evaluation.tasks.reading import bad, csv_rows, json_rows, letter_place, string_of

HEADER = "The following are multiple choice questions (with answers) about  {}.\n\n"
PROMPTS = tuple(f"{shots}_shot_mmlu_{split}.json" for split in ("test", "val") for shots in ("zero", "five"))
SPLITS = ("test", "val", "dev")
MERGED = ["", "inputs", "targets"]  # the first column is the row's number
LAYOUTS = (
    "a folder with dev/, val/ and test/ of *_test.csv, one of these, a merged CSV with the columns inputs and targets, "
    "or JSON lines {subject, input, output}"
)
_SOLVED = re.compile(r"\nAnswer: ?([A-D])\n\n")
_CHOICES = tuple(f"\n{letter}. " for letter in "ABCD")


def read(path: Path) -> list[Item]:
    """All questions of a file or folder in any of the layouts; a release folder gives its test split."""
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder. What fits: {LAYOUTS}.")
    if path.suffix == ".csv":
        return _read_csv(path)
    return [item for item, _ in _prompts(path)]


def exemplars(path: Path) -> list[Item]:
    """The solved questions that come with the data, each once: those inside five-shot prompts, or the split `dev`."""
    if path.is_dir():
        prompts = [path / name for name in PROMPTS if name.startswith("five") and (path / name).is_file()]
        for folder in (path / "dev", path.parent / "dev"):
            if folder.is_dir() and folder != path:
                return _read_folder(folder)
        return _inside(prompts[0]) if prompts else []
    if path.suffix == ".csv":
        return _dev_beside(path)
    beside = path.with_name(path.name.replace("zero_shot", "five_shot"))
    return _inside(beside if beside.is_file() else path)


# -- prompts in JSON lines ----------------------------------------------------------------------------------------


def _prompts(path: Path) -> list[tuple[Item, list[Item]]]:
    return [prompt_item(row, f"{path.stem}:{number}", where) for number, where, row in json_rows(path)]


def _inside(path: Path) -> list[Item]:
    found: dict[tuple, Item] = {}
    for _, shots in _prompts(path):
        for shot in shots:
            found.setdefault((shot.group, shot.content), shot)
    return list(found.values())


def prompt_item(row: dict[str, Any], id: str, where: str) -> tuple[Item, list[Item]]:
    """(item, its exemplars) of one row {subject, input, output}. Exemplars are named "<id>#<number>"."""
    subject, text, output = (string_of(row, key, where) for key in ("subject", "input", "output"))
    header = HEADER.format(subject.replace("_", " "))
    if not text.startswith(header) or not text.endswith("\nAnswer:"):
        raise bad(where, f"input begins {text[:80]!r} and ends {text[-10:]!r}", f"{header!r} … '\\nAnswer:'")
    pieces = _SOLVED.split(text.removeprefix(header).removesuffix("\nAnswer:"))
    shots = []
    for number, (block, letter) in enumerate(zip(pieces[:-1:2], pieces[1::2], strict=True), 1):
        question, choices = question_of(block, f"{where}, exemplar {number}")
        shots.append(Item(f"{id}#{number}", subject, "", question, choices, letter_place(letter, 4, where)))
    question, choices = question_of(pieces[-1], where)
    return Item(id, subject, "", question, choices, letter_place(output, 4, where)), shots


def question_of(text: str, where: str) -> tuple[str, tuple[str, ...]]:
    """(question, four choices) of a block that ends with its last choice."""
    choices: list[str] = []
    for mark in reversed(_CHOICES):  # from the end: a question may itself hold a line that begins with "A. "
        text, found, choice = text.rpartition(mark)
        if not found:
            raise bad(where, f"no line {mark.strip()!r}", "a question and four lines 'A. …' to 'D. …'")
        choices.insert(0, choice)
    return text, tuple(choices)


# -- CSV ----------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> list[Item]:
    """A split's subjects in the order of their names; of a release folder its first split; of a folder of prompts its first file."""
    files = sorted(folder.glob("*_*.csv"))
    if files:
        return [item for file in files for item in _read_csv(file)]
    for split in SPLITS:
        if sorted((folder / split).glob("*_*.csv")):
            return _read_folder(folder / split)
    for name in PROMPTS:
        if (folder / name).is_file():
            return read(folder / name)
    for split in SPLITS:
        if (folder / f"{split}.csv").is_file():
            return read(folder / f"{split}.csv")
    raise DataError(f"{folder}: no file of MMLU in it. What fits: {LAYOUTS}.")


def _read_csv(path: Path) -> list[Item]:
    """A subject's file (six columns without a heading), or a merged one; its heading tells which."""
    rows = list(csv_rows(path))
    if rows and rows[0][2] == MERGED:
        return [_merged(row, f"{path.stem}:{number - 1}", where) for number, where, row in rows[1:]]
    subject = path.stem
    for split in SPLITS:
        subject = subject.removesuffix(f"_{split}")
    items = []
    for number, where, row in rows:
        if len(row) != 6:
            raise bad(where, f"{len(row)} columns", "question, four choices and a letter")
        items.append(Item(f"{path.stem}:{number}", subject, "", row[0], tuple(row[1:5]), letter_place(row[5], 4, where)))
    return items


def _merged(row: list[str], id: str, where: str) -> Item:
    """A row of a merged file, whose subject is lost."""
    if len(row) != len(MERGED):
        raise bad(where, f"{len(row)} columns", "a number, inputs and targets")
    question, choices = question_of(row[1], where)
    return Item(id, "", "", question, choices, letter_place(row[2], 4, where))


def _dev_beside(path: Path) -> list[Item]:
    """Exemplars of one CSV file: the whole of ../dev for a subject's file, dev.csv for a merged one."""
    for place in (path.parent.parent / "dev", path.with_name("dev.csv")):
        if place.is_dir() and place != path.parent and sorted(place.glob("*_dev.csv")):
            return _read_folder(place)
        if place.is_file() and place != path:
            return _read_csv(place)
    return []
