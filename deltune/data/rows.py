"""From records to examples or rejects, batch by batch and in order: every row read ends as one or the other, and is counted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from deltune import dist
from deltune.data.config import DataConfig
from deltune.data.conversation import BadRow, Conversation
from deltune.data.dataset import Counts, Reject
from deltune.data.encode import Encoded, Encoder, Overlong
from deltune.data.formats import Schema
from deltune.data.mix import task_of
from deltune.data.read import Cursor, File, Record
from deltune.errors import DataError
from deltune.log import logger

BATCH_ROWS = 256
SHOWN = 5  # bad rows listed before stopping
LOOK_AHEAD = 20 * BATCH_ROWS  # rows read after the first bad one to find others worth listing


class Outcome(NamedTuple):
    """What became of one row."""

    number: int
    examples: list[Encoded]
    reject: Reject | None
    notes: set[str]
    after: Cursor
    task: str = ""


def outcomes(records: Iterable[Record], schema: Schema, encoder: Encoder) -> Iterator[Outcome]:
    """The outcome of every record, in order; rows are tokenised some hundred at a time."""
    remaining = iter(records)
    while batch := list(islice(remaining, BATCH_ROWS)):
        parsed = [_parse(record, schema, encoder.config.mix_by) for record in batch]
        encoded = iter(encoder.encode([p for p in parsed if not isinstance(p, BadRow)]))
        for record, conversations in zip(batch, parsed, strict=True):
            result, notes = (conversations, set[str]()) if isinstance(conversations, BadRow) else next(encoded)
            if isinstance(result, BadRow):
                reject = Reject(record.number, str(result), isinstance(result, Overlong), record.value)
                yield Outcome(record.number, [], reject, set(), record.after)
            else:
                yield Outcome(record.number, result, None, notes, record.after, task_of(record.value, encoder.config.mix_by))


def _parse(record: Record, schema: Schema, mix_by: str | None) -> tuple[Conversation, ...] | BadRow:
    if record.fault:
        return BadRow(record.fault)
    try:
        task_of(record.value, mix_by)
        return schema.conversations(record.value)
    except BadRow as e:
        return e


def count(counts: Counts, outcome: Outcome) -> None:
    counts.rows += 1
    if outcome.reject:
        counts.overlong += outcome.reject.overlong
        counts.rejected += not outcome.reject.overlong
        return
    counts.used += 1
    counts.truncated += any(e.truncated for e in outcome.examples)
    counts.examples += len(outcome.examples)
    for example in outcome.examples:
        counts.tokens += len(example.ids)
        counts.trained_tokens += int(example.trained.sum())
        counts.largest_id = max(counts.largest_id, int(example.ids.max()))
    for note in outcome.notes:
        counts.notes[note] = counts.notes.get(note, 0) + 1


def stops(reject: Reject, config: DataConfig) -> bool:
    """Whether the settings forbid to go on after this row."""
    return config.overlong == "error" if reject.overlong else config.on_bad == "stop"


def refusal(found: list[tuple[File, Reject]]) -> DataError:
    """The first bad rows, one a line, and what to do."""
    lines = [f"{file.where(reject.number)}: {reject.reason}" for file, reject in found[:SHOWN]]
    if len(lines) == 1 and not found[0][1].overlong:
        return DataError(f"{lines[0]}\n(data.on_bad=skip would leave such rows out and list them in rejects.jsonl)")
    remedy = "data.overlong=truncate or skip would go on" if found[0][1].overlong else "data.on_bad=skip would leave them out and list them in rejects.jsonl"
    return DataError("\n  ".join([f"rows that cannot be used, the first {len(lines)} ({remedy}):", *lines]))


def warn(message: str, *values: Any) -> None:
    """Say something about the data. All ranks read the same, so one says it."""
    if dist.is_main():
        logger.warning(message, *values)


class RejectLog:
    """A line of JSON for every row that was not used. Without a path it keeps nothing."""

    def __init__(self, path: Path | None):
        self.path = path

    def start(self) -> None:
        """Begin anew; the file appears with its first line."""
        if self.path:
            self.path.unlink(missing_ok=True)

    def write(self, rejects: Iterable[tuple[File, Reject]]) -> None:
        """Add a line for each."""
        lines = [
            _json({"file": file.path, "line": reject.number, "reason": reject.reason, "row": reject.value})
            for file, reject in rejects
        ]
        if not self.path or not lines:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as stream:
                stream.writelines(line + "\n" for line in lines)
        except OSError as e:
            raise DataError(f"cannot write {self.path}: {e.strerror or e}") from e

    def size(self) -> int:
        return self.path.stat().st_size if self.path and self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Forget lines after a byte offset: those of rows that are about to be read again."""
        if self.path and self.size() > size:
            with open(self.path, "r+b") as stream:
                stream.truncate(size)


def _json(value: Any) -> str:
    """JSON of what rows may hold besides JSON: dates and bytes of tables are written as text."""
    return json.dumps(value, ensure_ascii=False, default=str)
