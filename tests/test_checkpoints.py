"""Checkpoints: whole or refused, rotation keeps two good ones, and a resumed run is the uninterrupted one bit for bit."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch

from deltune.errors import CheckpointError, Interrupted
from deltune.training import randomness, storage
from deltune.training.callbacks import Callback
from deltune.training.checkpoints import CheckpointStore
from deltune.training.lock import FolderLock
from tests.synthetic import make_loop
from tests.tiny import tiny_model


class Curve(Callback):
    """Every step's loss and gradient norm as float hex."""

    def __init__(self):
        self.values: dict[int, tuple[str, str]] = {}
        self.saved: list[int] = []

    def on_step(self, record):
        self.values[record.step] = (record.loss.hex(), record.grad_norm.hex())

    def on_save(self, step, path):
        self.saved.append(step)


def dropout_model():
    """A tiny model whose steps draw random numbers, so that the generator's state matters."""
    return tiny_model(attention_dropout=0.2)


def weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def run(folder, steps=12, every=2, stop_at=None, **settings):
    """(curve, weights' hash, loop) of a run in `folder`, resumed if there is something to resume."""
    model, curve = dropout_model(), Curve()
    randomness.seed_all(7)
    loop = make_loop(
        model, steps=steps, every=every, folder=folder, shuffle=True, callbacks=[curve], **settings
    )
    complaints = loop.resume()
    if stop_at is not None:
        loop.info = type(loop.info)(**{**vars(loop.info), "num_steps": stop_at})
    loop.run()
    return curve, weights_hash(model), loop, complaints


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    curve, final, loop, _ = run(tmp_path_factory.mktemp("straight"))
    return curve.values, final, loop.progress.loss_chain


@pytest.mark.parametrize("stop_at", [1, 2, 5, 11])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(straight, tmp_path, stop_at):
    first, *_ = run(tmp_path, stop_at=stop_at)
    second, final, loop, complaints = run(tmp_path)
    assert complaints == []
    assert {**first.values, **second.values} == straight[0]
    assert (final, loop.progress.loss_chain) == straight[1:]
    assert min(second.values) == stop_at + 1


def test_without_the_generators_state_the_resumed_run_would_differ(straight, tmp_path, monkeypatch):
    run(tmp_path, stop_at=5)
    monkeypatch.setattr(randomness, "restore", lambda tensors, plain: None)
    second, *_ = run(tmp_path)
    assert second.values != {k: v for k, v in straight[0].items() if k > 5}


