"""Schedules against closed forms and other libraries; groups; optimizer state to the bit."""

from __future__ import annotations

import json
import math

import pytest
import torch

from deltune.errors import CheckpointError, ConfigError
from deltune.optim.build import build_optimizer, load_optimizer_state, optimizer_state
from deltune.optim.config import (
    SCHEDULES,
    SGD,
    WSD,
    AdamW,
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    Linear,
    Polynomial,
)
from deltune.optim.groups import parameter_groups
from deltune.optim.schedules import schedule

SETTINGS = [
    Constant(), Linear(floor=0.1), Cosine(), Exponential(floor=0.01), Polynomial(power=3.0, floor=0.2),
    CosineRestarts(cycles=3, cycle_warmup=4), WSD(shape="linear"), WSD(shape="cosine", floor=0.1), WSD(shape="sqrt", decay=20),
]  # fmt: skip


def transformers_factors(make, num_steps, **settings):
    """Factors by transformers' scheduler; it numbers steps from 0, so its step i is our i."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, **settings)
    factors = [scheduler.get_last_lr()[0]]
    for _ in range(num_steps):
        optimizer.step()
        scheduler.step()
        factors.append(scheduler.get_last_lr()[0])
    return factors


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
        theirs = transformers_factors(make, n, num_warmup_steps=warmup, **settings)
        ours = [schedule(config, n)(i) for i in range(1, n + 1)]
        assert ours == pytest.approx(theirs[1:], abs=1e-12), config.name


def test_exponential_is_torchs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.01 ** (1 / 40))
    ours = schedule(Exponential(warmup=0, floor=0.01), 40)
    for step in range(1, 41):
        optimizer.step()
        scheduler.step()
        assert ours(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)


def test_restarts_return_to_the_peak_and_reach_the_floor_each_cycle():
    factor = schedule(CosineRestarts(warmup=0, cycles=4, cycle_warmup=5, floor=0.1), 100)
    assert [factor(s) for s in (25, 50, 75, 100)] == pytest.approx([0.1] * 4)
    assert [factor(s) for s in (30, 55, 80)] == pytest.approx([1.0] * 3)
    assert factor(28) == pytest.approx(3 / 5)
    first_half = schedule(CosineRestarts(warmup=0, cycles=1), 10)
    assert [first_half(s) for s in range(1, 11)] == pytest.approx([(1 + math.cos(math.pi * s / 10)) / 2 for s in range(1, 11)])


def test_wsd_is_flat_then_decays_to_its_floor():
    factor = schedule(WSD(warmup=10, decay=0.2, floor=0.1), 110)
    assert [factor(s) for s in (5, 10, 50, 90)] == [0.5, 1.0, 1.0, 1.0]
    assert factor(100) == pytest.approx(0.55) and factor(110) == pytest.approx(0.1)
    assert schedule(WSD(warmup=0, decay=16, shape="sqrt"), 100)(88) == pytest.approx(1 - math.sqrt(4 / 16))


@pytest.mark.parametrize("config", SETTINGS, ids=lambda c: f"{c.name}-{getattr(c, 'shape', '')}")
@pytest.mark.parametrize("num_steps", [1, 2, 41, 1000])
def test_every_schedule_stays_within_zero_and_one_and_ends_at_its_floor(config, num_steps):
    from dataclasses import replace

    if config.name == "cosine_restarts" and num_steps < 41:
        config = replace(config, cycle_warmup=0, cycles=1)
    if config.name == "wsd" and config.decay >= 1 and num_steps < 41:
        config = replace(config, decay=0.5)
    factor = schedule(config, num_steps)
    values = [factor(s) for s in range(1, num_steps + 1)]
    assert all(0 <= v <= 1 for v in values)
    end = 1.0 if config.name == "constant" else config.floor
    assert values[-1] == pytest.approx(end, abs=1e-12)
    if num_steps > 1:
        assert max(values) > 0.9


def test_two_stage_auto_warm_up_follows_its_definition():
    config = Constant(warmup=20, auto_warmup_steps=10, auto_warmup_rate=0.2)
    factor = schedule(config, 100)
    for step in range(1, 11):
        assert factor(step) == pytest.approx(min(0.2, step / 20))
    assert factor(11) == pytest.approx(11 / 20) and factor(50) == 1.0
    assert schedule(Constant(warmup=0, auto_warmup_steps=3, auto_warmup_rate=0.05), 10)(2) == 0.05


def test_parts_that_do_not_fit_the_run_are_refused_with_numbers():
    with pytest.raises(ConfigError, match=r"warmup=50.*40 steps"):
        schedule(Cosine(warmup=50), 40)
    with pytest.raises(ConfigError, match=r"decay=39.*30 steps"):
        schedule(WSD(warmup=10, decay=39), 40)
    with pytest.raises(ConfigError, match=r"cycle_warmup=12"):
        schedule(CosineRestarts(warmup=0, cycles=4, cycle_warmup=12), 40)


def test_every_named_schedule_is_tested_here():
    assert {c.name for c in SETTINGS} == set(SCHEDULES.options)


def small_model():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"lin": torch.nn.Linear(4, 3), "norm": torch.nn.LayerNorm(3), "head": torch.nn.Linear(3, 2, bias=False)})


def test_groups_split_by_decay_and_rate_and_hold_each_parameter_once():
    model = small_model()
    model["norm"].bias.requires_grad_(False)
    config = AdamW(lr=1e-3, weight_decay=0.1, lr_scales={"head*": 2.0, "*weight": 5.0})
    groups = parameter_groups(model.named_parameters(), config)
    found = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    assert found == {
        "lin.weight": (5e-3, 0.1), "lin.bias": (1e-3, 0.0), "norm.weight": (5e-3, 0.0), "head.weight": (2e-3, 0.1),
    }
    own = parameter_groups(model.named_parameters(), AdamW(lr_values={"head*": 7e-5}))
    assert {g["lr"] for g in own if "head.weight" in g["names"]} == {7e-5}


def test_a_rate_for_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"heda\*.*head\.weight"):
        parameter_groups(small_model().named_parameters(), AdamW(lr_scales={"heda*": 2.0}))
    model = small_model().requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter is trained"):
        parameter_groups(model.named_parameters(), AdamW())


@pytest.mark.parametrize("config", [AdamW(lr=0.1, weight_decay=0.01), SGD(lr=0.1, momentum=0.9, nesterov=True)], ids=lambda c: c.name)
def test_state_goes_through_plain_values_and_comes_back_to_the_bit(config):
    def step(model, optimizer, n):
        for i in range(n):
            optimizer.zero_grad()
            x = torch.linspace(-1, 1 + i, 8).reshape(2, 4)
            model["head"](model["norm"](model["lin"](x))).square().sum().backward()
            optimizer.step()

    straight = small_model()
    optimizer = build_optimizer(parameter_groups(straight.named_parameters(), config), config)
    step(straight, optimizer, 3)
    resumed = small_model()
    resumed.load_state_dict(straight.state_dict())
    tensors, plain = optimizer_state(optimizer)
    other = build_optimizer(parameter_groups(resumed.named_parameters(), config), config)
    load_optimizer_state(other, {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(plain)))
    step(straight, optimizer, 2)
    step(resumed, other, 2)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_adamw_is_the_papers_formula():
    p = torch.nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    config = AdamW(lr=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer = build_optimizer(parameter_groups([("w", p)], config), config)
    value, m, v = 2.0, 0.0, 0.0
    for t, g in enumerate((0.3, -1.0, 0.7), start=1):
        p.grad = torch.tensor([[g]], dtype=torch.float64)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        value -= 0.1 * 0.5 * value
        value -= 0.1 * (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.9**t)) + 1e-6)
        assert p.item() == pytest.approx(value, rel=1e-9)


def test_state_of_other_parameters_is_refused():
    config = AdamW()
    model = small_model()
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), config), config)
    with pytest.raises(CheckpointError, match="does not train"):
        load_optimizer_state(optimizer, {"other|exp_avg": torch.zeros(3, 4)}, {})
    with pytest.raises(CheckpointError, match=r"\(9, 9\)"):
        load_optimizer_state(optimizer, {"lin.weight|exp_avg": torch.zeros(9, 9)}, {})
