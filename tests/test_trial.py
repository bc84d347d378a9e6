"""A run is told from a trial of some of its blocks, and compares itself with what was told. No clock is trusted here."""

from __future__ import annotations

import json
import sys

import pytest

import deltune
from deltune.commands import estimate, foretold, plan, trial
from deltune.data.dataset import Example
from deltune.data.pack import join
from deltune.engines import resident
from deltune.models.cost import Speed
from deltune.settings import run_from
from tests.encoded import write_rows
from tests.test_plan import rows, without_weights
from tests.tiny import refuse_weight_files


@pytest.fixture(autouse=True)
def known_speed(monkeypatch):
    import torch

    monkeypatch.setattr(estimate, "device_speed", lambda *_: Speed({torch.float32: 1e11, torch.bfloat16: 1e11}, 1e10, 1e-5, False, "given by the test"))


@pytest.fixture
def stated(tmp_path):
    return {
        "name": "r", "output": str(tmp_path / "runs"), "model.path": without_weights(tmp_path / "shapes", num_hidden_layers=6),
        "model.start": "random", "data.train": [write_rows(tmp_path / "rows.jsonl", rows(60))], "data.max_length": 64, "train.steps": 8,
        "train.epochs": None, "train.micro_batch": 3, "train.accumulate": 2, "adapter.method": "lora", "adapter.rank": 4,
        "eval.samples": 0, "log.progress": "off", "log.report": False, "log.sinks": [],
    }  # fmt: skip


@pytest.fixture
def here(monkeypatch):
    """Trials in this process. What they were asked."""
    asked = []

    def tried(one):
        asked.append(one)
        return trial.rehearse(one)

    monkeypatch.setattr(trial, "_in_a_process", tried)
    return asked


def measured(stated, *, seconds, **changes):
    run = run_from(stated | changes)
    found = plan.make(run)
    return trial.measure(run, found.model, found.found, recompute=found.recompute, num_steps=found.num_steps, seconds=seconds, need=1e6, free=1e12)


# -- depths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("whole", "recompute", "seconds", "depths"), [
    (24, "none", 18.0, (24,)), (24, "none", 57.0, (1, 8)), (24, "none", 100.0, (1, 4)), (24, "full", 700.0, (1, 2)),
    (24, "selective", 200.0, (2, 4)), (2, "none", 50.0, (2,)), (6, "none", 25.0, (1, 4)),
])  # fmt: skip
def test_a_model_is_tried_whole_where_that_is_quick_else_at_two_depths(whole, recompute, seconds, depths):
    assert trial.depths_for(whole, recompute, seconds) == depths


def test_steps_that_take_minutes_are_not_begun():
    with pytest.raises(trial.CannotTry, match="more than 60 s"):
        trial.depths_for(80, "none", 1e5)


def test_values_go_on_in_a_straight_line_and_outliers_do_not_count():
    assert trial.continued((1, 4), (2.0, 5.0), 10) == pytest.approx(11.0)
    assert trial.continued((1, 4), (5.0, 4.9), 10) == 4.9  # deeper is never less
    works, values = [1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 5.0, 70.0, 9.0, 11.0]
    assert trial.at(works, values, 6.0) == pytest.approx(13.0)
    assert trial.at([2.0, 2.0, 2.0], [1.0, 8.0, 1.5], 2.0) == 1.5


# -- trials -----------------------------------------------------------------------------------------------------


def test_two_depths_are_tried_without_a_weight_file_or_a_folder(stated, tmp_path, here, monkeypatch):
    refuse_weight_files(monkeypatch)
    found = measured(stated | {"model.start": "pretrained"}, seconds=2.0)
    assert found.depths == (1, 4) and [one.depth for one in here] == [1, 4] and found.whole == 6
    assert found.step > 0 and not (tmp_path / "runs").exists()
    if sys.platform == "linux":
        assert found.peak > 1e7  # a process with torch
    assert "1 and 4 of 6 blocks" in found.told()


def test_a_step_has_as_many_micro_batches_as_the_run_has(stated, here, monkeypatch):
    """With a clock that counts micro-batches a step takes as many as it accumulates, however many are tried at once."""
    from deltune.training import loss

    calls = [0]
    plain = loss.LossStep.__call__

    def counted(self, model, batch):
        calls[0] += 1
        return plain(self, model, batch)

    monkeypatch.setattr(loss.LossStep, "__call__", counted)
    monkeypatch.setattr(trial.time, "perf_counter", lambda: float(calls[0]))
    found = measured(stated, seconds=0.01, **{"train.accumulate": 9, "train.micro_batch": 1, "train.steps": 4})
    assert found.step == pytest.approx(9.0)


