"""Examples read and tokenised as training goes: never more than one block in memory, and the place in the data is a few numbers.

A block is so many rows in reading order; its examples are shuffled by a function of (seed, epoch, block). To resume,
the block is read once more, from the byte where it began. Several sources are read one after another in file order;
with shuffling they are interleaved in proportion to their size and weight, so that a block is a mixture. Where tasks are
mixed (see mix.py) all rows are counted once before, and every pass over a source leaves out its share of each task.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deltune.data.bins import best_fit, dealt, too_long
from deltune.data.config import DataConfig
from deltune.data.conversation import BadRow
from deltune.data.dataset import Counts, Example, Reject, labels
from deltune.data.encode import ENCODING, Encoder, tokenizer_digest
from deltune.data.formats import Schema
from deltune.data.mix import Task, mixes, shown, task_of, visits
from deltune.data.order import BATCHES, BLOCK, ROW, Permutation, key
from deltune.data.read import Cursor, File, Record, read
from deltune.data.rows import RejectLog, count, outcomes, refusal, stops, warn
from deltune.data.sources import SourceFiles
from deltune.errors import DataError
from deltune.log import logger

_READING = ("shuffle", "stream_block", "seed", "read_nums", "weights", "mix_cap", "mix_temperature")  # the settings that decide which row comes when


@dataclass
class StreamSource:
    """One source of a stream and the counts it adds to."""

    files: SourceFiles
    schema: Schema
    encoder: Encoder
    counts: Counts


@dataclass
class _Place:
    """How far one source has been read in this epoch. Plain numbers, so that it can be saved."""

    turn: int = 0  # pass over the source: a weight of 2.5 makes three, the last in part
    file: int = 0
    offset: int = 0
    number: int = 0
    taken: int = 0  # rows given so far in this epoch
    done: bool = False


@dataclass(frozen=True)
class Plan:
    """What an epoch reads of a source."""

    passes: float  # over all its files
    rate: float  # of its rows among those of all sources
    kept: Mapping[str | None, float]  # task -> share of its rows that a pass gives; all of those that are not named


def plans(sources: Sequence[StreamSource], config: DataConfig) -> list[Plan]:
    """The plan of each source. Where tasks are mixed, counts all rows first; else what is known beforehand is enough."""
    weights = [source.files.source.weight for source in sources]
    if not mixes(config):
        return [Plan(weight, weight * source.files.size, {}) for weight, source in zip(weights, sources, strict=True)]
    tasks = list[Task]()
    for index, source in enumerate(sources):
        logger.info("counting the rows of %s", source.files.name)
        found = Counter(
            task_or_none(record, config.mix_by) for file in source.files.files for record in source.schema.gathered(read(file))
        )
        tasks += [Task(index, name, num_rows) for name, num_rows in sorted(found.items(), key=str) if name is not None]
    num_visits = visits(tasks, weights, config)
    logger.info("an epoch visits %s", shown(tasks, num_visits, [source.files.name for source in sources]))
    result = []
    for index in range(len(sources)):
        times = {task.name: n / task.num_rows for task, n in zip(tasks, num_visits, strict=True) if task.source == index}
        passes = max(times.values(), default=0.0)
        total = sum(n for task, n in zip(tasks, num_visits, strict=True) if task.source == index)
        result.append(Plan(passes, total or 1.0, {name: t / passes for name, t in times.items()}))
    return result


def task_or_none(record: Record, column: str | None) -> str | None:
    """The task of a row; None of one that cannot be used, which is then met once in a pass and refused."""
    try:
        return None if record.fault else task_of(record.value, column)
    except BadRow:
        return None


class _Reader:
    """Rows of one source, in order, from a place on."""

    def __init__(self, source: StreamSource, index: int, plan: Plan, config: DataConfig):
        self.source, self.index, self.seed, self.mix_by = source, index, config.seed, config.mix_by
        self.plan = plan
        self.num_full, self.part = int(plan.passes), plan.passes - int(plan.passes)
        self.place, self.epoch = _Place(), 0
        self._records: Iterator[Record] | None = None

    def seek(self, place: _Place, epoch: int) -> None:
        self.place, self.epoch, self._records = _Place(**vars(place)), epoch, None

    def next(self) -> tuple[File, Record] | None:
        """The next row; None at the end of the epoch's passes."""
        place, files = self.place, self.source.files.files
        while not place.done:
            if place.turn > self.num_full or (place.turn == self.num_full and not self.part):
                place.done = True
            elif place.file >= len(files):
                place.turn, place.file = place.turn + 1, 0
            else:
                file = files[place.file]
                if self._records is None:
                    self._records = iter(self.source.schema.gathered(read(file, Cursor(place.offset, place.number))))
                record = next(self._records, None)
                if record is None:
                    self._records, place.file, place.offset, place.number = None, place.file + 1, 0, 0
                    continue
                place.offset, place.number = record.after
                if self._given(record):
                    place.taken += 1
                    return file, record
        return None

    def _given(self, record: Record) -> bool:
        """Whether this pass gives a row: rows have a place on a circle, drawn once, and what is given of a task moves
        around it from pass to pass, so that rows take turns."""
        kept = self.plan.kept.get(task_or_none(record, self.mix_by), 1.0)
        given = kept * (1.0 if self.place.turn < self.num_full else self.part)
        if given >= 1:
            return True
        start = kept * (self.epoch * self.part + (0 if kept == 1 else self.epoch * self.num_full + self.place.turn))
        place = key(self.seed, ROW, self.index, self.place.file, record.number) / 2**64
        return (place - start) % 1.0 < given


