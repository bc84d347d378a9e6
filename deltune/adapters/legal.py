"""Which choices do not go together, and why. Each rule is stated here once, and holds for the command line, for configs
made in Python, and for files that are read.

A rule is handed the config and the class of its parametrisation, and gives the problem, beginning with the key that it
is about, or None.
"""

from __future__ import annotations

from collections.abc import Callable

from deltune.adapters.config import AdapterConfig, RankedConfig
from deltune.adapters.delta import Delta

Rule = Callable[[AdapterConfig, type[Delta]], str | None]


def magnitude_needs_a_matrix(config: AdapterConfig, delta: type[Delta]) -> str | None:
    if config.magnitude and not delta.mergeable:
        return f"magnitude cannot go around {config.delta}: it divides by the norms of W + ΔW, and {delta.why_not_mergeable}"
    return None


def magnitude_goes_around_sums(config: AdapterConfig, delta: type[Delta]) -> str | None:
    if config.magnitude and delta.mergeable and not delta.additive:
        return f"magnitude cannot go around {config.delta}, which multiplies instead of adding: a rotation of the input leaves every row's norm as it is, and scales of the output are what magnitude is"
    return None


def layers_that_share_have_one_rank(config: AdapterConfig, delta: type[Delta]) -> str | None:
    if isinstance(config, RankedConfig) and config.rank_pattern and delta.banks(config):
        return f"rank_pattern cannot go with {config.delta}: its layers share tensors, and those have one rank"
    return None


RULES: tuple[Rule, ...] = (magnitude_needs_a_matrix, magnitude_goes_around_sums, layers_that_share_have_one_rank)


def problems(config: AdapterConfig) -> list[str]:
    delta = config.delta_class()
    return [problem for problem in (rule(config, delta) for rule in RULES) if problem]
