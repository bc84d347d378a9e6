"""Folders that are whole or absent: every file hashed and synced, a manifest last, then one rename.

Nothing here is trusted because it exists: `verify` reads every byte and holds it to the manifest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deltune.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "deltune-checkpoint-1"


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Make the names in a folder last; without it a rename may be forgotten in a power cut."""
    sync_file(path)


@contextmanager
def told_of_full_disk(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn `no space left` and its kin into one message with the path and the bytes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CheckpointError(_full_disk_message(path, needed, error.strerror)) from None
    except Exception as error:
        # safetensors reports the system's error as text only
        if "No space left" not in str(error) and "File too large" not in str(error):
            raise
        raise CheckpointError(_full_disk_message(path, needed, "No space left on device")) from None


def _full_disk_message(path: Path, needed: int | None, reason: str) -> str:
    existing = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    wanted = "" if needed is None else f", about {needed:,} bytes needed"
    return (
        f"{path}: {reason} ({free:,} bytes free{wanted}). Nothing saved before was touched; "
        "free some space and start the same command again to go on from the last checkpoint."
    )


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one step: readers see the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with told_of_full_disk(path, len(text)):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_folder(path: Path, fill: Callable[[Path], None], facts: dict[str, Any], needed: int | None = None) -> None:
    """Create the folder `path` whole: `fill(temporary)` writes its files, the manifest holds their hashes and `facts`.

    On any failure nothing of it is left and what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with told_of_full_disk(path, needed):
        try:
            temporary.mkdir(parents=True)
            fill(temporary)
            files = {}
            for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                sync_file(file)
                files[file.relative_to(temporary).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
            manifest = {"format": FORMAT, "facts": facts, "files": files}
            manifest["self"] = _digest(manifest)
            with open(temporary / MANIFEST, "w", encoding="utf-8") as out:
                json.dump(manifest, out, indent=1)
                out.flush()
                os.fsync(out.fileno())
            sync_folder(temporary)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    sync_folder(path.parent)


def verify(path: Path) -> dict[str, Any]:
    """The facts of a whole folder; CheckpointError naming the first file that is missing, changed or left over."""
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
        if sha256_of(path / name) != expected[name]["sha256"]:
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
    """Delete a folder so that a kill half way leaves no folder that looks whole."""
    trash = path.with_name(f".{path.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash)
