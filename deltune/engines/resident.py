"""Memory of this process as the system counts it: resident bytes, now and at the most. What cannot be asked is not guessed at."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

PROCESS = Path("/proc/self")


def restart_peak() -> bool:
    """Have `peak` count from now on, after freed memory is given back; False where the system cannot (outside Linux)."""
    if sys.platform != "linux":
        return False
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (PROCESS / "clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    except OSError:
        return False
    return True


def peak() -> int:
    """The most bytes that were resident since `restart_peak`, or since the process began."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def now() -> int:
    """Bytes that are resident."""
    import psutil

    return psutil.Process().memory_info().rss
