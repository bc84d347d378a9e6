"""Folders that are whole or absent: every file hashed and synced, a manifest last, then one rename.

Nothing here is trusted because it exists: `verify` reads every byte and holds it to the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltune import weights
from deltune.errors import CheckpointError, DeltuneError

MANIFEST = "manifest.json"
FORMAT = "deltune-checkpoint-1"
TEMPORARY_FILE = re.compile(r"\..+\.(\d+)\.tmp")  # as `weights.replacing` names what it writes to
SAFETENSORS_TEMPORARY = re.compile(r"\.tmp\w{6}")  # as its writer names a file until it is whole
TEMPORARY_FOLDER = re.compile(r"\..+\.(tmp|trash)")  # as `write_folder` and `remove_folder` do


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one step: readers see the old text or the new, never a part."""
    data = text.encode("utf-8")
    with weights.replacing(path, len(data)) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def make_folder(path: Path) -> None:
    """Create a folder and those above it, so that they outlast a power cut: what lies in a folder that is lost is lost."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    weights.sync(path.parent)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes have left half written or half removed. Only the holder of the lock may call this."""
    for path in list(folder.rglob(".*")):
        if path.is_dir() and TEMPORARY_FOLDER.fullmatch(path.name):
            shutil.rmtree(path)
        elif path.is_file() and _is_leftover(path.name):
            path.unlink()


def _is_leftover(name: str) -> bool:
    match = TEMPORARY_FILE.fullmatch(name)
    return SAFETENSORS_TEMPORARY.fullmatch(name) is not None or (match is not None and not _is_alive(int(match[1])))


def _is_alive(pid: int) -> bool:
    """Whether another process has this number; our own files are written only after the lock is taken."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_folder(path: Path, fill: Callable[[Path], None], facts: dict[str, Any], num_bytes: int) -> None:
    """Create the folder `path` whole: `fill(temporary)` writes its files, the manifest holds their hashes and `facts`.

    On any failure nothing of it is left and what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        files = {}
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            weights.sync(file)
            name = file.relative_to(temporary).as_posix()
            files[name] = {"bytes": file.stat().st_size, "sha256": weights.sha256_of(file)}
        manifest = {"format": FORMAT, "facts": facts, "files": files}
        manifest["self"] = _digest(manifest)
        write_json(temporary / MANIFEST, manifest)
        os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and weights.says_disk_full(error):
            error = weights.disk_full(path, num_bytes)
        if isinstance(error, DeltuneError):
            raise CheckpointError(f"{error} What was saved before stands; the same command goes on from there.") from None
        raise
    weights.sync(path.parent)


def verify(path: Path) -> dict[str, Any]:
    """The facts of a whole folder; CheckpointError naming the first file that is missing, changed, left over or unreadable."""
    try:
        return _verify(path)
    except OSError as error:  # a bad sector reads as an error, and a checkpoint may be a file by mistake
        raise CheckpointError(f"{error.filename or path}: cannot be read ({error.strerror})") from None


def _verify(path: Path) -> dict[str, Any]:
    manifest = _read_manifest(path)
    expected = manifest["files"]
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {MANIFEST}
    for name in sorted(set(expected) | present):
        if name not in present:
            raise CheckpointError(f"{path / name}: missing")
        if name not in expected:
            raise CheckpointError(f"{path / name}: not listed in {MANIFEST}")
        size = (path / name).stat().st_size
        if size != expected[name]["bytes"]:
            raise CheckpointError(f"{path / name}: {size:,} bytes where {expected[name]['bytes']:,} were written")
        if weights.sha256_of(path / name) != expected[name]["sha256"]:
            raise CheckpointError(f"{path / name}: content differs from what was written (sha256)")
    return manifest["facts"]


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        claimed = manifest.pop("self")
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{file}: format {manifest['format']!r}; this program reads {FORMAT!r}")
        whole = claimed == _digest(manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing, so the folder was never finished") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{file}: damaged") from None
    if not whole:
        raise CheckpointError(f"{file}: content differs from what was written (sha256)")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def remove_folder(path: Path) -> None:
    """Delete a folder so that a kill or a power cut half way leaves no part of it under its name."""
    trash = path.with_name(f".{path.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    weights.sync(path.parent)
    shutil.rmtree(trash)
