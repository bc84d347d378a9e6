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
    """`adapter.magnitude` around a change that is not a matrix: it divides by the norms of W + ΔW."""
    if config.magnitude and delta.no_matrix(config):
        return f"magnitude cannot go around {config.delta}: it divides by the norms of W + ΔW, and {delta.no_matrix(config)}"
    return None


def magnitude_goes_around_sums(config: AdapterConfig, delta: type[Delta]) -> str | None:
    """`adapter.magnitude` around a method that multiplies: a rotation leaves every norm as it is, and scales are what magnitude is."""
    if config.magnitude and delta.mergeable and not delta.additive:
        return f"magnitude cannot go around {config.delta}, which multiplies instead of adding: a rotation of the input leaves every row's norm as it is, and scales of the output are what magnitude is"
    return None


def magnitude_leaves_the_bias(config: AdapterConfig, delta: type[Delta]) -> str | None:
    """`adapter.magnitude` around a method that changes the bias, which magnitude leaves as it is."""
    if config.magnitude and delta.additive and delta.bias_delta is not Delta.bias_delta:
        return f"magnitude cannot go around {config.delta}, which changes the bias too: magnitude scales rows of W + ΔW and leaves the bias as it is"
    return None


def layers_that_share_have_one_rank(config: AdapterConfig, delta: type[Delta]) -> str | None:
    """`adapter.rank_pattern` where layers share tensors, which have one rank."""
    if isinstance(config, RankedConfig) and config.rank_pattern and delta.banks(config):
        return f"rank_pattern cannot go with {config.delta}: its layers share tensors, and those have one rank"
    return None


def dropout_needs_an_input(config: AdapterConfig, delta: type[Delta]) -> str | None:
    """`adapter.dropout` with a method that reads no input which could be dropped."""
    if config.dropout and not delta.takes_dropout:
        return f"dropout has no effect with {config.delta}, which reads no input that could be dropped; leave it 0"
    return None


def moving_the_base_needs_a_matrix(config: AdapterConfig, delta: type[Delta]) -> str | None:
    """`adapter.schedule` with a change that is not a matrix: it is written into the base weight."""
    if config.schedule.moves_base and delta.no_matrix(config):
        return f"schedule.name cannot be {config.schedule.name} with {config.delta}: it writes the change into the base weight, and {delta.no_matrix(config)}"
    return None


def momentum_needs_a_factor(config: AdapterConfig, delta: type[Delta]) -> str | None:
    """`adapter.schedule.momentum` with a change that is not in proportion to one factor."""
    time = config.schedule
    if time.momentum and time.name == "plora" and (delta.factors is None or delta.reads_base or config.magnitude):
        return f"schedule.momentum needs a change in proportion to a factor B that can be scaled, and {config.delta}{' with magnitude' if config.magnitude else ''} has none"
    return None


def following_needs_the_whole_change(config: AdapterConfig, delta: type[Delta]) -> str | None:
    """`adapter.dropout` with `schedule.name=delta_lora`: the base takes the whole step of a change of which dropout trained a part."""
    if config.schedule.name == "delta_lora" and config.dropout:
        return "dropout cannot go with schedule.name=delta_lora: the base takes the whole step of a change of which dropout trained a part"
    return None


def time_settings_have_an_effect(config: AdapterConfig, delta: type[Delta]) -> str | None:
    """Settings of `adapter.schedule` that its choice does not use."""
    time, default = config.schedule, type(config.schedule)()
    without = [
        (not time.merges, ("every", "moments", "rewarm", "restart"), "it belongs to relora and plora"),
        (not time.merges or time.moments not in ("random", "magnitude"), ("prune",), "it belongs to schedule.moments=random and magnitude"),
        (time.restart, ("rewarm",), "with schedule.restart the schedule's own warm-up is run after each merge"),
        (time.name != "plora", ("momentum",), "it belongs to plora"),
        (time.name != "delta_lora", ("begin", "ratio"), "it belongs to delta_lora"),
    ]
    for idle, keys, reason in without:
        for key in keys:
            if idle and getattr(time, key) != getattr(default, key):
                return f"schedule.{key} has no effect: {reason}"
    if time.merges and time.rewarm >= 1 and (time.rewarm != int(time.rewarm) or time.rewarm > time.every):
        return f"schedule.rewarm from 1 on is a number of steps, so it must be a whole number, at most schedule.every={time.every}"
    return None


RULES: tuple[Rule, ...] = (
    moving_the_base_needs_a_matrix,
    momentum_needs_a_factor,
    following_needs_the_whole_change,
    time_settings_have_an_effect,
    dropout_needs_an_input,
    magnitude_needs_a_matrix,
    magnitude_goes_around_sums,
    magnitude_leaves_the_bias,
    layers_that_share_have_one_rank,
)


def problems(config: AdapterConfig) -> list[str]:
    delta = config.delta_class()
    return [problem for problem in (rule(config, delta) for rule in RULES) if problem]


def rule_problem(config: AdapterConfig | None, rule: str) -> str | None:
    """Why an optimizer's rule over pairs (A, B) would have no effect on this adapter, or could not be, beginning with the key `rule`;
    None if it fits."""
    if rule == "none":
        return None
    if config is None:
        return "rule has no effect with adapter=null: it is about an adapter's pair (A, B)"
    delta = config.delta_class()
    if delta.factors is None:
        return f"rule has no effect on {config.delta}: it is about a pair (A, B) with ΔW = s·B·A, which this change is not made of"
    a, b = delta.factors
    trained = delta.trained_factors(config)
    if b not in trained:
        return f"rule has no effect: it is about B, and this adapter trains {' and '.join(trained)} only"
    if rule == "lora_fa" and a in trained:
        return "rule needs A frozen, and this adapter trains it: add adapter.train=B, or choose adapter=lora_fa"
    return None
