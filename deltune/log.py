"""One logger for the whole program: rank 0 speaks, other ranks only warn, and lines carry the rank where there are several."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

logger = logging.getLogger("deltune")


def set_up(level: str | None = None) -> None:
    """Send the program's messages to standard error. `DELTUNE_LOG` sets the level (debug, info, warning)."""
    name = (level or os.environ.get("DELTUNE_LOG") or "info").upper()
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    prefix = f"[rank {rank}] " if world != "1" else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(prefix + "%(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(name if rank == "0" else "WARNING")


def to_file(path: Path) -> None:
    """Write every message, with its time, to a file as well."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
