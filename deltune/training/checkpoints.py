"""A run's checkpoints: saved whole, found by scanning and verifying, rotated but never below two that are good.

    checkpoints/step-00000040/   trainable.safetensors  optimizer.safetensors  rng.safetensors  state.json  manifest.json
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltune import weights
from deltune.errors import CheckpointError
from deltune.training import storage

NAME = re.compile(r"step-(\d{8,})")
PARTS = ("trainable", "optimizer", "rng")


@dataclass(frozen=True)
class Snapshot:
    """All that a run needs to go on after `step`, as tensors by part and name, and plain values."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run folder. Only the process that holds the folder's lock writes."""

    def __init__(self, folder: Path, limit: int):
        self.folder = folder
        self.limit = limit
        self._verified: set[int] = set()  # read back whole by this process, so rotation need not read them again

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a folder, oldest first, whole or not."""
        if not self.folder.is_dir():
            return []
        found = (NAME.fullmatch(p.name) for p in self.folder.iterdir() if p.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def save(self, snapshot: Snapshot, *, best_step: int | None) -> Path:
        """Write one checkpoint whole, then drop those that rotation no longer keeps."""
        path = self.path(snapshot.step)
        if path.exists():
            # the same step of the same run holds the same bits; a damaged one makes room
            if self.complaint(snapshot.step) is None:
                return path
            self.set_aside(snapshot.step)

        def fill(folder: Path) -> None:
            for part in PARTS:
                weights.write_tensors(folder / f"{part}.safetensors", snapshot.tensors[part], {"format": "pt"})
            storage.write_json(folder / "state.json", snapshot.state)

        size = sum(t.numel() * t.element_size() for part in snapshot.tensors.values() for t in part.values())
        storage.make_folder(self.folder)
        storage.write_folder(path, fill, {"step": snapshot.step}, num_bytes=size)
        self._verified.add(snapshot.step)
        self.rotate(best_step)
        return path

    def load(self, step: int) -> Snapshot:
        """A verified checkpoint; CheckpointError naming the file at fault."""
        path = self.path(step)
        if storage.verify(path).get("step") != step:
            raise CheckpointError(f"{path}: holds another step than its name says")
        self._verified.add(step)
        tensors = {part: weights.read_tensors(path / f"{part}.safetensors") for part in PARTS}
        return Snapshot(step, tensors, json.loads((path / "state.json").read_text(encoding="utf-8")))

    def newest(self) -> tuple[Snapshot | None, list[str]]:
        """The newest whole checkpoint, and a message for each newer one that had to be passed over."""
        complaints = []
        for step in reversed(self.steps()):
            try:
                return self.load(step), complaints
            except CheckpointError as error:
                self._verified.discard(step)
                complaints.append(str(error))
        return None, complaints

    def complaint(self, step: int) -> str | None:
        """What is wrong with a checkpoint, None if it is whole."""
        if step in self._verified:
            return None
        try:
            storage.verify(self.path(step))
        except CheckpointError as error:
            return str(error)
        self._verified.add(step)
        return None

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint so that nothing takes it for a good one; it is not deleted."""
        path = self.path(step)
        for number in range(1, 1000):
            target = path.with_name(f"{path.name}.damaged-{number}")
            if not target.exists():
                path.rename(target)
                return target
        raise CheckpointError(f"{self.folder}: too many damaged copies of {path.name}; remove them")

    def rotate(self, best_step: int | None) -> None:
        """Keep the newest `limit` checkpoints and the best one; remove an older one only while two good ones stay."""
        steps = self.steps()
        kept, removable = steps[-self.limit :], steps[: -self.limit]
        if not removable or sum(self.complaint(step) is None for step in kept[-2:]) < 2:
            return
        for step in removable:
            if step != best_step:
                storage.remove_folder(self.path(step))
