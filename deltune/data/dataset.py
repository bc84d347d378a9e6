"""Tokenised examples at rest: one part per file, in flat arrays that may be memory-mapped, seen as one indexed sequence.

Nothing here is copied until an example is asked for.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from deltune.data.config import DataConfig
from deltune.data.mix import Task, shown, visits
from deltune.data.order import Group
from deltune.data.read import File
from deltune.log import logger

IGNORED = -100  # the label of a token that is not trained


class Example(NamedTuple):
    """What one forward pass sees of one example."""

    ids: np.ndarray  # int32 [seq]
    labels: np.ndarray  # int32 [seq], label i belongs to token i
    row: str  # file:line, or file[index]


def labels(ids: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """int32 [seq]: the token itself where it is trained, else -100."""
    return np.where(trained != 0, ids, np.int32(IGNORED)).astype(np.int32)


class Reject(NamedTuple):
    """A row that was not used."""

    number: int
    reason: str
    overlong: bool  # left out for its length, not for a fault
    value: Any  # the row as read, or the text of a line that is no row


@dataclass
class Counts:
    """What became of the rows of one file. `rows` = `used` + `rejected` + `overlong`, always."""

    rows: int = 0
    used: int = 0
    rejected: int = 0
    overlong: int = 0
    truncated: int = 0  # rows that lost tokens to a limit, or were split
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    largest_id: int = -1
    notes: dict[str, int] = field(default_factory=dict)  # what a user should know -> of how many rows it holds

    def add(self, other: Counts) -> None:
        for name in ("rows", "used", "rejected", "overlong", "truncated", "examples", "tokens", "trained_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest_id = max(self.largest_id, other.largest_id)
        for note, num_rows in other.notes.items():
            self.notes[note] = self.notes.get(note, 0) + num_rows


# file name -> type of its numbers; what a part is made of, on disk and in memory
ARRAYS: dict[str, np.dtype] = {
    "ids.bin": np.dtype("<i4"),  # [tokens]
    "trained.bin": np.dtype("u1"),  # [tokens], 1 where the label is the token itself
    "offsets.bin": np.dtype("<i8"),  # [examples + 1], where examples start in the two above
    "counts.bin": np.dtype("<i4"),  # [examples], trained tokens
    "numbers.bin": np.dtype("<i8"),  # [examples], line or index of the row
    "tasks.bin": np.dtype("<i4"),  # [examples], place of the row's task in `tasks`
}


@dataclass(frozen=True)
class Part:
    """The examples of one file."""

    file: File
    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    num_trained: np.ndarray
    numbers: np.ndarray
    task_of: np.ndarray
    tasks: list[str]  # values of data.mix_by, in the order in which they were met; [""] without it
    counts: Counts
    rejects: list[Reject]
    digest: str  # sha256 of tokens and labels

    def __len__(self) -> int:
        return len(self.numbers)

    def example(self, i: int) -> Example:
        span = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        ids = np.array(self.ids[span], dtype=np.int32)
        return Example(ids, labels(ids, self.trained[span]), self.file.where(int(self.numbers[i])))


class PartWriter:
    """Collects examples in files of a folder, or in memory without one; either way the same bytes."""

    def __init__(self, folder: Path | None = None):
        self._streams: dict[str, BinaryIO] = {
            name: io.BytesIO() if folder is None else open(folder / name, "wb")  # noqa: SIM115 - closed by close()
            for name in ARRAYS
        }
        self._hashes = {name: hashlib.sha256() for name in ARRAYS}
        self._waiting: list[tuple[np.ndarray, np.ndarray, int, int]] = []
        self._tasks: dict[str, int] = {}
        self._end = 0
        self._put("offsets.bin", np.zeros(1))

    def _put(self, name: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, dtype=ARRAYS[name]).tobytes()
        self._streams[name].write(data)
        self._hashes[name].update(data)

    def add(self, ids: np.ndarray, trained: np.ndarray, number: int, task: str) -> None:
        """An example: its tokens, which of them are trained, its row, the row's task."""
        self._waiting.append((ids, trained, number, self._tasks.setdefault(task, len(self._tasks))))
        if len(self._waiting) >= 1024:
            self.flush()

    def flush(self) -> None:
        """Hand on what waits; call it after the last example."""
        if not self._waiting:
            return
        ids, trained, numbers, tasks = zip(*self._waiting, strict=True)
        self._waiting.clear()
        ends = self._end + np.cumsum([len(x) for x in ids])
        self._put("ids.bin", np.concatenate(ids))
        self._put("trained.bin", np.concatenate(trained))
        self._put("offsets.bin", ends)
        self._put("counts.bin", np.array([int(x.sum()) for x in trained]))
        self._put("numbers.bin", np.array(numbers))
        self._put("tasks.bin", np.array(tasks))
        self._end = int(ends[-1])

    def digest(self) -> str:
        return hashlib.sha256("".join(self._hashes[name].hexdigest() for name in list(ARRAYS)[:3]).encode()).hexdigest()

    def tasks(self) -> list[str]:
        return list(self._tasks)

    def hashes(self) -> dict[str, str]:
        return {name: h.hexdigest() for name, h in self._hashes.items()}

    def streams(self) -> dict[str, BinaryIO]:
        return self._streams

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def arrays(self) -> dict[str, np.ndarray]:
        """What was collected in memory."""
        return {name: np.frombuffer(self._streams[name].getvalue(), dtype) for name, dtype in ARRAYS.items()}  # type: ignore[attr-defined]


