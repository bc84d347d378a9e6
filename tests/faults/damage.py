"""Files that rot, shrink, vanish or change places: noticed before any update, and the run falls back to the one before."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deltune.errors import CheckpointError
from deltune.training.checkpoints import CheckpointStore, Snapshot
from tests.faults.lab import Evidence, Lab, Row, said

FILES = ("trainable.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json")
SETTINGS = {"steps": 8, "every": 3, "eval_every": 100, "limit": 3, "accumulate": 1}
GOOD, BAD = "step-00000003", "step-00000006"


def stopped_run(lab: Lab) -> Any:
    """A run with checkpoints of steps 3 and 6 that was killed before its end."""
    task = lab.task(**SETTINGS)
    child = lab.start(replace(task, step_seconds=0.2))
    from tests.faults.lab import wait_for_step

    assert wait_for_step(child, task.path, 7) and child.kill(), said(task)
    assert sorted(p.name for p in (task.path / "checkpoints").iterdir()) == [GOOD, BAD]
    return task


def equal(a: Snapshot, b: Snapshot) -> bool:
    """The same state, bit for bit."""
    same = a.step == b.step and a.state == b.state and a.tensors.keys() == b.tensors.keys()
    return same and all(
        a.tensors[part].keys() == b.tensors[part].keys()
        and all(torch.equal(a.tensors[part][n].view(torch.uint8), t.view(torch.uint8)) for n, t in b.tensors[part].items() if t.ndim)
        and all(torch.equal(a.tensors[part][n], t) for n, t in b.tensors[part].items() if not t.ndim)
        for part in a.tensors
    )


def verdict(folder: Path, name: str, good: Snapshot, bad: Snapshot) -> str | None:
    """What the store makes of a folder whose newest checkpoint has been damaged in the file `name`."""
    try:
        found, complaints = CheckpointStore(folder, 3).newest()
    except CheckpointError as error:
        return f"refused as a whole: {error}"
    if found is None:
        return "fell back to nothing"
    if found.step == bad.step:
        return None if equal(found, bad) else "loaded other values than were saved"
    if len(complaints) != 1 or name not in complaints[0]:
        return f"the message does not name {name}: {complaints}"
    return None if equal(found, good) else "fell back to other values than were saved"


def mutations(name: str, original: bytes, flips: int, cuts: int) -> Iterator[tuple[str, bytes | None]]:
    """(what was done, the file's new content or None for none)."""
    chance = random.Random(name)
    for _ in range(flips):
        data = bytearray(original)
        place, bit = chance.randrange(len(data)), chance.randrange(8)
        data[place] ^= 1 << bit
        yield f"bit {bit} of byte {place} flipped", bytes(data)
    for _ in range(cuts):
        size = chance.randrange(len(original))
        yield f"cut to {size} bytes", original[:size]
    yield "one byte more", original + b"\0"
    yield "zeros", bytes(len(original))
    yield "deleted", None


def in_place(lab: Lab, flips: int, cuts: int) -> Row:
    """Every file of the newest checkpoint, damaged in many ways, against the store itself."""
    row = Row("a checkpoint's file with a bit flipped, cut, longer, zeroed or deleted")
    task = stopped_run(lab)
    folder = task.path / "checkpoints"
    store = CheckpointStore(folder, 3)
    good, bad = store.load(3), store.load(6)
    for name in FILES:
        file = folder / BAD / name
        original = file.read_bytes()
        for what, data in mutations(name, original, flips, cuts):
            file.unlink()
            if data is not None:
                file.write_bytes(data)
            problem = verdict(folder, name, good, bad)
            row.count(problem and f"{name}, {what}: {problem}")
            file.write_bytes(original)
    row.note = f"{flips} flips and {cuts} cuts a file, {len(FILES)} files"
    return row


def zero_a_tensor(folder: Path) -> None:
    """A valid file of the same size, with one tensor's values gone."""
    from safetensors.torch import load_file, save_file

    file = folder / BAD / "trainable.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[3]
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, file, metadata={"format": "pt"})


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / BAD / "optimizer.safetensors"
    tensors = load_file(file)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, file, metadata={"format": "pt"})


