"""Which schema the rows of a source have: found from their first rows, said aloud, and refused where rows disagree."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from deltune.data.conversation import keys_of
from deltune.data.formats import DOCUMENTS, ROLES, Schema
from deltune.data.named import NAMED
from deltune.data.read import parse_line
from deltune.data.shapes import marks_of
from deltune.errors import DataError

FIRST_ROWS = 100

# (format, column of each needed role): what is looked for, in this order; the more telling names come first
VARIANTS: tuple[tuple[str, dict[str, str]], ...] = (
    ("messages", {"messages": "messages"}),
    ("messages", {"messages": "conversations"}),
    ("messages", {"messages": "conversation"}),
    ("sharegpt", {"conversations": "conversations"}),
    ("sharegpt", {"conversations": "conversation"}),
    ("sharegpt", {"conversations": "messages"}),
    ("tree", {"prompt": "prompt"}),
    ("tree_rows", {}),
    ("instances", {"instruction": "instruction", "instances": "instances"}),
    ("exam", {"instruction": "textbox_q_instruction", "context": "textbox_q_context", "question": "textbox_question", "answer": "textbox_answer", "analysis": "textbox_answer_analysis"}),
    ("rounds", {"round_0": "round_0"}),
    ("task", {"definition": "Definition", "input": "input", "output": "output"}),
    ("task", {"definition": "definition", "input": "inputs", "output": "targets"}),
    ("alpaca", {"instruction": "trans_instruction", "input": "trans_input", "output": "trans_output"}),
    ("alpaca", {"instruction": "instruction", "output": "output"}),
    ("alpaca", {"instruction": "instruction", "input": "context", "output": "response"}),
    ("alpaca", {"instruction": "instruction", "output": "response"}),
    ("alpaca", {"instruction": "instruction", "output": "target"}),
    ("alpaca", {"instruction": "instruction", "output": "answer"}),
    ("prompt_completion", {"prompt": "prompt", "completion": "completion"}),
    ("prompt_completion", {"prompt": "prompt", "completion": "response"}),
    ("input_output", {"input": "input", "output": "output"}),
    ("input_output", {"input": "question", "output": "answer"}),
    ("input_output", {"input": "query", "output": "response"}),
    ("input_output", {"input": "inputs", "output": "targets"}),
    ("input_output", {"input": "input", "output": "target"}),
    ("input_output", {"input": "source", "output": "target"}),
    ("dialogue", {"text": "text"}),
    ("titled", {"title": "title", "content": "content"}),
    ("text", {"text": "text"}),
    ("text", {"text": "content"}),
)
# what the entries of a conversation carry
ENTRY_KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
# what a row must have beyond the names of its columns; `value` is that of the format's first role
_TELLS: dict[str, Callable[[Mapping[str, Any], Any], bool]] = {
    "messages": lambda row, value: _has_entries(value, "role"),
    "sharegpt": lambda row, value: _has_entries(value, "from"),
    "dialogue": lambda row, value: marks_of(value) is not None,
    "tree": lambda row, value: isinstance(value, Mapping) and "role" in value,
    "instances": lambda row, value: isinstance(row["instances"], list),
}


def detect(rows: Iterable[Any], *, format: str, fields: Mapping[str, str], mode: str, name: str) -> Schema:
    """The schema that the first rows of a source share.

    Rows without any known shape are left to be refused one by one, with their line, if another row has one.
    Raises DataError if no row has one, or two rows have different ones.
    """
    candidates = _candidates(format, fields, mode)
    found: list[tuple[Schema, int]] = []
    seen: list[Mapping[str, Any]] = []
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            continue
        seen.append(row)
        schema = next((c for c in candidates if _fits(c, row, sure=format != "auto")), None)
        foreign = _foreign(row) if format == "auto" else ""
        if foreign and not (schema and (fields or (schema.format in DOCUMENTS and mode == "pretrain"))):
            raise DataError(f"{name}: {foreign}")
        if schema and all(schema != other for other, _ in found):
            found.append((schema, index))
    if not seen:
        raise DataError(f"{name}: no row is an object with named values; {_expected(candidates)}")
    if not found:
        raise DataError(f"{name}: {_unknown(seen[0], candidates)}")
    if len(found) > 1:
        shapes = "; ".join(f"{schema.describe()} first in row {index + 1}" for schema, index in found)
        raise DataError(f"{name}: rows have different formats: {shapes}. Name one with data.format or data.fields, or make a source of each")
    schema = found[0][0]
    for role, column in fields.items():
        if not any(column in row for row in seen):
            raise DataError(f"{name}: data.fields maps {role!r} to column {column!r}, which no row has; keys found: {keys_of(seen[0])}")
    return schema


def _candidates(format: str, fields: Mapping[str, str], mode: str) -> list[Schema]:
    found: list[Schema] = []
    variants = NAMED[format].shapes if format in NAMED and format not in ROLES else [v for v in VARIANTS if format in ("auto", v[0])]
    for name, columns in variants:
        required, optional = ROLES[name]
        if any(role not in (*required, *optional) for role in fields):
            continue
        schema = Schema(name, {role: role for role in (*required, *optional)} | dict(columns) | dict(fields))
        if schema not in found:
            found.append(schema)
    if not found:
        formats = {name: ROLES[name] for name, _ in variants}
        known = {f: [*required, *optional] for f, (required, optional) in formats.items()}
        every = sorted({role for roles in known.values() for role in roles})
        wrong = [role for role in fields if role not in every]
        if wrong:
            close = difflib.get_close_matches(wrong[0], every, n=3)
            raise DataError(
                f"data.fields: no format{'' if format == 'auto' else ' ' + format} has a role {wrong[0]!r}"
                f"{'; nearest: ' + ', '.join(close) if close else ''}; roles are "
                + "; ".join(f"{f}: {', '.join(roles)}" for f, roles in known.items())
            )
        raise DataError(f"data.fields: no one format has all the roles {', '.join(fields)}")
    if mode == "pretrain":
        found.sort(key=lambda schema: schema.format not in DOCUMENTS)
    return found


def _fits(schema: Schema, row: Mapping[str, Any], *, sure: bool) -> bool:
    """Whether a row has a schema's columns and what tells it from others; `sure` where the format was named."""
    if any(column not in row for column in schema.needed()):
        return False
    context = schema.columns.get("input")
    if schema.format == "alpaca" and context != "input" and context not in row:
        return False  # a variant named for its input column
    if schema.format == "titled" and not sure:
        return "dataType" in row  # WuDao's; other rows with a title and a content may mean something else by them
    tells = _TELLS.get(schema.format)
    return tells is None or tells(row, row[schema.needed()[0]])