class Stream:
    """An endless sequence of examples: epochs of the data, one after another. `take(n)` gives the next n.

    `counts` grow as rows are read in the first epoch. The number of examples of an epoch is not known before.
    """

    examples_per_epoch = None

    def __init__(self, sources: list[StreamSource], config: DataConfig, log: RejectLog):
        self.sources, self.config, self.log = sources, config, log
        self.counts = Counts()
        self._readers = [_Reader(s, i, plan, config) for i, (s, plan) in enumerate(zip(sources, plans(sources, config), strict=True))]
        self._epoch, self._block, self._rows_read = 0, 0, 0
        self._any_in_epoch = False
        self._examples: list[Example] = []
        self._taken = 0  # of the block in memory
        self._bin_ends: list[int] = []  # of the block in memory, where bins were asked for
        self._begun = False
        self._mark: dict[str, Any] = self._here()
        self._said: set[str] = set()

    @cached_property
    def fingerprint(self) -> str:
        """Of the files' names and sizes, the settings and the tokenizer: contents are not read for it."""
        what: list[Any] = [getattr(self.config, name) for name in (*ENCODING, *_READING)]
        for source in self.sources:
            what.append([source.schema.describe(), source.encoder.name, tokenizer_digest(source.encoder.tokenizer)])
            what += [[Path(f.path).name, f.kind, f.split, f.subset, f.pattern, f.revision] for f in source.files.files]
            what += [source.files.size, source.files.source.weight]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def take(self, n: int) -> list[Example]:
        """The next n examples, through the ends of epochs. Raises DataError for a bad row as `on_bad` says."""
        found: list[Example] = []
        while len(found) < n:
            if self._taken == len(self._examples):
                self._next_block()
            piece = self._examples[self._taken : self._taken + n - len(found)]
            found += piece
            self._taken += len(piece)
        return found

    def take_bins(self, n: int, capacity: int) -> list[list[Example]]:
        """The next n bins of at most `capacity` tokens, best-fit within each block. A stream gives either examples or
        bins of one capacity. Raises DataError for an example that no bin takes."""
        found: list[list[Example]] = []
        while len(found) < n:
            if self._taken == len(self._examples):
                self._next_block()
            if not self._bin_ends:
                self._put_into_bins(capacity)
            end = self._bin_ends[bisect_right(self._bin_ends, self._taken)]
            found.append(self._examples[self._taken : end])
            self._taken = end
        return found

    def _put_into_bins(self, capacity: int) -> None:
        """The examples of the block in the order of its bins."""
        lengths = np.array([len(example.ids) for example in self._examples])
        longest = int(lengths.argmax())
        if lengths[longest] > capacity:
            raise too_long(int(lengths[longest]), capacity, self._examples[longest].row)
        bins = dealt(best_fit(lengths, capacity), key(self.config.seed, BATCHES, self._epoch, self._block) if self.config.shuffle else None)
        self._examples = [self._examples[i] for i in np.concatenate(bins)]
        self._bin_ends = np.cumsum([len(bin) for bin in bins]).tolist()

    # ---- place

    def _here(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "block": self._block,
            "rows_read": self._rows_read,
            "any_in_epoch": self._any_in_epoch,
            "readers": [dict(vars(r.place)) for r in self._readers],
            "rejects_bytes": self.log.size() if self._begun else 0,
            "counts": [asdict(c) for c in self._all_counts()],
        }

    def _all_counts(self) -> list[Counts]:
        return [self.counts, *(s.counts for s in self.sources)]

    def state(self) -> dict[str, Any]:
        """The place of the next example, as plain JSON values."""
        return {**self._mark, "taken": self._taken, "fingerprint": self.fingerprint}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a place; reads its block again. DataError if the data or settings are not those of the state."""
        if state.get("fingerprint") != self.fingerprint:
            raise DataError("the training data, its settings or the tokenizer are not those of the checkpoint")
        self._epoch, self._block, self._rows_read = state["epoch"], state["block"], state["rows_read"]
        self._any_in_epoch = state["any_in_epoch"]
        for reader, place in zip(self._readers, state["readers"], strict=True):
            reader.seek(_Place(**place), self._epoch)
        for counts, values in zip(self._all_counts(), state["counts"], strict=True):
            vars(counts).update(values | {"notes": dict(values["notes"])})
        self.log.cut(state["rejects_bytes"])
        self._begun = True
        self._examples, self._taken, self._bin_ends, self._mark = [], 0, [], self._here()
        if state["taken"]:
            self._next_block()
            self._taken = state["taken"]

    # ---- blocks

    def _next_block(self) -> None:
        """Read the next block that holds an example."""
        self._examples, self._taken, self._bin_ends = [], 0, []
        if not self._begun:
            self.log.start()
            self._begun = True
        while not self._examples:
            self._mark = self._here()
            rows = self._rows()
            if not rows:
                self._next_epoch()
                continue
            self._examples = self._encode(rows)
            self._any_in_epoch = self._any_in_epoch or bool(self._examples)
            if self.config.shuffle:
                order = Permutation(max(1, len(self._examples)), key(self.config.seed, BLOCK, self._epoch, self._block))
                self._examples = [self._examples[i] for i in order(np.arange(len(self._examples)))]
            self._block += 1

    def _next_epoch(self) -> None:
        if not self._any_in_epoch:
            raise DataError(f"data.train: no token would be trained ({self.counts.rows} rows read, {self.counts.rejected} rejected)")
        self._epoch, self._block, self._rows_read, self._any_in_epoch = self._epoch + 1, 0, 0, False
        for reader in self._readers:
            reader.seek(_Place(), self._epoch)

    def _rows(self) -> list[tuple[int, File, Record]]:
        """(source, file, record) of the next block; empty at the end of an epoch."""
        found: list[tuple[int, File, Record]] = []
        limit = self.config.read_nums
        while len(found) < self.config.stream_block and (limit is None or self._rows_read < limit):
            waiting = [r for r in self._readers if not r.place.done]
            if not waiting:
                break
            reader = min(waiting, key=lambda r: (r.place.taken + 1) / r.plan.rate) if self.config.shuffle else waiting[0]
            row = reader.next()
            if row is not None:
                found.append((reader.index, *row))
                self._rows_read += 1
        return found

    def _encode(self, rows: list[tuple[int, File, Record]]) -> list[Example]:
        """The examples of a block in reading order; rows that cannot be used are refused or logged."""
        results = {
            index: outcomes([record for i, _, record in rows if i == index], source.schema, source.encoder)
            for index, source in enumerate(self.sources)
        }
        new = self._epoch == 0
        examples: list[Example] = []
        rejects: list[tuple[File, Reject]] = []
        for index, file, _ in rows:
            outcome = next(results[index])
            if new:
                for counts in (self.counts, self.sources[index].counts):
                    count(counts, outcome)
            for note in outcome.notes - self._said:
                warn("%s: %s", file.where(outcome.number), note)
                self._said.add(note)
            if outcome.reject:
                rejects.append((file, outcome.reject))
            for e in outcome.examples:
                examples.append(Example(e.ids, labels(e.ids, e.trained), file.where(outcome.number)))
        refused = [r for r in rejects if stops(r[1], self.config)]
        if refused:
            raise refusal(refused)
        if new:
            self.log.write(rejects)
        return examples
