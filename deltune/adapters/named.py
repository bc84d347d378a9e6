"""Named methods for use from Python: `deltune.method("pissa", rank=16)`."""

from __future__ import annotations

import difflib
from typing import Any

from deltune.adapters.config import METHODS, AdapterConfig, complaint, named
from deltune.errors import AdapterError


def method(name: str, **fields: Any) -> AdapterConfig:
    """The config of a named method: its own choices, and these fields over them.

    Raises AdapterError for a name or field that does not exist, and for a value that does not fit.
    """
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.4)
        raise AdapterError(f"there is no method {name!r}; {'nearest: ' if close else 'there are '}{', '.join(close or sorted(METHODS))}")
    try:
        config = named(name, **fields)
    except TypeError as error:
        raise AdapterError(f"{name}: {error}") from None
    fault = complaint(config)
    if fault:
        raise AdapterError(f"{name}: {fault}")
    return config
