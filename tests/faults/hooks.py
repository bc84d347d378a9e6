"""Every call by which a process changes what lies below one folder passes through here, and can be the last one.

The product code knows nothing of this: the functions of `os`, `open` and the writer of safetensors are replaced in the
child. A visitor is told of each call, and decides whether and when to make it.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ENTRY_CALLS = ("mkdir", "unlink", "remove", "rmdir")  # (path, ..., dir_fd=)
RENAMES = ("rename", "replace")
FD_CALLS = ("fsync", "fdatasync", "ftruncate")
FD_WRITES = ("write", "pwrite")
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

Visitor = Callable[["Call"], Any]


@dataclass
class Call:
    """One call: what it is, on which file, how to make it, and how to make half of it where it carries data."""

    kind: str
    path: str  # relative to the folder
    make: Callable[[], Any]
    half: Callable[[], Any] | None = None
    handle: int | None = None


def path_of(handle: int) -> str:
    return os.readlink(f"/proc/self/fd/{handle}")


class CountedFile(io.FileIO):
    """A file opened for writing by `open`, whose writes to the system are calls like the others."""

    hooks: Hooks

    def write(self, data: Any) -> int:
        data = bytes(data)
        inner = super().write
        return self.hooks.visit("write", path_of(self.fileno()), lambda: inner(data), lambda: inner(data[: len(data) // 2]))


class Hooks:
    """Installed once in a process; there is no way back."""

    def __init__(self, folder: Path, visitor: Visitor):
        self.folder = os.path.realpath(folder)
        self.visitor = visitor
        self._busy = False  # a call inside a call, or the visitor's own, is not counted

    def visit(self, kind: str, path: Any, make: Callable[[], Any], half: Callable[[], Any] | None = None, handle: int | None = None) -> Any:
        path = os.path.abspath(os.fspath(path))
        if self._busy or os.path.commonpath([path, self.folder]) != self.folder:
            return make()
        self._busy = True
        try:
            return self.visitor(Call(kind, os.path.relpath(path, self.folder), make, half, handle))
        finally:
            self._busy = False

    def install(self) -> None:
        for name in ENTRY_CALLS:
            self._replace_entry_call(name)
        for name in RENAMES:
            self._replace_rename(name)
        for name in FD_CALLS:
            self._replace_fd_call(name)
        for name in FD_WRITES:
            self._replace_fd_write(name)
        self._replace_open()
        self._replace_file_objects()
        self._replace_safetensors()

    def _replace_entry_call(self, name: str) -> None:
        real = getattr(os, name)

        def call(path: Any, *rest: Any, dir_fd: int | None = None, **named: Any) -> Any:
            if dir_fd is None:
                return self.visit(name, path, lambda: real(path, *rest, **named))
            return self.visit(name, os.path.join(path_of(dir_fd), path), lambda: real(path, *rest, dir_fd=dir_fd, **named))

        setattr(os, name, call)

    def _replace_rename(self, name: str) -> None:
        real = getattr(os, name)
        setattr(os, name, lambda source, target, **named: self.visit(name, target, lambda: real(source, target, **named)))

    def _replace_fd_call(self, name: str) -> None:
        real = getattr(os, name)
        setattr(os, name, lambda handle, *rest: self.visit(name, path_of(handle), lambda: real(handle, *rest), handle=handle))

    def _replace_fd_write(self, name: str) -> None:
        real = getattr(os, name)

        def call(handle: int, data: Any, *rest: Any) -> int:
            half = bytes(data)[: len(data) // 2]
            return self.visit(name, path_of(handle), lambda: real(handle, data, *rest), lambda: real(handle, half, *rest))

        setattr(os, name, call)

    def _replace_open(self) -> None:
        real = os.open

        def call(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if not flags & WRITE_FLAGS or named.get("dir_fd") is not None:
                return real(path, flags, *rest, **named)
            return self.visit("open", path, lambda: real(path, flags, *rest, **named))

        os.open = call

    def _replace_file_objects(self) -> None:
        real = io.open

        def call(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None, *rest: Any, **named: Any) -> Any:
            writes = any(letter in mode for letter in "wax+")
            if not writes or isinstance(file, int) or os.path.commonpath([os.path.abspath(file), self.folder]) != self.folder:
                return real(file, mode, buffering, encoding, errors, newline, *rest, **named)
            raw = self.visit("open", file, lambda: CountedFile(file, mode.replace("b", "").replace("t", "")))
            raw.hooks = self
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        builtins.open = io.open = call

    def _replace_safetensors(self) -> None:
        # its writer is not Python, so one whole file is one call here; inside it there is half of a file of this name
        from safetensors import torch as safetensors_torch

        real, to_bytes = safetensors_torch.save_file, safetensors_torch.save

        def call(tensors: Any, filename: Any, metadata: Any = None) -> None:
            def half() -> None:
                data = to_bytes(tensors, metadata)
                Path(filename).with_name(".tmpHalf00").write_bytes(data[: len(data) // 2])

            self.visit("save_file", filename, lambda: real(tensors, filename, metadata=metadata), half)

        safetensors_torch.save_file = call


# -- visitors ---------------------------------------------------------------------------------------------------


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


class Journal:
    """Makes every call, and lists them in a file outside the folder: [kind, path, whether it can be done by half]."""

    def __init__(self, out: str):
        self.out, self.calls = out, []

    def __call__(self, call: Call) -> Any:
        self.calls.append([call.kind, call.path, call.half is not None])
        return call.make()

    def close(self) -> None:
        Path(self.out).write_text(json.dumps(self.calls))


class Kill:
    """kill -9 right before, half way through, or right after the n-th call (0 is the first)."""

    def __init__(self, at: int, phase: str):
        self.left, self.phase = at, phase

    def __call__(self, call: Call) -> Any:
        self.left -= 1
        if self.left != -1:
            return call.make()
        try:
            if self.phase == "half":
                call.half()
            elif self.phase == "after":
                call.make()
        finally:
            die()


class SlowSync:
    """fsync takes a while, so that a signal can be sent in the middle of a save."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, call: Call) -> Any:
        if call.kind == "fsync":
            time.sleep(self.seconds)
        return call.make()