def swap_files(folder: Path) -> None:
    """Both checkpoints lose: each then holds a file of the other's."""
    a, b, aside = folder / GOOD / "rng.safetensors", folder / BAD / "rng.safetensors", folder / "aside"
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def one_file_of_the_older(folder: Path) -> None:
    shutil.copyfile(folder / GOOD / "optimizer.safetensors", folder / BAD / "optimizer.safetensors")


def older_under_the_newers_name(folder: Path) -> None:
    shutil.rmtree(folder / BAD)
    shutil.copytree(folder / GOOD, folder / BAD)


def empty_the_folder(folder: Path) -> None:
    for file in (folder / BAD).iterdir():
        file.unlink()


def a_file_in_its_place(folder: Path) -> None:
    shutil.rmtree(folder / BAD)
    (folder / BAD).write_text("not a folder")


def a_foreign_file(folder: Path) -> None:
    (folder / BAD / "extra.safetensors").write_bytes(b"x")


def a_file_that_cannot_be_read(folder: Path) -> None:
    """A folder of that name fails to be read as a bad sector does, also for root."""
    (folder / BAD / "state.json").unlink()
    (folder / BAD / "state.json").mkdir()


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / BAD / name).unlink()


def flip(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        data = bytearray((folder / BAD / name).read_bytes())
        data[len(data) // 2] ^= 4
        (folder / BAD / name).write_bytes(data)

    return act


def cut(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        data = (folder / BAD / name).read_bytes()
        (folder / BAD / name).write_bytes(data[: len(data) // 2])

    return act


FALLS_BACK: dict[str, Callable[[Path], None]] = {
    **{f"{name} deleted": delete(name) for name in FILES},
    **{f"{name} flipped": flip(name) for name in FILES},
    **{f"{name} cut": cut(name) for name in FILES},
    "a tensor zeroed": zero_a_tensor,
    "a tensor dropped": drop_a_tensor,
    "one file of the older checkpoint": one_file_of_the_older,
    "the older checkpoint under the newer's name": older_under_the_newers_name,
    "all files deleted": empty_the_folder,
    "a file in the folder's place": a_file_in_its_place,
    "a foreign file": a_foreign_file,
    "a file that cannot be read": a_file_that_cannot_be_read,
}


def through_a_run(lab: Lab, names: list[str]) -> Row:
    """The same by the way that users meet it: the run goes on from the older checkpoint and says so."""
    row = Row("a damaged newest checkpoint, through a run", listed=True)
    reference = lab.reference(lab.task(**SETTINGS))
    for name in names:
        task = stopped_run(lab)
        FALLS_BACK[name](task.path / "checkpoints")
        problem = lab.to_the_end(task, reference)
        silent = "a file in" not in name and "event at step 3: passed over a damaged checkpoint" not in said(task)
        if problem is None and silent:
            problem = f"nothing was said: {said(task)[-800:]}"
        row.count(problem and f"{name}: {problem}")
    return row


def nothing_whole(lab: Lab) -> Row:
    """Both checkpoints damaged: starting over in silence would throw the work away, so it is refused, and nothing moves."""
    row = Row("no checkpoint left whole", listed=True)
    for damage in (swap_files, lambda folder: (flip("state.json")(folder), cut_the_older(folder))):
        task = stopped_run(lab)
        damage(task.path / "checkpoints")
        before = contents(task.path)
        code, text = lab.run(task)
        problem = None
        if code != 2 or "Traceback" in text or GOOD not in text or BAD not in text:
            problem = f"ended with {code}: {text[-800:]}"
        elif contents(task.path) != before:
            problem = "something in the folder has changed"
        row.count(problem, refused=True)
    return row


def cut_the_older(folder: Path) -> None:
    file = folder / GOOD / "trainable.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def run(lab: Lab, scale: float) -> Iterator[Row]:
    """All rows of this file."""
    yield in_place(lab, flips=max(1, round(200 * scale)), cuts=max(1, round(50 * scale)))
    names = list(FALLS_BACK)
    yield through_a_run(lab, names[:: max(1, round(1 / scale))])
    yield nothing_whole(lab)


__all__ = ["FALLS_BACK", "Evidence", "in_place", "nothing_whole", "run", "through_a_run"]
