"""No space left: one clear message, the older checkpoint whole, and the same run once there is room again.

A small tmpfs where this process may mount one. Everywhere, a limit on the size of one file, which the system enforces
in the same place with another error.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltune.training.checkpoints import CheckpointStore
from tests.faults.lab import Lab, Row

SETTINGS = {"steps": 12, "every": 3, "eval_every": 4, "limit": 2, "accumulate": 1}
KIB = 1024


def refusal(task: Any, code: int | None, text: str) -> str | None:
    """What is wrong with the way in which a run met a full disk."""
    if code != 2 or "Traceback" in text:
        return f"ended with {code}: {text[-1500:]}"
    message = next((line for line in text.splitlines() if line.startswith("deltune: ")), "")
    if str(task.path) not in message or not re.search(r"[\d,]+ bytes free", message):
        return f"the message does not name path and free bytes: {message}"
    store = CheckpointStore(task.path / "checkpoints", 2)
    damaged = [complaint for step in store.steps() if (complaint := store.complaint(step)) is not None]
    return f"damaged: {damaged}" if damaged else None


def small_files(lab: Lab, limits_kib: list[int]) -> Row:
    """The largest file of a checkpoint does not fit."""
    row = Row("file size limit (EFBIG) in a save", listed=True)
    reference = lab.reference(lab.task(**SETTINGS))
    for limit in limits_kib:
        task = lab.task(**SETTINGS)
        code, text = lab.run(replace(task, file_limit_bytes=limit * KIB))
        problem = refusal(task, code, text) or lab.to_the_end(task, reference)
        row.count(problem and f"{limit} KiB: {problem}")
    return row


def can_mount(folder: Path) -> bool:
    if os.geteuid() != 0:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True).returncode == 0
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)
    return mounted


def full_disk(lab: Lab, sizes_kib: list[int]) -> Row:
    """A file system of so many KiB fills up somewhere in the run; it is made larger, and the run goes on."""
    row = Row("disk full (tmpfs), then made larger", listed=True)
    if not can_mount(lab.folder / "mount"):
        row.note = "not tried: mounting needs root"
        return row
    reference = lab.reference(lab.task(**SETTINGS))
    fitted = 0
    for size in sizes_kib:
        task = lab.task(**SETTINGS)
        place = str(task.path.parent)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", place], check=True)
        try:
            code, text = lab.run(task)
            if code == 0:
                fitted += 1
                continue
            problem = refusal(task, code, text)
            subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
            problem = problem or lab.to_the_end(task, reference)
            row.count(problem and f"{size} KiB: {problem}")
        finally:
            subprocess.run(["umount", place], check=True)
    row.note = f"{sizes_kib[0]} to {sizes_kib[-1]} KiB; {fitted} had room enough"
    return row


def run(lab: Lab, scale: float) -> Iterator[Row]:
    """All rows of this file. A checkpoint takes about 2.3 MB, and three are there while the oldest is being replaced."""
    stride = max(1, round(1 / scale))
    yield full_disk(lab, [*range(4, 64, 4), *range(64, 7200, 64)][::stride])
    yield small_files(lab, [1, 2, 4, 6, 8, 16, 64, 256, 512, 700, 740, 900, 1200, 1400][::stride])
