"""One run owns a folder: an advisory lock that the system releases when its owner dies, whatever killed it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from deltune import weights
from deltune.errors import CheckpointError
from deltune.training import storage


class FolderLock:
    """`flock` on `<folder>/.lock`, whose text names the owner for the message that others get."""

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the folder and remove what a dead owner left half written, or raise CheckpointError naming a live one."""
        handle = self._open()
        try:
            self._lock(handle)
            storage.clear_leftovers(self.path.parent)
            self._sign(handle)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle
        os.register_at_fork(after_in_child=self._forget)

    def _open(self) -> int:
        try:
            storage.make_folder(self.path.parent)
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"{self.path.parent}: no run can be kept here ({error.strerror}). Put the runs elsewhere with output=..."
            ) from None

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 4096, 0).decode("utf-8", "replace").strip()
            raise CheckpointError(
                f"{self.path.parent}: another run is working in this folder ({owner or 'it has just started'}). "
                "Wait for it, stop it, or give this run another name (name=...)."
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: this file system cannot lock files ({error.strerror}). Put the runs elsewhere with output=..."
            ) from None

    def _sign(self, handle: int) -> None:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        text = json.dumps(owner).encode()
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, text, 0)
        except OSError as error:
            if not weights.says_disk_full(error):
                raise
            raise weights.disk_full(self.path, len(text)) from None

    def _forget(self) -> None:
        """In a forked child: let go of the file without unlocking it, or a child that lives on would keep the folder."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def release(self) -> None:
        """Give the folder up. The file stays: removing it would let two later runs lock two different files."""
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()