def part(file: File, arrays: dict[str, np.ndarray], tasks: list[str], counts: Counts, rejects: list[Reject], digest: str) -> Part:
    return Part(
        file=file,
        ids=arrays["ids.bin"],
        trained=arrays["trained.bin"],
        offsets=arrays["offsets.bin"],
        num_trained=arrays["counts.bin"],
        numbers=arrays["numbers.bin"],
        task_of=arrays["tasks.bin"],
        tasks=tasks,
        counts=counts,
        rejects=rejects,
        digest=digest,
    )


class Dataset:
    """Examples of several sources: `len(d)`, `d[i]`, `d.lengths`, `d.num_trained`, `d.fingerprint`.

    The fingerprint is of tokens, labels, their order and the weights; it does not change when files are renamed or
    when the tokens come from the cache.
    """

    def __init__(self, parts: Sequence[Part], groups: Sequence[Group], selection: np.ndarray | None = None):
        self.parts, self.groups, self._selection = list(parts), list(groups), selection
        self._ends = np.cumsum([len(p) for p in self.parts], dtype=np.int64)
        lengths = [np.diff(p.offsets) for p in self.parts] or [np.zeros(0)]
        trained = [p.num_trained for p in self.parts] or [np.zeros(0)]
        self.lengths: np.ndarray = self._selected(np.concatenate(lengths).astype(np.int32))
        self.num_trained: np.ndarray = self._selected(np.concatenate(trained).astype(np.int32))

    def _selected(self, values: np.ndarray) -> np.ndarray:
        return values if self._selection is None else values[self._selection]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        if self._selection is not None:
            index = int(self._selection[index])
        owner = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[owner].example(index - int(self._ends[owner]) + len(self.parts[owner]))

    @property
    def examples_per_epoch(self) -> int:
        """Visits in one epoch: the number of examples where every weight is 1."""
        return sum(group.num_per_epoch for group in self.groups)

    @property
    def largest_id(self) -> int:
        """Largest token id, for the check against the model's vocabulary; -1 without examples."""
        return max((p.counts.largest_id for p in self.parts), default=-1)

    @cached_property
    def fingerprint(self) -> str:
        h = hashlib.sha256()
        for p in self.parts:
            h.update(p.digest.encode())
        for group in self.groups:
            h.update(f"{group.start} {group.stop} {group.weight!r};".encode())
        if self._selection is not None:
            h.update(np.ascontiguousarray(self._selection, dtype="<i8").tobytes())
        return h.hexdigest()

    def mixed(self, config: DataConfig, weights: Sequence[float]) -> Dataset:
        """The same examples with those of a task next to each other, each task a group as data.mix_* and data.weights
        say. `weights` are those of the groups, which are the sources."""
        names = sorted({name for p in self.parts for name in p.tasks})
        places = {name: i for i, name in enumerate(names)}
        codes = self._selected(np.concatenate([np.array([places[n] for n in p.tasks], dtype=np.int64)[p.task_of] for p in self.parts]))
        tasks, found = list[Task](), list[np.ndarray]()
        for source, group in enumerate(self.groups):
            mine = codes[group.start : group.stop]
            for code in np.unique(mine):
                found.append(group.start + np.flatnonzero(mine == code))
                tasks.append(Task(source, names[code], len(found[-1])))
        num_visits = visits(tasks, weights, config)
        logger.info("an epoch visits %s", shown(tasks, num_visits, [group.name for group in self.groups]))
        ends = np.cumsum([len(indices) for indices in found])
        groups = [
            Group(f"{self.groups[t.source].name}/{t.name}" if t.name else self.groups[t.source].name, int(end) - int(t.num_rows), int(end), n / t.num_rows)
            for t, end, n in zip(tasks, ends, num_visits, strict=True)
        ]
        indices = np.concatenate(found)
        return Dataset(self.parts, groups, indices if self._selection is None else self._selection[indices])

    def subset(self, indices: np.ndarray) -> Dataset:
        """The examples at these ascending indices, without copying them."""
        indices = np.asarray(indices, dtype=np.int64)
        groups = []
        for group in self.groups:
            start, stop = np.searchsorted(indices, [group.start, group.stop])
            groups.append(replace(group, start=int(start), stop=int(stop)))
        chosen = indices if self._selection is None else self._selection[indices]
        return Dataset(self.parts, groups, chosen)
