"""Whether a setting suits a layer's shape; if not, the error says what would."""

from __future__ import annotations

import math

from deltune.adapters.layers import Site
from deltune.errors import AdapterError

NAMED = 8  # values that a message offers


def must_divide(site: Site, field: str, value: int, **sizes: int) -> None:
    """Raise AdapterError, with the values nearest to this one that would fit, unless it divides each of these sizes."""
    if value < 1 or any(size % value for size in sizes.values()):
        common = math.gcd(*sizes.values())
        fitting = sorted((n for n in range(1, common + 1) if common % n == 0), key=lambda n: abs(n - value))
        what = " and ".join(f"{name}={size}" for name, size in sizes.items())
        raise AdapterError(f"{site.name}: {field} is {value}, which does not divide {what}; {', '.join(map(str, sorted(fitting[:NAMED])))} would")
