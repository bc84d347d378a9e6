"""SIGTERM, SIGINT and SIGUSR1 ask a run to save and stop; a second one, or the end of the grace period, ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """A context in which those signals set `signum` and no more. The loop looks at it between steps.

    Outside the main thread Python allows no handlers; there it does nothing.
    """

    def __init__(self, grace_seconds: float):
        self.grace_seconds = grace_seconds
        self.signum = 0
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (*SIGNALS, signal.SIGALRM):
                self._old[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._old:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            # asked twice, or the grace period is over: the last whole checkpoint stands, leave without ceremony
            why = "the grace period is over" if signum == signal.SIGALRM else "asked again"
            with suppress(OSError):
                # not through sys.stderr, which the signal may have caught in the middle of a write
                os.write(2, f"deltune: {why}; stopping without another save\n".encode())
            os._exit(128 + self.signum)
        if signum != signal.SIGALRM:
            self.signum = signum
            signal.setitimer(signal.ITIMER_REAL, self.grace_seconds)
