"""Batches made ahead: the same batches, states and faults as without, and never more steps than there are."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from deltune.data.config import DataConfig
from deltune.data.loader import Loader
from deltune.data.prepare import prepare
from deltune.errors import DataError
from deltune.training.ahead import Ahead
from tests.tiny import tiny_tokenizer


class Counting:
    """A loader whose place is the number of steps it has given."""

    def __init__(self, broken: int | None = None):
        self.place, self.broken, self.threads = 0, broken, []

    def step(self, i):
        if i == self.broken:
            raise DataError(f"row {i} is bad")
        self.threads.append(threading.current_thread())
        self.place = i + 1
        return [i]

    def state(self):
        return {"place": self.place}

    def load_state(self, state):
        self.place = state["place"]

    def epochs_after(self, num_steps):
        return num_steps / 10


def test_the_next_step_is_made_in_another_thread_and_the_last_has_none():
    loader = Counting()
    ahead = Ahead(loader, 3)
    given = []
    for i in range(3):
        assert ahead.state() == {"place": i}
        given += ahead.step(i)
        assert ahead.state() == {"place": i + 1} and ahead.epochs_done() == (i + 1) / 10
    ahead.close()
    assert given == [0, 1, 2] and loader.place == 3
    here = threading.current_thread()
    assert [thread is here for thread in loader.threads] == [True, False, False]


def test_a_fault_belongs_to_its_own_step():
    ahead = Ahead(Counting(broken=2), 5)
    assert ahead.step(0) == [0] and ahead.step(1) == [1] and ahead.state() == {"place": 2}
    with pytest.raises(DataError, match="row 2"):
        ahead.step(2)
    ahead.close()
    unused = Ahead(Counting(broken=1), 5)
    unused.step(0)
    unused.close()  # nobody asked for the step that is broken


def test_going_back_forgets_what_was_made():
    ahead = Ahead(Counting(), 9)
    assert [ahead.step(i) for i in range(4)] == [[0], [1], [2], [3]]
    ahead.load_state({"place": 1})
    assert ahead.state() == {"place": 1} and ahead.step(1) == [1] and ahead.state() == {"place": 2}
    ahead.close()


def test_a_streams_place_is_that_of_the_step_that_is_used(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {i}", "response": "x" * (i % 7 + 1)}) + "\n" for i in range(23)))
    config = DataConfig(train=[str(file)], streaming=True, stream_block=5, max_length=64)

    def loader(name):
        stream = prepare(config, tiny_tokenizer(), folder=tmp_path / name).train
        return Loader(stream, micro_batch=3, pad_id=258)

    plain, ahead = loader("plain"), Ahead(loader("ahead"), 20)
    for i in range(20):
        (expected,), (found,) = plain.step(i), ahead.step(i)
        assert found.rows == expected.rows and torch.equal(found.input_ids, expected.input_ids)
        assert ahead.state() == plain.state()
        if i == 11:
            kept = json.loads(json.dumps(ahead.state()))
        if i == 12:
            after = found.rows
    ahead.close()
    resumed = Ahead(loader("resumed"), 20)
    resumed.load_state(kept)
    assert resumed.step(12)[0].rows == after
    resumed.close()
