"""This rank's share of every optimizer step: a pure function of the step's number, and the same examples for any split.

Step i covers positions [i*G, (i+1)*G) of an endless sequence of epochs, G = micro_batch x accumulate x world size;
micro-batch k of rank r is the (k*world + r)-th slice of it, so that accumulation and ranks are the same thing. With
`micro_batch_tokens` the sequence is one of bins, a slice is a bin, and G = accumulate x world size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from deltune.data.bins import Bins, best_fit, too_long
from deltune.data.dataset import Dataset, Example
from deltune.data.order import Group, LengthGroups, Order
from deltune.data.pack import Batch, join, pad
from deltune.data.stream import Stream
from deltune.errors import DataError

BATCHING = ("packed", "grouped", "padded")  # what data.batching=auto is one of, once the model is known


class Loader:
    """Micro-batches of a data set (a Dataset, or anything with its length, indexing, `lengths` and `fingerprint`) or a stream.

    `batching` is a name of BATCHING: packed and padded have the same examples in a step, grouped has others.
    `micro_batch_tokens` takes the place of `micro_batch` where packed: bins of at most so many tokens, whole examples.
    `num_examples` ends the sequence: the last step is then short, and a rank may have no micro-batch in it. None is
    endless. A data set may be asked for any step at once; a stream only for the next one, or for the one after a
    state that was loaded. Raises DataError for an example that no bin takes.
    """

    def __init__(
        self,
        dataset: Dataset | Stream,
        *,
        micro_batch: int,
        micro_batch_tokens: int | None = None,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        batching: str = "padded",
        pad_id: int,
        num_examples: int | None = None,
    ):
        if batching not in BATCHING or (micro_batch_tokens is not None and batching != "packed"):
            raise ValueError(f"batching={batching!r}, micro_batch_tokens={micro_batch_tokens}")
        self.dataset, self.micro_batch, self.micro_batch_tokens = dataset, micro_batch, micro_batch_tokens
        self.rank, self.world_size, self.pad_id, self.num_examples = rank, world_size, pad_id, num_examples
        self.packed = batching == "packed"
        self.slices_per_step = accumulate * world_size
        self.global_batch = None if micro_batch_tokens else micro_batch * self.slices_per_step  # examples
        self._next_step = 0  # of a stream
        size = {"global_batch": self.global_batch, "micro_batch_tokens": micro_batch_tokens, "bins": self.slices_per_step if micro_batch_tokens else None}
        self._identity = {**size, "seed": seed, "shuffle": shuffle, "grouped": batching == "grouped"}
        self._order: Order | None = None
        self._by_length: LengthGroups | None = None
        self._bins: Bins | None = None
        if isinstance(dataset, Stream):
            if micro_batch_tokens is not None and num_examples is not None:
                raise ValueError("bins of a stream have no end")
            return
        groups = dataset.groups if isinstance(dataset, Dataset) else [Group("", 0, len(dataset))]
        self._order = Order(groups, seed=seed, shuffle=shuffle)
        if self.global_batch and batching == "grouped":
            self._by_length = LengthGroups(self._order, dataset.lengths, global_batch=self.global_batch, num_examples=num_examples)
        if micro_batch_tokens is not None:
            longest = int(np.argmax(dataset.lengths))
            if dataset.lengths[longest] > micro_batch_tokens:
                raise too_long(int(dataset.lengths[longest]), micro_batch_tokens, dataset[longest].row)
            self._bins = self._bins_until(num_examples)

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
        if self._bins is None:
            return -(-total // self.global_batch)
        bins = self._bins if total == self.num_examples else self._bins_until(total)
        return -(-bins.count() // self.slices_per_step)

    def epochs_after(self, num_steps: int) -> float | None:
        """Epochs that are done after so many steps; None for a stream."""
        if self._order is None:
            return None
        if self._bins is None:
            visited = num_steps * self.global_batch
        else:
            visited = self._bins.num_examples_before(num_steps * self.slices_per_step)
        if self.num_examples is not None:
            visited = min(visited, self.num_examples)
        return visited / self._order.num_per_epoch

    def step(self, i: int) -> list[Batch]:
        """This rank's micro-batches of step i, 0 being the first. Empty past the end, or where the last step gives
        this rank nothing."""
        if isinstance(self.dataset, Stream):
            if i != self._next_step:
                raise ValueError(f"a stream gives step {self._next_step} next, not step {i}")
            chosen = self._of_stream(self.dataset, i)
            self._next_step += 1
        else:
            chosen = [[self.dataset[int(j)] for j in indices] for indices in self._indices(i)]
        return [batch(examples, packed=self.packed, pad_id=self.pad_id) for examples in chosen]

    def _indices(self, i: int) -> list[np.ndarray]:
        """Of the examples of each of this rank's micro-batches."""
        if self._bins:
            n = self.slices_per_step
            return self._bins[i * n : (i + 1) * n][self.rank :: self.world_size]
        if self._by_length:
            return self._mine(self._by_length.batch(i))
        first, size = self._positions(i)
        return self._mine(self._order.at(np.arange(first, first + size, dtype=np.int64)))

    def _of_stream(self, stream: Stream, i: int) -> list[list[Example]]:
        # all ranks read all rows: which of them are examples only encoding tells
        if self.micro_batch_tokens is not None:
            return stream.take_bins(self.slices_per_step, self.micro_batch_tokens)[self.rank :: self.world_size]
        return self._mine(stream.take(self._positions(i)[1]))

    def _mine(self, examples: Any) -> list[Any]:
        """This rank's slices of all examples of a step."""
        starts = range(self.rank * self.micro_batch, len(examples), self.micro_batch * self.world_size)
        return [examples[start : start + self.micro_batch] for start in starts]

    def _positions(self, i: int) -> tuple[int, int]:
        """(first, number) of the examples of step i over all ranks."""
        first = i * self.global_batch
        if self.num_examples is None:
            return first, self.global_batch
        return first, max(0, min(self.global_batch, self.num_examples - first))

    def _bins_until(self, num_examples: int | None) -> Bins:
        return Bins(
            self._order, self.dataset.lengths, capacity=self.micro_batch_tokens, per_step=self.slices_per_step,
            num_examples=num_examples,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values: the identity of the data and order, and a stream's place."""
        body: dict[str, Any] = {**self._identity, "fingerprint": self.dataset.fingerprint}
        if isinstance(self.dataset, Stream):
            body |= {"next_step": self._next_step, "stream": self.dataset.state()}
        return body

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken. DataError if data, order or global batch are others than its own: steps would
        then not be the ones that were counted."""
        names = {
            "global_batch": "examples per step (micro_batch x accumulate x processes)", "fingerprint": "training data",
            "micro_batch_tokens": "train.micro_batch_tokens", "bins": "bins per step (accumulate x processes)",
            "grouped": "data.batching=grouped",
        }  # fmt: skip
        for name, value in {**self._identity, "fingerprint": self.dataset.fingerprint}.items():
            if state.get(name) != value:
                shown = "" if name == "fingerprint" else f": {state.get(name)} then, {value} now"
                raise DataError(f"cannot resume: {names.get(name, 'data.' + name)} changed since the checkpoint{shown}")
        if isinstance(self.dataset, Stream):
            self.dataset.load_state(state["stream"])
            self._next_step = state["next_step"]


def batch(examples: Sequence[Example], *, packed: bool, pad_id: int) -> Batch:
    """Joined into one row, or padded."""
    return join(examples) if packed else pad(examples, pad_id)


def eval_batches(
    dataset: Dataset, *, micro_batch: int, micro_batch_tokens: int | None = None, packed: bool = False, rank: int = 0,
    world_size: int = 1, pad_id: int,
) -> Iterator[Batch]:
    """Every example exactly once over all ranks, longest first, so that a batch too large for memory fails at once; with
    `micro_batch_tokens` in bins. Ranks may differ by one batch."""
    if micro_batch_tokens is not None:
        groups = best_fit(dataset.lengths, micro_batch_tokens)
    else:
        order = np.argsort(-dataset.lengths.astype(np.int64), kind="stable")
        groups = [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]
    for indices in groups[rank::world_size]:
        yield batch([dataset[int(j)] for j in indices], packed=packed, pad_id=pad_id)
