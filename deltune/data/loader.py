"""This rank's share of every optimizer step: a pure function of the step's number, and the same examples for any split.

Step i covers positions [i*G, (i+1)*G) of an endless sequence of epochs, G = micro_batch x accumulate x world size;
micro-batch k of rank r is the (k*world + r)-th slice of it, so that accumulation and ranks are the same thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from deltune.data.dataset import Dataset, Example
from deltune.data.order import Group, LengthGroups, Order
from deltune.data.pack import Batch, pad
from deltune.data.stream import Stream
from deltune.errors import DataError


class Loader:
    """Micro-batches of a data set (a Dataset, or anything with its length, indexing, `lengths` and `fingerprint`) or a stream.

    `num_examples` ends the sequence: the last step is then short, and a rank may have no micro-batch in it. None is
    endless. A data set may be asked for any step at once; a stream only for the next one, or for the one after a
    state that was loaded.
    """

    def __init__(
        self,
        dataset: Dataset | Stream,
        *,
        micro_batch: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        group_by_length: bool = False,
        pad_id: int,
        num_examples: int | None = None,
    ):
        self.dataset, self.micro_batch, self.accumulate = dataset, micro_batch, accumulate
        self.rank, self.world_size, self.pad_id, self.num_examples = rank, world_size, pad_id, num_examples
        self.global_batch = micro_batch * accumulate * world_size
        self._next_step = 0  # of a stream
        self._identity = {"global_batch": self.global_batch, "seed": seed, "shuffle": shuffle, "group_by_length": group_by_length}
        self._order: Order | None = None
        self._by_length: LengthGroups | None = None
        if not isinstance(dataset, Stream):
            groups = dataset.groups if isinstance(dataset, Dataset) else [Group("", 0, len(dataset))]
            self._order = Order(groups, seed=seed, shuffle=shuffle)
            if group_by_length:
                self._by_length = LengthGroups(self._order, dataset.lengths, global_batch=self.global_batch, num_examples=num_examples)

    @property
    def examples_per_epoch(self) -> int | None:
        """Visits in one epoch, weights included; None for a stream."""
        return self._order.num_per_epoch if self._order else None

    def num_steps(self, epochs: float) -> int:
        """Optimizer steps in so many epochs; the last may be short. DataError for a stream, whose size is unknown."""
        if self.examples_per_epoch is None:
            raise DataError("data.streaming does not know how long an epoch is; give train.steps instead of train.epochs")
        total = max(1, round(epochs * self.examples_per_epoch))
        if self.num_examples is not None:
            total = min(total, self.num_examples)
        return -(-total // self.global_batch)

    def step(self, i: int) -> list[Batch]:
        """This rank's micro-batches of step i, 0 being the first. Empty past the end, or where the last step gives
        this rank nothing."""
        size = self._size(i)
        slices = range(self.rank * self.micro_batch, size, self.micro_batch * self.world_size)
        if not isinstance(self.dataset, Stream):
            indices = self._indices(i, size)
            chosen = [[self.dataset[int(j)] for j in indices[start : start + self.micro_batch]] for start in slices]
        else:
            if i != self._next_step:
                raise ValueError(f"a stream gives step {self._next_step} next, not step {i}")
            examples = self.dataset.take(size)  # all ranks read all rows: which of them are examples only encoding tells
            chosen = [examples[start : start + self.micro_batch] for start in slices]
            self._next_step += 1
        return [pad(group, self.pad_id) for group in chosen]

    def _size(self, i: int) -> int:
        """Examples of step i over all ranks."""
        if self.num_examples is None:
            return self.global_batch
        return max(0, min(self.global_batch, self.num_examples - i * self.global_batch))

    def _indices(self, i: int, size: int) -> np.ndarray:
        if self._by_length:
            return self._by_length.batch(i)
        assert self._order is not None
        return self._order.at(np.arange(i * self.global_batch, i * self.global_batch + size, dtype=np.int64))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values: the identity of the data and order, and a stream's place."""
        body: dict[str, Any] = {**self._identity, "fingerprint": self.dataset.fingerprint}
        if isinstance(self.dataset, Stream):
            body |= {"next_step": self._next_step, "stream": self.dataset.state()}
        return body

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken. DataError if data, order or global batch are others than its own: steps would
        then not be the ones that were counted."""
        names = {"global_batch": "examples per step (micro_batch x accumulate x processes)", "fingerprint": "training data"}
        for name, value in {**self._identity, "fingerprint": self.dataset.fingerprint}.items():
            if state.get(name) != value:
                shown = "" if name == "fingerprint" else f": {state.get(name)} then, {value} now"
                raise DataError(f"cannot resume: {names.get(name, 'data.' + name)} changed since the checkpoint{shown}")
        if isinstance(self.dataset, Stream):
            self.dataset.load_state(state["stream"])
            self._next_step = state["next_step"]


def eval_batches(dataset: Dataset, *, micro_batch: int, rank: int = 0, world_size: int = 1, pad_id: int) -> Iterator[Batch]:
    """Every example exactly once over all ranks, longest first, so that a batch too large for memory fails at once.
    Ranks may differ by one batch."""
    order = np.argsort(-dataset.lengths.astype(np.int64), kind="stable")
    for start in range(rank * micro_batch, len(order), micro_batch * world_size):
        examples: list[Example] = [dataset[int(j)] for j in order[start : start + micro_batch]]
        yield pad(examples, pad_id)
