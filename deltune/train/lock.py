"""One run owns a folder: an advisory lock that the system releases when its owner dies, whatever killed it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from deltune.errors import CheckpointError


class FolderLock:
    """`flock` on `<folder>/.lock`, whose text names the owner for the message that others get."""

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the folder, or raise CheckpointError naming who has it. A dead owner's lock is free already."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 4096, 0).decode("utf-8", "replace").strip()
            os.close(handle)
            raise CheckpointError(
                f"{self.path.parent}: another run is working in this folder ({owner or 'it has just started'}). "
                "Wait for it, stop it, or give this run another name (name=...)."
            ) from None
        except OSError as error:
            os.close(handle)
            raise CheckpointError(
                f"{self.path}: this file system cannot lock files ({error.strerror}). Put the runs elsewhere with output=..."
            ) from None
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode(), 0)
        self._handle = handle

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
