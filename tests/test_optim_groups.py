"""Optimizers: groups of parameters, the papers' formulas, and state to the bit."""

from __future__ import annotations

import json
import math

import pytest
import torch

from deltune.errors import CheckpointError, ConfigError
from deltune.optim.build import build_optimizer, load_optimizer_state, optimizer_state, state_bytes
from deltune.optim.config import SGD, AdamW
from deltune.optim.groups import parameter_groups


def small_model():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"lin": torch.nn.Linear(4, 3), "norm": torch.nn.LayerNorm(3), "head": torch.nn.Linear(3, 2, bias=False)})


def optimizer_of(model, config):
    return build_optimizer(parameter_groups(model.named_parameters(), config), config)


def take_steps(model, optimizer, number):
    for i in range(number):
        optimizer.zero_grad()
        x = torch.linspace(-1, 1 + i, 8).reshape(2, 4)
        model["head"](model["norm"](model["lin"](x))).square().sum().backward()
        optimizer.step()


def through_json(value):
    return json.loads(json.dumps(value))


# -- groups


def test_groups_split_by_decay_and_rate_and_hold_each_parameter_once():
    model = small_model()
    model["norm"].bias.requires_grad_(False)
    config = AdamW(lr=1e-3, weight_decay=0.1, lr_scales={"head*": 2.0, "*weight": 5.0})
    groups = parameter_groups(model.named_parameters(), config)
    found = [(name, g["lr"], g["weight_decay"]) for g in groups for name in g["names"]]
    assert sorted(found) == [
        ("head.weight", 2e-3, 0.1), ("lin.bias", 1e-3, 0.0), ("lin.weight", 5e-3, 0.1), ("norm.weight", 5e-3, 0.0),
    ]
    assert all(len(g["params"]) == len(g["names"]) for g in groups)
    assert [p for g in groups for p in g["params"]] == [dict(model.named_parameters())[n] for n, _, _ in found]
    own = parameter_groups(model.named_parameters(), AdamW(lr_values={"head*": 7e-5}))
    assert {g["lr"] for g in own if "head.weight" in g["names"]} == {7e-5}


def test_a_name_pattern_keeps_a_matrix_from_decaying():
    groups = parameter_groups(small_model().named_parameters(), AdamW(weight_decay=0.1, no_decay=["head*"]))
    assert {n for g in groups if g["weight_decay"] for n in g["names"]} == {"lin.weight"}


def test_tied_weights_are_moved_once():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False), "b": torch.nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    assert [g["names"] for g in parameter_groups(model.named_parameters(), AdamW())] == [["a.weight"]]


@pytest.mark.parametrize(("config", "message"), [
    (AdamW(lr_scales={"heda*": 2.0}), r"lr_scales: the pattern 'heda\*' matches no trained parameter\. Nearest: head\.weight"),
    (AdamW(lr_values={"*eight_v": 2.0}), r"lr_values: the pattern '\*eight_v' .*weight"),
    (AdamW(lr_scales={"*weight": 2.0, "head*": 3.0}), r"'head\*' has no effect.*'\*weight' before it takes head\.weight"),
    (AdamW(lr_values={"head*": -1e-4}), r"lr_values: 'head\*' is given -0\.0001"),
    (AdamW(lr_scales={"head*": 0.0}), r"lr_scales: 'head\*' is given 0; .*model\.disable"),
    (AdamW(lr_scales={"head*": math.inf}), "is given inf"),
    (AdamW(weight_decay=0.1, no_decay=["embed*"]), r"no_decay: the pattern 'embed\*' matches no"),
])  # fmt: skip
def test_a_pattern_or_rate_that_cannot_be_meant_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        parameter_groups(small_model().named_parameters(), config)


def test_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="no parameter is trained"):
        parameter_groups(small_model().requires_grad_(False).named_parameters(), AdamW())


# -- formulas


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


def test_sgd_is_nesterovs_formula_with_coupled_decay_left_out_of_vectors():
    p = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    config = SGD(lr=0.1, weight_decay=0.5, momentum=0.9, nesterov=True)
    optimizer = build_optimizer(parameter_groups([("w", p)], config), config)
    value, velocity = 2.0, 0.0
    for g in (0.3, -1.0, 0.7):
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        velocity = 0.9 * velocity + g
        value -= 0.1 * (g + 0.9 * velocity)
        assert p.item() == pytest.approx(value, rel=1e-9)


# -- state

CONFIGS = [AdamW(lr=0.1, weight_decay=0.01), SGD(lr=0.1, momentum=0.9, nesterov=True), SGD(lr=0.1)]


@pytest.mark.parametrize("config", CONFIGS, ids=["adamw", "momentum", "sgd"])
def test_state_goes_through_plain_values_and_comes_back_to_the_bit(config):
    straight, resumed = small_model(), small_model()
    optimizer = optimizer_of(straight, config)
    take_steps(straight, optimizer, 3)
    resumed.load_state_dict(straight.state_dict())
    tensors, description = optimizer_state(optimizer)
    other = optimizer_of(resumed, config)
    load_optimizer_state(other, {k: v.clone() for k, v in tensors.items()}, through_json(description))
    take_steps(straight, optimizer, 2)
    take_steps(resumed, other, 2)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("config", CONFIGS, ids=["adamw", "momentum", "sgd"])
def test_bytes_foretold_are_the_bytes_of_the_state(config):
    model = small_model()
    optimizer = optimizer_of(model, config)
    take_steps(model, optimizer, 1)
    held = sum(t.numel() * t.element_size() for t in optimizer_state(optimizer)[0].values() if t.ndim)
    assert state_bytes(model.parameters(), config) == held


def test_a_loaded_state_shares_no_memory_with_what_it_came_from():
    model, config = small_model(), AdamW(lr=0.1)
    optimizer = optimizer_of(model, config)
    take_steps(model, optimizer, 1)
    tensors, description = optimizer_state(optimizer)
    kept = {k: v.clone() for k, v in tensors.items()}
    other = optimizer_of(model, config)
    load_optimizer_state(other, kept, description)
    before = {k: v.clone() for k, v in kept.items()}
    take_steps(model, other, 1)
    assert all(torch.equal(kept[k], before[k]) for k in kept)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda t, d: t.pop("lin.weight|exp_avg_sq"), r"lacks lin\.weight\|exp_avg_sq"),
    (lambda t, d: t.update({"lin.weight|max_exp_avg_sq": torch.zeros(3, 4)}), r"1 entries too many, first lin\.weight\|max_exp"),
    (lambda t, d: t.update({"lin.weight|exp_avg": torch.zeros(9, 9)}), r"\(9, 9\)"),
    (lambda t, d: t.update({"lin.weight|exp_avg": torch.zeros(3, 4, dtype=torch.float16)}), "float16"),
    (lambda t, d: d["entries"].update({"other": ["exp_avg"]}), "remembers other, which this run does not train"),
    (lambda t, d: d.update({"optimizer": "SGD"}), "is of SGD, this run uses AdamW"),
], ids=["missing", "left over", "shape", "type", "parameter", "optimizer"])  # fmt: skip
def test_state_that_does_not_fit_is_refused_and_changes_nothing(damage, message):
    model, config = small_model(), AdamW(lr=0.1)
    optimizer = optimizer_of(model, config)
    take_steps(model, optimizer, 1)
    tensors, description = optimizer_state(optimizer)
    tensors, description = dict(tensors), through_json(description)
    damage(tensors, description)
    other = optimizer_of(model, config)
    with pytest.raises(CheckpointError, match=message):
        load_optimizer_state(other, tensors, description)
    assert not other.state
