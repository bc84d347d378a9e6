"""Schedules against closed forms and other libraries, and what all of them owe."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from deltune.errors import ConfigError
from deltune.optim.config import (
    SCHEDULES,
    WSD,
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    Linear,
    Polynomial,
)
from deltune.optim.schedules import count_of, schedule

SETTINGS = [
    Constant(), Linear(floor=0.1), Cosine(), Exponential(floor=0.01), Polynomial(power=3.0, floor=0.2),
    CosineRestarts(cycles=3, cycle_warmup=4), WSD(shape="linear"), WSD(shape="cosine", floor=0.1), WSD(shape="sqrt", decay=20),
]  # fmt: skip


def values(config, num_steps):
    factor = schedule(config, num_steps)
    return [factor(step) for step in range(1, num_steps + 1)]


def rates_of(make, num_steps, **settings):
    """Rates by a scheduler of another library, which numbers steps from 0; entry i is our step i."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, **settings)
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(num_steps):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates[1:]


@pytest.mark.parametrize("warmup", [0, 7])
def test_linear_cosine_constant_and_polynomial_are_transformers(warmup):
    from transformers import optimization as hf

    n = 50
    cases = [
        (Linear(warmup=warmup), hf.get_linear_schedule_with_warmup, {"num_training_steps": n}),
        (Cosine(warmup=warmup, floor=0.0), hf.get_cosine_schedule_with_warmup, {"num_training_steps": n}),
        (Cosine(warmup=warmup, floor=0.25), hf.get_cosine_with_min_lr_schedule_with_warmup, {"num_training_steps": n, "min_lr_rate": 0.25}),
        (Constant(warmup=warmup), hf.get_constant_schedule_with_warmup, {}),
        (Polynomial(warmup=warmup, power=2.0, floor=0.1), hf.get_polynomial_decay_schedule_with_warmup, {"num_training_steps": n, "power": 2.0, "lr_end": 0.1}),
    ]
    for config, make, settings in cases:
        assert values(config, n) == pytest.approx(rates_of(make, n, num_warmup_steps=warmup, **settings), abs=1e-12), config.name


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_warmup_stable_decay_is_transformers(shape):
    from transformers.optimization import get_wsd_schedule as make

    settings = {"num_warmup_steps": 10, "num_decay_steps": 20, "num_training_steps": 60, "decay_type": shape}
    assert values(WSD(warmup=10, decay=20, shape=shape), 60) == pytest.approx(rates_of(make, 60, **settings), abs=1e-12)
    theirs = rates_of(make, 60, **settings, min_lr_ratio=0.2)  # there the floor lifts the warm-up too
    assert values(WSD(warmup=10, decay=20, shape=shape, floor=0.2), 60)[9:] == pytest.approx(theirs[9:], abs=1e-12)


@pytest.mark.parametrize(("config", "make", "settings"), [
    (Exponential(warmup=0, floor=0.01), torch.optim.lr_scheduler.ExponentialLR, {"gamma": 0.01 ** (1 / 40)}),
    (Linear(warmup=0, floor=0.3), torch.optim.lr_scheduler.LinearLR, {"start_factor": 1.0, "end_factor": 0.3, "total_iters": 40}),
    (Cosine(warmup=0, floor=0.1), torch.optim.lr_scheduler.CosineAnnealingLR, {"T_max": 40, "eta_min": 0.1}),
    (Polynomial(warmup=0, power=1.7), torch.optim.lr_scheduler.PolynomialLR, {"total_iters": 40, "power": 1.7}),
], ids=lambda x: getattr(x, "name", ""))  # fmt: skip
def test_without_warm_up_the_shapes_are_torchs(config, make, settings):
    assert values(config, 40) == pytest.approx(rates_of(make, 40, **settings), rel=1e-9, abs=1e-9)


def test_restarts_are_transformers_but_end_each_cycle_at_the_floor():
    from transformers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup as make

    theirs = rates_of(make, 90, num_warmup_steps=10, num_training_steps=90, num_cycles=4)
    ours = values(CosineRestarts(warmup=10, cycles=4), 90)
    ends = (30, 50, 70, 90)
    for step in range(1, 91):
        expected = 0.0 if step in ends else theirs[step - 1]  # theirs has restarted already
        assert ours[step - 1] == pytest.approx(expected, abs=1e-12), step


def test_restarts_warm_up_again_after_each_cycle():
    factor = schedule(CosineRestarts(warmup=0, cycles=4, cycle_warmup=5, floor=0.1), 100)
    assert [factor(s) for s in (25, 50, 75, 100)] == pytest.approx([0.1] * 4)
    assert [factor(s) for s in (30, 55, 80)] == pytest.approx([1.0] * 3)
    assert factor(28) == pytest.approx(3 / 5)
    assert factor(40) == pytest.approx(0.1 + 0.9 * 0.5)


