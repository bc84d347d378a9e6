"""Batches made one step ahead, in a thread, while the step before is trained on. What a checkpoint sees is the step that is used.

A loader is told and asked from one thread at a time: either the job of the next step runs, or the caller has waited for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple


class _Made(NamedTuple):
    batches: Sequence[Any]
    state: dict[str, Any]  # of the loader right after this step
    epochs: float | None  # that are done after it


class Ahead:
    """Stands in a loader's place. `pin` puts batches into page-locked memory, from where a GPU fetches them by itself."""

    def __init__(self, loader: Any, num_steps: int, *, pin: bool = False):
        self.loader, self.num_steps, self.pin = loader, num_steps, pin
        self._used: _Made | None = None
        self._next: tuple[int, Future[_Made]] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def step(self, i: int) -> Sequence[Any]:
        """As the loader's; a fault of the data is raised at the step that it belongs to."""
        if self._next is not None and self._next[0] == i:
            job, self._next = self._next[1], None
            self._used = job.result()
        else:
            self._drop()
            self._used = self._make(i)
        if i + 1 < self.num_steps:
            self._next = i + 1, self._worker.submit(self._make, i + 1)
        return self._used.batches

    def _make(self, i: int) -> _Made:
        batches = self.loader.step(i)
        if self.pin:
            batches = [batch.pinned() for batch in batches]
        return _Made(batches, self.loader.state(), self.loader.epochs_after(i + 1))

    def epochs_done(self) -> float | None:
        """Epochs after the last step that was used; None for a stream."""
        return None if self._used is None else self._used.epochs

    def state(self) -> dict[str, Any]:
        """The loader's after the last step that was used, whatever has been made since."""
        return self.loader.state() if self._used is None else self._used.state

    def load_state(self, state: dict[str, Any]) -> None:
        self._drop()
        self._used = None
        self.loader.load_state(state)

    def _drop(self) -> None:
        """Wait for the job that runs, and forget what it made or raised."""
        if self._next is not None:
            self._next[1].exception()
            self._next = None

    def close(self) -> None:
        self._drop()
        self._worker.shutdown()