@pytest.mark.parametrize("file", ["trainable.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"])
def test_any_damage_is_noticed_and_the_run_falls_back(straight, tmp_path, file):
    run(tmp_path, stop_at=6)
    victim = tmp_path / "checkpoints" / "step-00000006" / file
    original = victim.read_bytes()
    chance = random.Random(file)
    for _ in range(20):
        data = bytearray(original)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        victim.write_bytes(data)
        complaint = CheckpointStore(tmp_path / "checkpoints", 3).complaint(6)
        assert complaint and file in complaint
    victim.write_bytes(original[: len(original) // 2])
    second, final, loop, complaints = run(tmp_path)
    assert len(complaints) == 1 and file in complaints[0]
    assert min(second.values) == 5  # from step 4
    assert (final, loop.progress.loss_chain) == straight[1:]
    assert (tmp_path / "checkpoints" / "step-00000006.damaged-1").exists()


def test_missing_and_foreign_files_are_noticed(tmp_path):
    run(tmp_path, steps=2, every=2)
    folder = tmp_path / "checkpoints" / "step-00000002"
    (folder / "extra.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"extra\.txt"):
        storage.verify(folder)
    (folder / "extra.txt").unlink()
    (folder / "rng.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rng\.safetensors: missing"):
        storage.verify(folder)


def test_files_swapped_between_checkpoints_are_noticed(tmp_path):
    run(tmp_path, steps=4, every=2)
    a, b = (tmp_path / "checkpoints" / f"step-0000000{n}" for n in (2, 4))
    (b / "trainable.safetensors").write_bytes((a / "trainable.safetensors").read_bytes())
    assert CheckpointStore(tmp_path / "checkpoints", 3).complaint(4)
    os.rename(a, tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / "checkpoints" / "step-00000009")  # a whole folder under another's name
    with pytest.raises(CheckpointError, match="another step"):
        CheckpointStore(tmp_path / "checkpoints", 3).load(9)


def test_rotation_keeps_the_limit_the_best_and_two_good_ones(tmp_path):
    values = iter([1.0, 5.0, 4.0, 3.0, 2.0, 2.0, 2.0])
    from deltune.training.config import EvalConfig

    *_, loop, _ = run(tmp_path, steps=12, every=2, eval=EvalConfig(every=2), evaluate=lambda: {"loss": next(values)}, limit=2)
    assert loop.saver.store.steps() == [2, 10, 12]  # the best is step 2

    store = CheckpointStore(tmp_path / "checkpoints", 2)
    (store.path(12) / "rng.safetensors").write_bytes(b"")
    store.rotate(best_step=None)
    assert store.steps() == [2, 10, 12]  # one of the newest two is damaged: nothing is removed


def test_leftovers_of_a_killed_save_are_removed_and_nothing_else(tmp_path):
    run(tmp_path, steps=4, every=2)
    folder = tmp_path / "checkpoints"
    for name in (".step-00000006.tmp", ".step-00000002.trash"):
        (folder / name).mkdir()
        (folder / name / "trainable.safetensors").write_text("half")
    (folder / "notes").mkdir()
    storage.clear_leftovers(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["notes", "step-00000002", "step-00000004"]


@pytest.mark.parametrize("at", range(1, 9))
def test_a_full_disk_leaves_the_older_checkpoint_and_one_message(straight, tmp_path, monkeypatch, at):
    run(tmp_path, stop_at=4)
    count = 0
    real = os.fsync

    def fsync(handle):
        nonlocal count
        count += 1
        if count == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"no space left.*bytes free.*the same command goes on"):
        run(tmp_path, stop_at=6)
    monkeypatch.undo()
    store = CheckpointStore(tmp_path / "checkpoints", 3)
    assert store.complaint(4) is None
    assert all(store.complaint(step) is None for step in store.steps())
    _, final, loop, _ = run(tmp_path)
    assert (final, loop.progress.loss_chain) == straight[1:]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(straight, tmp_path, signum):
    before = signal.getsignal(signum)  # a process started in the background ignores SIGINT
    signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)

    class Killer(Callback):
        def on_step(self, record):
            if record.step == 7:
                os.kill(os.getpid(), signum)

    model = dropout_model()
    randomness.seed_all(7)
    loop = make_loop(model, steps=12, every=100, folder=tmp_path, shuffle=True, callbacks=[Killer()])
    with pytest.raises(Interrupted) as stopped:
        loop.run()
    assert stopped.value.exit_code == 128 + signum
    assert loop.saver.store.steps() == [7]
    assert signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler)
    signal.signal(signum, before)
    curve, final, loop, _ = run(tmp_path)
    assert min(curve.values) == 8
    assert (final, loop.progress.loss_chain) == straight[1:]


def test_one_run_owns_a_folder_and_a_dead_owners_lock_is_free(tmp_path):
    code = (
        "import sys,time; from pathlib import Path; from deltune.training.lock import FolderLock\n"
        "FolderLock(Path(sys.argv[1])).acquire(); print('locked', flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "locked\n"
    with pytest.raises(CheckpointError, match=f'another run.*"pid": {owner.pid}'):
        FolderLock(tmp_path).acquire()
    owner.kill()
    owner.wait()
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_generators_come_back_to_the_bit():
    import numpy

    randomness.seed_all(3)
    tensors, plain = randomness.capture()
    plain = json.loads(json.dumps(plain))

    def draws():
        return random.random(), random.gauss(0, 1), numpy.random.rand(3).tolist(), numpy.random.randn(1).tolist(), torch.rand(4).tolist()

    first = draws()
    assert draws() != first
    randomness.restore(tensors, plain)
    assert draws() == first


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run(tmp_path, steps=2, every=2)
    loop = make_loop(tiny_model(hidden_size=48), steps=4, folder=tmp_path)
    with pytest.raises(CheckpointError, match="this model's"):
        loop.resume()
    loop = make_loop(tiny_model(num_hidden_layers=1), steps=4, folder=tmp_path)
    with pytest.raises(CheckpointError, match="left over"):
        loop.resume()