def _has_entries(value: Any, key: str) -> bool:
    if isinstance(value, str):
        value = parse_line(value)[0]
    entries = [e for e in value if isinstance(e, dict)] if isinstance(value, list) else []
    return bool(entries) and key in entries[0]


def _expected(candidates: Sequence[Schema]) -> str:
    shapes: dict[str, str] = {}  # the first of each format has its own names
    for candidate in sorted(candidates, key=lambda c: list(ROLES).index(c.format)):
        shapes.setdefault(candidate.format, f"{candidate.format} ({', '.join(candidate.needed())})")
    return "expected one of " + "; ".join(shapes.values())


def _unknown(row: Mapping[str, Any], candidates: Sequence[Schema]) -> str:
    """Keys found, the format that lacks least, and the key that may be meant."""
    formats = list(ROLES)  # of those that lack as much, the more common one
    nearest = min(candidates, key=lambda c: (sum(column not in row for column in c.needed()) / len(c.needed()), formats.index(c.format), c.describe() != c.format))
    missing = [column for column in nearest.needed() if column not in row]
    message = f"the rows have no known format; keys found: {keys_of(row)}"
    if missing:
        close = [f"{m!r} (is it {c[0]!r}?)" if (c := difflib.get_close_matches(m, map(str, row), n=1)) else repr(m) for m in missing]
        message += f"; nearest is {nearest.format}, which lacks {', '.join(close)}"
    elif nearest.format in ENTRY_KEYS:
        message += f"; {nearest.needed()[0]!r} must be a list of objects with {' and '.join(ENTRY_KEYS[nearest.format])}"
    return f"{message}. Map columns with data.fields, e.g. {{output: reply}}; {_expected(candidates)}"


def _foreign(row: Mapping[str, Any]) -> str:
    """What rows are that look like training data of another kind."""
    if "chosen" in row and "rejected" in row:
        return (
            "rows are preference pairs (chosen, rejected), which sft cannot use; to train on the preferred answers "
            "alone map them, e.g. data.fields={output: chosen} (or {messages: chosen} for lists of messages, or "
            "data.format=hh-rlhf for dialogues of Human and Assistant)"
        )
    if isinstance(row.get("label"), bool):
        return "rows carry a true/false label (KTO feedback), which sft cannot use; leave the disliked ones out and drop `label`"
    if "input_ids" in row:
        return "rows are tokenised already (input_ids); give the text instead, it is tokenised here and cached"
    choices = next((k for k in ("options", "choices", "choice") if isinstance(row.get(k), list)), None)
    if choices:
        return f"rows are multiple-choice questions ({choices!r} is a list); write the options into the prompt and map the fields"
    return ""
