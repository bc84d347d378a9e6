"""Ranked: what deltas with a rank and an alpha share: per-layer values by pattern, and the scale."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deltune.adapters.config import RankedConfig
from deltune.adapters.delta import Delta
from deltune.adapters.layers import Site
from deltune.errors import AdapterError

SCALINGS: dict[str, Callable[[float, int], float]] = {
    "standard": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
}


def value_for(name: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """The value of the first key that matches the end of a module's full name, from a dot or the beginning on."""
    return next((value for key, value in pattern.items() if pattern_matches(key, name)), default)


def pattern_matches(key: str, name: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({key})$", name) is not None
    except re.error as error:
        raise AdapterError(f"rank_pattern or alpha_pattern: {key!r} is no regular expression: {error}") from None


def rank_at(site: Site, pattern: Mapping[str, int], default: int) -> int:
    """The rank of a layer. AdapterError if the pattern gives it none."""
    rank = value_for(site.name, pattern, default)
    if rank < 1:
        raise AdapterError(f"{site.name}: rank_pattern gives it rank {rank}; a rank is at least 1")
    return rank


def check_patterns(names: Sequence[str], **patterns: Mapping[str, Any]) -> None:
    """Raise AdapterError, naming the field, if a key of these patterns matches none of the adapted layers."""
    for field, pattern in patterns.items():
        for key in pattern:
            if not any(pattern_matches(key, name) for name in names):
                raise AdapterError(f"{field}: {key!r} matches none of the adapted modules, e.g. {names[0]}")


class Ranked(Delta):
    """A delta whose config is a RankedConfig. `self.rank` and `self.scale` are this layer's."""

    def __init__(self, config: RankedConfig, site: Any, banks: Any = None):
        self.rank = rank_at(site, config.rank_pattern, config.rank)
        self.alpha = value_for(site.name, config.alpha_pattern, config.alpha)
        self.scale = SCALINGS[config.scaling](self.alpha, self.rank)
        super().__init__(config, site, banks)

    @classmethod
    def check(cls, config: RankedConfig, names: Sequence[str]) -> None:
        check_patterns(names, rank_pattern=config.rank_pattern, alpha_pattern=config.alpha_pattern)