class PowerCut:
    """Before the n-th call the power goes: what would be on the disk afterwards is written to another folder.

    Two models of a disk that keeps no promise it did not make. `strict`: a file's bytes are there as of its last
    fsync, a folder's names as of the folder's. `loose`: all names are there, bytes only as of the file's last fsync.
    """

    def __init__(self, root: Path, at: int, model: str, out: str):
        self.left, self.strict, self.out, self.root = at, model == "strict", Path(out), root
        self.bytes: dict[int, bytes] = {}  # by inode
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}  # name -> (inode, whether it is a folder)
        self.saved = 0  # newest step that the run was told is safe
        for folder, _, files in os.walk(root):
            for path in (folder, *(os.path.join(folder, name) for name in files)):
                self._remember(os.open(path, os.O_RDONLY))

    def __call__(self, call: Call) -> Any:
        self.left -= 1
        if self.left == -1:
            self.cut()
            die()
        result = call.make()
        if call.kind in ("fsync", "fdatasync"):
            self._remember(os.dup(call.handle))
        return result

    def cut(self) -> None:
        """Write what is left on the disk, and the promise that was made."""
        inode = os.stat(self.root).st_ino
        (self._rebuild_strict if self.strict else self._rebuild_loose)(inode, self.root, self.out)
        self.out.with_suffix(".saved").write_text(str(self.saved))

    def _remember(self, handle: int) -> None:
        # the handle stays open, so that no later file gets this inode
        inode = os.fstat(handle).st_ino
        if os.path.isdir(path_of(handle)):
            self.names[inode] = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(handle)}
        else:
            self.bytes[inode] = Path(f"/proc/self/fd/{handle}").read_bytes()

    def _rebuild_strict(self, inode: int, _: Path, target: Path) -> None:
        target.mkdir()
        for name, (inner, is_folder) in self.names.get(inode, {}).items():
            if is_folder:
                self._rebuild_strict(inner, Path(), target / name)
            else:
                (target / name).write_bytes(self.bytes.get(inner, b""))

    def _rebuild_loose(self, _: int, source: Path, target: Path) -> None:
        target.mkdir()
        for entry in os.scandir(source):
            if entry.is_dir():
                self._rebuild_loose(entry.inode(), Path(entry.path), target / entry.name)
            else:
                (target / entry.name).write_bytes(self.bytes.get(entry.inode(), b""))
