"""Tokenised data on disk, found by what it was made from: an entry is whole and verified, or it does not exist.

An entry is a folder named by the hash of everything that decides its content. It is written beside its place, fsynced,
given a manifest with the size and sha256 of every file, and renamed. Whatever is wrong with the cache folder (read
only, full, damaged) costs time, never the run. Entries may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deltune.data.dataset import ARRAYS, Counts, Part, PartWriter, Reject, part
from deltune.data.read import File
from deltune.log import logger

VERSION = 2  # of how rows become tokens; a change of any rule in this room that changes tokens or counts raises it

# fills a writer and says what became of the rows
Build = Callable[[PartWriter], tuple[Counts, list[Reject]]]


def cache_folder(setting: str | None) -> Path | None:
    """The folder of data.cache: `auto` is $DELTUNE_CACHE or ~/.cache/deltune/tokens; None keeps tokens in memory."""
    if setting != "auto":
        return Path(setting).expanduser() if setting else None
    named = os.environ.get("DELTUNE_CACHE")
    return Path(named) if named else Path(os.path.expanduser("~")) / ".cache" / "deltune" / "tokens"


def key(**what: Any) -> str:
    """The name of an entry: sha256 of all that its content depends on."""
    return hashlib.sha256(json.dumps({"version": VERSION, **what}, sort_keys=True).encode()).hexdigest()


def obtain(folder: Path | None, name: str, file: File, build: Build) -> Part:
    """The part of that name from the cache, made and stored if it is not there. Of several processes one makes it
    while the others wait."""
    if folder is None:
        return _in_memory(file, build)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock"):
            found = _load(folder / name, file)
            if found is None:
                _store(folder, name, build)
                found = _load(folder / name, file)
    except OSError as e:
        logger.warning("tokens cannot be cached in %s (%s); they are kept in memory", folder, e.strerror or e)
        return _in_memory(file, build)
    return found if found is not None else _in_memory(file, build)


def _in_memory(file: File, build: Build) -> Part:
    writer = PartWriter()
    counts, rejects = build(writer)
    writer.flush()
    return part(file, writer.arrays(), writer.tasks(), counts, rejects, writer.digest())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, as far as the file system can lock; a process that dies lets go."""
    if sys.platform == "win32":
        yield  # the rename alone keeps entries whole
        return
    import fcntl

    with open(path, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as e:
            logger.debug("no lock on %s: %s", path, e)
        yield


def _store(folder: Path, name: str, build: Build) -> None:
    for left_over in folder.glob(f"{name}.tmp-*"):  # of a process that was killed; we hold the lock
        shutil.rmtree(left_over, ignore_errors=True)
    place = folder / f"{name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    place.mkdir()
    try:
        _fill(place, build)
        if (folder / name).exists():  # an entry that did not verify
            shutil.rmtree(folder / name)
        try:
            os.rename(place, folder / name)
        except OSError:
            if not (folder / name).exists():  # else another process was faster, where locks do not work
                raise
        _sync_folder(folder)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _fill(place: Path, build: Build) -> None:
    writer = PartWriter(place)
    try:
        counts, rejects = build(writer)
        writer.flush()
        for stream in writer.streams().values():
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        writer.close()
    about = {"tasks": writer.tasks(), "counts": asdict(counts), "rejects": [list(r) for r in rejects], "digest": writer.digest()}
    body = json.dumps(about, default=str).encode()
    _write(place / "about.json", body)
    hashes = writer.hashes() | {"about.json": hashlib.sha256(body).hexdigest()}
    files = {f: {"bytes": (place / f).stat().st_size, "sha256": h} for f, h in hashes.items()}
    _write(place / "manifest.json", json.dumps({"version": VERSION, "files": files}).encode())
    _sync_folder(place)


def _write(path: Path, body: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(body)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load(place: Path, file: File) -> Part | None:
    """The entry, mapped into memory; None if there is none, or one that is not exactly what was written."""
    if not place.exists():
        return None
    fault = _fault(place)
    if fault:
        logger.warning("tokens of %s in the cache are damaged (%s) and are made anew", file.path, fault)
        return None
    about = json.loads((place / "about.json").read_bytes())
    arrays = {name: _mapped(place / name, dtype) for name, dtype in ARRAYS.items()}
    return part(file, arrays, about["tasks"], Counts(**about["counts"]), [Reject(*r) for r in about["rejects"]], about["digest"])


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:  # nothing cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _fault(place: Path) -> str:
    """What is wrong with an entry, or nothing."""
    try:
        manifest = json.loads((place / "manifest.json").read_bytes())
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "no readable manifest"
    if set(files) != {*ARRAYS, "about.json"} or manifest.get("version") != VERSION:
        return "another list of files"
    for name, (size, sha256) in files.items():
        path = place / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or cut"
        with open(path, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                return f"{name} has changed"
    return ""