@pytest.mark.parametrize(("num_steps", "cycles"), [(97, 3), (14, 6), (10, 10), (1000, 7), (11, 10)])
def test_every_cycle_comes_round_whatever_its_length(num_steps, cycles):
    """Lengths that are no whole numbers: rises are restarts, and there is one less of them than cycles."""
    found = values(CosineRestarts(warmup=0, cycles=cycles), num_steps)
    rises = sum(b > a for a, b in pairwise(found))
    assert rises == cycles - 1 if num_steps >= 2 * cycles else rises < cycles
    assert found[-1] == pytest.approx(0, abs=1e-12)


def test_stable_stretch_then_decay_of_a_share_of_all_steps():
    factor = schedule(WSD(warmup=10, decay=0.2, floor=0.1), 100)
    assert [factor(s) for s in (5, 10, 50, 80)] == [0.5, 1.0, 1.0, 1.0]
    assert factor(90) == pytest.approx(0.55) and factor(100) == pytest.approx(0.1)
    assert schedule(WSD(warmup=0, decay=16, shape="sqrt"), 100)(88) == pytest.approx(1 - math.sqrt(4 / 16))


@pytest.mark.parametrize("config", SETTINGS, ids=lambda c: f"{c.name}-{getattr(c, 'shape', '')}")
@pytest.mark.parametrize("num_steps", [1, 2, 41, 1000])
def test_every_schedule_stays_within_zero_and_one_and_ends_at_its_floor(config, num_steps):
    if config.name == "cosine_restarts" and num_steps < 41:
        config = replace(config, cycle_warmup=0, cycles=1)
    if config.name == "wsd" and config.decay >= 1 and num_steps < 41:
        config = replace(config, decay=0.5)
    found = values(config, num_steps)
    assert all(0 <= v <= 1 for v in found)
    assert found[-1] == pytest.approx(1.0 if config.name == "constant" else config.floor, abs=1e-12)
    if num_steps > 1:
        assert max(found) > 0.9


@pytest.mark.parametrize("config", SETTINGS, ids=lambda c: f"{c.name}-{getattr(c, 'shape', '')}")
def test_no_schedule_jumps_but_where_it_restarts(config):
    config = replace(config, warmup=0.1)
    if config.name == "wsd":
        config = replace(config, decay=0.5)
    found = values(config, 10_000)
    jumps = [i for i, (a, b) in enumerate(pairwise(found), 1) if abs(b - a) > 0.02]
    allowed = 2 * 4 if config.name == "cosine_restarts" else 1 if getattr(config, "shape", "") == "sqrt" else 0
    assert len(jumps) <= allowed, jumps  # a restart climbs over cycle_warmup = 4 steps; √ falls vertically at first
    assert found[999] == 1.0 and found[499] == pytest.approx(0.5)


def test_two_stage_auto_warm_up_follows_its_definition():
    factor = schedule(Constant(warmup=20, auto_warmup_steps=10, auto_warmup_rate=0.2), 100)
    for step in range(1, 11):
        assert factor(step) == pytest.approx(min(0.2, step / 20))
    assert factor(11) == pytest.approx(11 / 20) and factor(50) == 1.0
    assert schedule(Constant(warmup=0, auto_warmup_steps=3, auto_warmup_rate=0.05), 10)(2) == 0.05
    late = schedule(Constant(warmup=4, auto_warmup_steps=8, auto_warmup_rate=0.05), 20)
    assert [late(s) for s in (4, 8, 9)] == [0.05, 0.05, 1.0]


def test_a_fraction_means_what_it_says_in_decimals():
    assert [count_of(share, 100) for share in (0.07, 0.29, 0.57, 0.001, 0.0)] == [7, 29, 57, 1, 0]
    assert count_of(12, 100) == 12


@pytest.mark.parametrize(("config", "num_steps", "message"), [
    (Cosine(warmup=50), 40, r"warmup=50.*40 steps"),
    (WSD(warmup=10, decay=39), 40, r"39 steps of decay after 10 .* 40.*at most 30"),
    (WSD(warmup=0.5, decay=0.6), 40, r"24 steps of decay after 20 .* 40"),
    (CosineRestarts(warmup=0, cycles=4, cycle_warmup=12), 40, r"cycle_warmup=12: a cycle has 10 steps"),
    (CosineRestarts(warmup=0, cycles=12), 8, r"cycles=12: only 8 steps"),
    (Constant(auto_warmup_steps=40), 40, r"auto_warmup_steps=40: the run has 40 steps"),
])  # fmt: skip
def test_parts_that_do_not_fit_the_run_are_refused_with_numbers(config, num_steps, message):
    with pytest.raises(ConfigError, match=message):
        schedule(config, num_steps)


def test_every_named_schedule_is_tested_here():
    assert {c.name for c in SETTINGS} == set(SCHEDULES.options)