def test_memory_grows_by_what_the_middle_ones_of_new_shapes_added():
    watch = trial._Watch(lambda: 0.0)
    watch.resident = [100, 110, 130, 900, 910, 911]  # one step took more for another reason: it was a large one
    assert watch.growth({0: 1, 1: 2, 2: 1, 3: 1}) == pytest.approx(10.0)
    assert watch.growth({}) == 0.0


def test_blocks_that_differ_do_not_tell_of_the_rest_but_a_small_model_is_tried_whole(stated, here):
    some = {"adapter.targets": r".*layers\.[0-2]\..*q_proj"}
    with pytest.raises(trial.CannotTry, match="not all alike"):
        measured(stated, seconds=2.0, **some)
    assert measured(stated, seconds=0.01, **some).depths == (6,)


def test_a_fault_in_the_process_is_a_reason(monkeypatch, stated):
    monkeypatch.setattr(trial, "__name__", "deltune.nowhere")
    with pytest.raises(trial.CannotTry, match=r"No module named deltune\.nowhere"):
        measured(stated, seconds=0.01)


class Loader:
    """Steps of packed micro-batches with so many tokens."""

    def __init__(self, *steps):
        self.steps = steps

    def step(self, i):
        return [join([Example([3] * tokens, [3] * tokens, "row")]) for tokens in self.steps[i]]


def chosen(*steps, total=None, rounds=True):
    return trial._Chosen(Loader(*steps), total or len(steps), rounds=rounds)


def test_new_shapes_are_made_before_they_are_timed_and_the_largest_comes_first_and_last():
    found = chosen([100], [700], [200], [300], [400], [500])
    tokens = [batches[0].num_tokens for batches in found.steps]
    assert tokens == [700, 400, 100, 200, 500, 400, 100, 700, 200, 500, 700]


def test_steps_of_one_shape_are_timed_only():
    found = chosen(*[[256]] * 9)
    assert [batches[0].num_tokens for batches in found.steps] == [256] * (trial.TIMED + 2) and not found.first
    assert found.share_of_new() == 0.0 and found.num_unmet == 0


def test_shapes_that_kernels_round_to_one_number_are_one():
    assert chosen([100], [641], [650], [672]).share_of_new() == pytest.approx(1 / 3)  # after the first step
    assert chosen([100], [641], [650], [672], rounds=False).share_of_new() == 1.0


def test_kernels_of_shapes_met_long_ago_are_made_again():
    lengths = [[32 * (i + 1)] for i in range(trial.REMEMBERED + 1)]
    assert chosen(*lengths, *lengths, rounds=False).share_of_new() == 1.0
    assert chosen(*lengths[1:], *lengths[1:], rounds=False).share_of_new() == pytest.approx(19 / 39)


def test_steps_that_were_not_looked_at_are_as_the_later_ones_of_those_that_were():
    lengths = [[32 * (i + 1)] for i in range(10)] * 20
    assert chosen(*lengths, total=20_000, rounds=False).share_of_new() == pytest.approx(9 / 199 * 200 / 20_000)


# -- a run and its plan -----------------------------------------------------------------------------------------


def planned(stated):
    run = run_from(stated)
    found = plan.make(run)
    object.__setattr__(found, "trial", trial.Trial(0.5, 4e8, (6,), 6, 1.0, 7))
    foretold.write(run, found)


def test_a_planned_run_tells_its_own_errors(stated, tmp_path):
    planned(stated)
    deltune.train(stated)
    facts = json.loads((tmp_path / "runs" / "r" / "completed.json").read_text())["foretold"]
    assert facts["seconds_per_step"]["foretold"] == 0.5 and facts["peak_memory_bytes"]["foretold"] == 4e8
    assert all(one["error"] == pytest.approx(one["foretold"] / one["found"] - 1) for one in facts.values())
    lines = (tmp_path / "runs" / "r" / "metrics.jsonl").read_text()
    assert "as planned? a step" in lines and "foretold 400 MB" in lines


@pytest.mark.parametrize("changes", [{"train.micro_batch": 2}, {"adapter.rank": 8}])
def test_a_run_of_other_settings_was_not_planned(stated, tmp_path, changes):
    planned(stated)
    deltune.train(stated | changes)
    assert json.loads((tmp_path / "runs" / "r" / "completed.json").read_text())["foretold"] == {}


def test_a_peak_is_counted_anew():
    block = bytearray(200_000_000)
    high = resident.peak()
    del block
    if not resident.restart_peak():
        pytest.skip("this system does not count anew")
    assert resident.peak() < high - 150_000_000
