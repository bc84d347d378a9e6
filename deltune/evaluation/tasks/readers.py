"""Readers of the released files of all tasks but MMLU: one function for each layout, from a file to its items.

What does not fit is a DataError with file:line. Nothing is passed over: a question without its answer is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from deltune.evaluation.tasks.extract import number as plain_number
from deltune.evaluation.tasks.item import Item
from deltune.evaluation.tasks.reading import (
    bad,
    is_text,
    json_list,
    json_rows,
    letter_place,
    place_of,
    string_of,
    strings_of,
    text_of,
    unlabelled,
    value_of,
)

YES_NO = ("yes", "no")
_MARKS = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator annotations, <<16-3-4=9>>


def _mapping(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise bad(where, f"a {type(row).__name__}", "an object with named values")
    return row


def dialogues(path: Path) -> list[Item]:
    """C3 and DREAM: `[turns, [{question, choice, answer}, …], id]`; the answer is one of the choices, word by word."""
    items: list[Item] = []
    for _, where, row in json_list(path):
        if not isinstance(row, list) or len(row) != 3 or not all(isinstance(part, list) for part in row[:2]):
            raise bad(where, "not a dialogue with its questions", "[turns, [{question, choice, answer}, …], id]")
        turns, questions, _ = row
        if not all(is_text(turn) for turn in turns):
            raise bad(where, "a turn that is no text", "turns as texts")
        for asked in questions:
            asked = _mapping(asked, where)
            choices, answer = strings_of(asked, "choice", where), string_of(asked, "answer", where)
            if answer not in choices:
                raise bad(where, f"the answer {answer!r:.200} is none of the choices", "an answer that is one of them")
            id = f"{path.stem}:{len(items) + 1}"
            question = string_of(asked, "question", where)
            items.append(Item(id, "", "\n".join(turns), question, tuple(choices), choices.index(answer)))
    return items


def logiqa(path: Path) -> list[Item]:
    """LogiQA 1: eight lines a question: an empty one, the answer's letter, context, question, four choices."""
    lines = text_of(path).replace("\r\n", "\n").rstrip("\n").split("\n")
    items = []
    for begin in range(0, len(lines), 8):
        block, where = lines[begin : begin + 8], f"{path}:{begin + 1}"
        if len(block) < 8:
            raise bad(where, f"{len(block)} lines where a question has 8", "an empty line, letter, context, question, four choices")
        empty, letter, context, question, *choices = (line.strip() for line in block)
        if empty:
            raise bad(where, f"{empty[:40]!r}", "an empty line before each question")
        if not context or not question:
            raise bad(f"{path}:{begin + (4 if context else 3)}", "an empty line", "a context and a question")
        answer = letter_place(letter, 4, f"{path}:{begin + 2}")
        items.append(Item(f"{path.stem}:{len(items) + 1}", "", context, question, unlabelled(choices), answer))
    return items


def logiqa2(path: Path) -> list[Item]:
    """LogiQA 2: JSON lines `{answer, text, question, options}`, the answer a number from 0."""
    items = []
    for number, where, row in json_rows(path):
        choices = strings_of(row, "options", where)
        answer = place_of(row, "answer", len(choices), where)
        context, question = string_of(row, "text", where), string_of(row, "question", where)
        items.append(Item(f"{path.stem}:{number}", "", context, question, unlabelled(choices), answer))
    return items


def reclor(path: Path) -> list[Item]:
    """ReClor: a list of `{context, question, answers, label}`; its test file was released without labels."""
    items = []
    for number, where, row in json_list(path):
        row = _mapping(row, where)
        choices = strings_of(row, "answers", where)
        answer = place_of(row, "label", len(choices), where)
        context, question = string_of(row, "context", where), string_of(row, "question", where)
        items.append(Item(f"{path.stem}:{number}", "", context, question, tuple(choices), answer))
    return items


def lsat(path: Path) -> list[Item]:
    """AR-LSAT: a list of `{passage, questions: [{question, options, answer: letter}]}`."""
    items: list[Item] = []
    for _, where, row in json_list(path):
        passage, questions = string_of(_mapping(row, where), "passage", where), value_of(row, "questions", where)
        if not isinstance(questions, list):
            raise bad(where, f"questions={questions!r:.200}", "a list of questions")
        for asked in questions:
            asked = _mapping(asked, where)
            choices = strings_of(asked, "options", where)
            answer = letter_place(value_of(asked, "answer", where), len(choices), where)
            question = string_of(asked, "question", where)
            items.append(Item(f"{path.stem}:{len(items) + 1}", "", passage, question, unlabelled(choices), answer))
    return items


def strategyqa(path: Path) -> list[Item]:
    """StrategyQA: a list of `{question, answer: true or false, facts: […]}`; the facts become the context."""
    items = []
    for number, where, row in json_list(path):
        row = _mapping(row, where)
        answer, facts = value_of(row, "answer", where), row.get("facts", [])
        if not isinstance(answer, bool):
            raise bad(where, f"answer={answer!r:.200}", "true or false")
        if not isinstance(facts, list) or not all(is_text(fact) for fact in facts):
            raise bad(where, f"facts={facts!r:.200}", "a list of texts in 'facts'")
        question = string_of(row, "question", where)
        items.append(Item(f"{path.stem}:{number}", "", " ".join(facts), question, YES_NO, 0 if answer else 1))
    return items


def gsm8k(path: Path) -> list[Item]:
    """GSM8K: JSON lines `{question, answer}`; the answer ends in `#### number`, its sums in <<a=b>> are taken out."""
    items = []
    for number, where, row in json_rows(path):
        solution, mark, final = string_of(row, "answer", where).rpartition("####")
        if not mark:
            raise bad(where, "the answer has no '####'", "a solution that ends in '#### number'")
        right = plain_number(final)
        if right is None:
            raise bad(where, f"{final.strip()!r:.200} after '####'", "one number")
        solution = _MARKS.sub("", solution)
        if "<<" in solution or ">>" in solution:
            raise bad(where, "a '<<' or '>>' without its partner", "sums written <<a=b>>")
        items.append(Item(f"{path.stem}:{number}", "", "", string_of(row, "question", where), (), (right,), solution.strip()))
    return items
