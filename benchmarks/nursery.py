"""Every candidate is a process of its own, forked from one that has imported what they all need: seconds of imports once an interpreter.

`Nursery(python, module)` starts `python -m benchmarks.nursery`, which imports by the module's `preload` and computes
nothing; `fork(words, errors)` gives a process as `python -m words...` would be, with what Popen has of one. Linux and macOS.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

LONGEST_ORDER = 1 << 20


class Nursery:
    """Seen from the suite."""

    def __init__(self, python: str, module: str | None, log: TextIO, environment: Mapping[str, str]):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_STREAM)
        with theirs:
            words = [python, "-m", "benchmarks.nursery", str(theirs.fileno()), *([module] if module else [])]
            self.child = subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env={**os.environ, **environment})
        self.cpu_of_ended = self.cpu_of_imports = 0.0

    def fork(self, words: Sequence[str], errors: TextIO) -> Forked:
        order_read, order_write = os.pipe()
        answer_read, answer_write = os.pipe()
        handed = [order_read, answer_write, errors.fileno()]
        socket.send_fds(self.socket, [json.dumps({"words": list(words)}).encode()], handed)
        pid, self.cpu_of_imports = self.hear()
        os.close(order_read)
        os.close(answer_write)
        return Forked(self, pid, os.fdopen(order_write, "w"), os.fdopen(answer_read))

    def status(self, pid: int, seconds: float) -> int | None:
        """Of a process when it has ended; None if it has not within the seconds."""
        self.socket.sendall(json.dumps({"pid": pid, "seconds": seconds}).encode())
        status, cpu = self.hear()
        self.cpu_of_ended += cpu
        return status

    def hear(self) -> Any:
        answer = self.socket.recv(LONGEST_ORDER)
        if not answer:
            raise RuntimeError(f"the process that imports for the candidates ended with status {self.child.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self.socket.close()  # its end
        self.child.wait()


class Forked:
    """What Popen offers of a process."""

    def __init__(self, nursery: Nursery, pid: int, stdin: TextIO, stdout: TextIO):
        self.nursery, self.pid, self.stdin, self.stdout = nursery, pid, stdin, stdout
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.nursery.status(self.pid, 0.0)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        if self.returncode is None:
            self.returncode = self.nursery.status(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:  # not waited for, so the number is still its own
            os.kill(self.pid, signal.SIGKILL)


def serve(end: socket.socket) -> None:
    """Fork and wait as the suite asks, until it closes its end."""
    while True:
        message, handed, _, _ = socket.recv_fds(end, LONGEST_ORDER, 3)
        if not message:
            return
        order = json.loads(message)
        if "pid" in order:
            end.sendall(json.dumps(_ended(order["pid"], time.monotonic() + order["seconds"])).encode())
            continue
        pid = os.fork()
        if pid == 0:
            end.close()
            _become(order["words"], handed)
        for one in handed:
            os.close(one)
        end.sendall(json.dumps([pid, time.process_time()]).encode())


def _ended(pid: int, until: float) -> tuple[int | None, float]:
    """The status of a process when it has ended, and the CPU seconds that it and its own took."""
    while True:
        found, status, used = os.wait4(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        if time.monotonic() > until:
            return None, 0.0
        time.sleep(0.01)


def _become(words: list[str], handed: Sequence[int]) -> None:
    """The forked process: `python -m words...` with these for standard input, output and errors. It does not return."""
    for place, one in enumerate(handed):
        os.dup2(one, place)
        os.close(one)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.argv = words
    code = 1
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


def main() -> None:
    end = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module).preload()
    serve(end)


if __name__ == "__main__":
    main()
