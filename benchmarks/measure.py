"""From rounds to verdicts: medians, ratios within a round, equality of loss, targets. Knows no process and no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

F32_LIMIT = 1e-5  # relative
BF16_LIMIT = 2e-2  # relative, or twice the peer's own distance to the float32 loss where that is more
FEWEST_ROUNDS = 3
SETTLED = 1.1  # a target is settled when every round lies this factor beyond its bound, all on one side


@dataclass(frozen=True)
class Candidate:
    """One process of a case. `equal_to` names the candidate whose losses it must have; None where it does other work."""

    kind: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    equal_to: str | None = "peft"


@dataclass(frozen=True)
class Target:
    """A bound on a ratio. speed: useful tokens/s of ours over the peer's; time: the inverse; transient: bytes over bytes.
    Of ours alone: mfu; peak: gigabytes in all; tokens: how many a step held."""

    what: str
    ours: str
    peer: str
    bound: float

    @property
    def at_least(self) -> bool:
        return self.what in ("speed", "mfu", "tokens")

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass
class Timed:
    """What a candidate gave, one entry a round. Seconds are CPU time, or the card's."""

    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    transient: list[int] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of the equality steps, the first of all
    first_seconds: float = 0.0
    before_first_step: float | None = None

    def per_token(self) -> list[float]:
        return [s / t for s, t in zip(self.seconds, self.tokens, strict=True)]

    def row(self, flops_per_token: float, peak_flops: float, num_steps: int) -> dict[str, Any]:
        per_token = statistics.median(self.per_token())
        return {
            "seconds_per_step": statistics.median(self.seconds) / num_steps, "useful_tokens_per_second": 1 / per_token,
            "wall_seconds_per_step": statistics.median(self.wall) / num_steps,
            "mfu": flops_per_token / per_token / peak_flops if flops_per_token else None,
            "transient_mb": statistics.median(self.transient) / 1e6 if self.transient else None,
            "peak_gb": max(self.peak) / 1e9 if self.peak else None,
            "first_step_seconds": self.first_seconds, "before_first_step_seconds": self.before_first_step,
            "rounds": len(self.seconds), "losses": self.losses,
        }  # fmt: skip


def ratio(target: Target, timed: Mapping[str, Timed]) -> float | None:
    """What was measured, a ratio as the median of those within rounds; None if one of the two is absent."""
    if target.ours not in timed:
        return None
    ours = timed[target.ours]
    if target.what == "peak":
        return max(ours.peak) / 1e9
    if target.what == "tokens":
        return float(min(ours.tokens))
    if target.peer not in timed:
        return None
    if target.what == "transient":
        return statistics.median(ours.transient) / statistics.median(timed[target.peer].transient)
    return statistics.median(ratios(target, ours, timed[target.peer]))


def ratios(target: Target, ours: Timed, peer: Timed) -> list[float]:
    """Of each round in which both took part: one may have sat out the last ones."""
    pairs = zip(ours.per_token(), peer.per_token(), strict=False)
    return [p / o if target.what == "speed" else o / p for o, p in pairs]


def still_open(targets: Sequence[Target], timed: Mapping[str, Timed]) -> set[str]:
    """Candidates that more rounds would tell something of: all until FEWEST_ROUNDS, then those of targets not settled."""
    if any(len(one.seconds) < FEWEST_ROUNDS for one in timed.values()):
        return set(timed)
    found: set[str] = set()
    for target in targets:
        if target.what in ("speed", "time") and {target.ours, target.peer} <= set(timed):
            margins = [value / target.bound for value in ratios(target, timed[target.ours], timed[target.peer])]
            if not (min(margins) > SETTLED or max(margins) < 1 / SETTLED):
                found |= {target.ours, target.peer}
    return found


def slope(points: Sequence[tuple[int, float]]) -> float:
    """Least squares through (tokens, megabytes)."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def unequal(
    candidates: Mapping[str, Candidate], losses: Mapping[str, Sequence[float]], dtype: str, reference: Sequence[float] | None = None,
) -> list[str]:
    """Why the losses of a case are not equal, a sentence for each pair; empty where they are. What is absent is passed over.

    `reference` are the peer's losses in float32 over the same weights, data and steps.
    """
    complaints = []
    for name, candidate in candidates.items():
        if candidate.equal_to is None or candidate.equal_to == name or name not in losses or candidate.equal_to not in losses:
            continue
        mine, theirs = losses[name], losses[candidate.equal_to]
        if not mine or len(mine) != len(theirs):
            complaints.append(f"{name} told {len(mine)} losses, {candidate.equal_to} {len(theirs)}")
            continue
        limit = F32_LIMIT
        if dtype != "float32":
            own = [abs(a - b) / abs(b) for a, b in zip(theirs, reference or (), strict=False)]
            limit = max(BF16_LIMIT, 2 * max(own, default=0.0))
        worst = distance(mine, theirs)
        if not worst <= limit:  # nan is unequal too
            complaints.append(f"{name} and {candidate.equal_to} differ by {worst:.1e} (limit {limit:.1e})")
    return complaints


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest relative difference of two courses of loss; nan where one is."""
    values = [abs(x - y) / abs(y) for x, y in zip(a, b, strict=False)]
    return float("nan") if any(v != v for v in values) else max(values)


def verdict(target: Target, value: float | None) -> dict[str, Any]:
    """A row of the table of targets."""
    return {
        "what": target.what, "ours": target.ours, "peer": target.peer, "measured": value, "target": target.bound,
        "at_least": target.at_least, "met": None if value is None else target.met(value),
    }  # fmt: skip
