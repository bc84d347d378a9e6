"""A small share of the kill harness (tests/faults, in full by `make faults`), and each fault that it has found."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from deltune.errors import CheckpointError, NumericsError
from deltune.training import storage
from deltune.training.checkpoints import CheckpointStore, Snapshot
from deltune.training.lock import FolderLock
from tests.faults import contention, damage, disk, kills, numbers, power, stops
from tests.faults.lab import Lab, Row


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("faults"))


def hold(row: Row, trials: int) -> None:
    """At least so many trials, and not one of them failed."""
    assert not row.failures, row.failures
    assert row.trials >= trials
    assert row.identical + row.refused == row.trials


# -- a small share of the harness -------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_a_run_killed_at_random_moments_ends_bit_for_bit_like_another(lab, variant):
    hold(kills.random_kills(lab, 5, variant, variant=variant), 5)


def one_of_each_kind():
    """One call of each kind on each sort of file, in the phases that differ, rather than all."""
    seen = set()

    def only(number, kind, path, phase):
        name = re.sub(r"\d+|trainable|optimizer|rng", "", path)
        # after one call is before the next, and a sync changes nothing that a kill can show
        if phase == "after" or kind == "fsync" or (kind, name, phase) in seen:
            return False
        seen.add((kind, name, phase))
        return True

    return only


def test_a_run_killed_at_any_call_of_a_save_ends_like_another(lab):
    hold(kills.kill_at_every_call(lab, "a run", kills.a_fresh_run, only=one_of_each_kind()), 25)


def test_a_power_cut_leaves_what_was_promised(lab):
    for model in power.MODELS:
        hold(power.power_cut(lab, model, stride=36), 4)


def test_damaged_files_are_noticed_and_passed_over(lab):
    hold(damage.in_place(lab, flips=8, cuts=3), 5 * 14)
    hold(damage.through_a_run(lab, ["a tensor zeroed", "a file in the folder's place", "a file that cannot be read"]), 3)
    hold(damage.nothing_whole(lab), 2)


def test_a_file_that_does_not_fit_leaves_a_message_and_the_older_checkpoint(lab):
    hold(disk.small_files(lab, [2, 700]), 2)


def test_signals_save_and_stop(lab):
    hold(stops.one_signal(lab, 3), 3)
    hold(stops.second_signal(lab, 1), 1)


def test_one_of_several_starts_has_the_folder(lab):
    hold(contention.starters(lab, 2), 2)
    hold(contention.stale_lock(lab, 1), 1)
    hold(contention.lock_outlives_no_child(lab), 1)


def test_numbers_that_break_are_named_and_never_saved(lab):
    for row in numbers.poisoned(lab, (8,), ("full",)):
        hold(row, 3)
    hold(numbers.huge_rate(lab, (1e39,)), 3)


# -- what it has found, each by itself --------------------------------------------------------------------------


def test_the_harness_sees_every_call_that_changes_the_folder(lab):
    """The calls that it lists make the folder what it is: made on paper, they give the same names."""
    task = kills.a_fresh_run(lab)
    calls = kills.calls_of(lab, lambda lab: task)
    present = set()
    for kind, path, _ in calls:
        if kind in ("open", "save_file", "mkdir", "rename", "replace"):
            present.add(path)
        if kind in ("unlink", "rmdir"):
            present.discard(path)
    on_disk = {str(p.relative_to(task.path.parent)) for p in task.path.parent.rglob("*")}
    assert on_disk <= present | {f"{folder}/{name}" for folder in on_disk for name in damage.FILES}


def test_a_checkpoint_damaged_under_a_living_run_is_written_anew(tmp_path):
    """Its own earlier word that the files were good must not count once they have been found bad."""
    store = CheckpointStore(tmp_path, 3)
    snapshots = [Snapshot(step, {part: {"x": torch.ones(3) * step} for part in ("trainable", "optimizer", "rng")}, {}) for step in (1, 2)]
    for snapshot in snapshots:
        store.save(snapshot, best_step=None)
    file = store.path(2) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    found, complaints = store.newest()
    assert found.step == 1 and len(complaints) == 1
    store.save(snapshots[1], best_step=None)
    assert CheckpointStore(tmp_path, 3).load(2).tensors["optimizer"]["x"].tolist() == [2.0, 2.0, 2.0]


def test_half_written_files_of_a_dead_process_go_and_those_of_a_living_one_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        f".config.yaml.{dead.pid}.tmp": False, f".metrics.jsonl.{os.getpid()}.tmp": False,
        f".answers.jsonl.{os.getppid()}.tmp": True, ".notes.tmp": True, "config.yaml": True,
    }
    (tmp_path / "adapter").mkdir()
    for name in names:
        (tmp_path / name).write_text("x")
    (tmp_path / "adapter" / f".adapter_model.safetensors.{dead.pid}.tmp").write_text("x")
    (tmp_path / "adapter" / ".tmpq8XwZ0").write_text("x")
    with FolderLock(tmp_path):
        pass
    assert {name: (tmp_path / name).exists() for name in names} == names
    assert not list((tmp_path / "adapter").iterdir())


def test_a_folder_that_cannot_be_had_is_a_message(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="no run can be kept here"):
        FolderLock(tmp_path / "file" / "run").acquire()


def test_new_folders_are_synced_into_those_above_them(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(storage.weights, "sync", lambda path: synced.append(path))
    storage.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]


def test_ranks_that_are_asked_by_different_signals_leave_with_one(monkeypatch):
    from deltune import dist
    from tests.synthetic import make_loop
    from tests.tiny import tiny_model

    loop = make_loop(tiny_model(), steps=1)
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "any_rank", lambda flag, device: True)
    monkeypatch.setattr(dist, "gather_objects", lambda value: [value, int(signal.SIGTERM)])

    class Asked:
        signum = int(signal.SIGINT)

    request = Asked()
    assert loop._asked_to_stop(request)
    assert request.signum == signal.SIGTERM


def test_a_step_that_makes_weights_infinite_is_not_saved(tmp_path):
    from tests.synthetic import make_loop
    from tests.tiny import tiny_model

    model = tiny_model()
    loop = make_loop(model, steps=4, every=1, folder=tmp_path)
    step = loop.engine.step

    def overshoot(optimizer):
        step(optimizer)
        if loop.progress.step == 2:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = float("inf")

    loop.engine.step = overshoot
    with pytest.raises(NumericsError, match=r"step 3: its update made the weight lm_head\.weight infinite"):
        loop.run()
    assert loop.saver.store.steps() == [1, 2]


class Tape:
    """A loader that can only go on from where it is, as a stream does."""

    def __init__(self, loader):
        self.loader, self.place = loader, 0
        self.epochs_after = loader.epochs_after

    def step(self, i):
        assert i == self.place, f"step {i} asked of a tape at {self.place}"
        self.place += 1
        return self.loader.step(i)

    def state(self):
        return {"place": self.place}

    def load_state(self, state):
        self.place = state["place"]


def test_after_a_number_broke_a_stream_goes_on_at_the_step_that_was_not_made(tmp_path):
    from tests.synthetic import make_loop
    from tests.tiny import tiny_model

    def loop_over_a_tape():
        loop = make_loop(tiny_model(), steps=5, every=100, folder=tmp_path)
        loop.loader.loader = Tape(loop.loader.loader)
        return loop

    loop = loop_over_a_tape()
    inner = loop.forward_step
    loop.forward_step = lambda model, batch: inner(model, batch) * (float("nan") if loop.progress.step == 2 else 1.0)
    with pytest.raises(NumericsError, match="step 3:"):
        loop.run()
    again = loop_over_a_tape()
    assert again.resume() == []
    assert (again.progress.step, again.loader.loader.place) == (2, 2)
    assert again.run() == "completed"


def test_the_second_signal_leaves_even_when_it_comes_in_the_middle_of_a_line(monkeypatch, capfd):
    from deltune.training import signals

    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

        flush = write

    codes = []
    monkeypatch.setattr(sys, "stderr", Busy())
    def leave(code):  # as os._exit, it does not come back: what follows would leave a timer behind that ends this process
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(signals.os, "_exit", leave)
    request = signals.StopRequest(20.0)
    request.signum = int(signal.SIGTERM)
    with pytest.raises(SystemExit):
        request._handle(signal.SIGINT, None)
    assert codes[0] == 128 + signal.SIGTERM
    assert "asked again" in capfd.readouterr().err
