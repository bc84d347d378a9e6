"""What every adaptation method owes, once over the whole table: a method is tested by being registered."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltune.adapters.attach import (
    attach,
    detach,
    disabled,
    merge,
    merge_in_place,
    switch,
    trainable,
    unmerge,
)
from deltune.adapters.config import ADAPTERS, METHODS
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.layers import kind_of

methods = pytest.mark.parametrize("method", sorted(METHODS))
PLACES = {"embedding": "embed", "conv1d": "conv", "linear": "linear"}


class Mixed(nn.Module):
    """One layer of each kind that an adapter can be on, and a head that stays as it is."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = Conv1D(8, 6)
        self.linear = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, ids):
        return self.lm_head(torch.tanh(self.linear(torch.tanh(self.conv(self.embed(ids))))))


def model_of(dtype=torch.float32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Mixed()
    with torch.no_grad():
        model.conv.weight.normal_(std=0.4, generator=torch.Generator().manual_seed(seed))
        model.conv.bias.normal_(std=0.4, generator=torch.Generator().manual_seed(seed + 1))
    return model.to(dtype).eval()


def config_of(method, **changes):
    """The method's defaults on all kinds of layers that it takes, but small."""
    config_class = ADAPTERS.resolve(method)
    names = {field.name for field in dataclasses.fields(config_class)}
    places = [place for kind, place in PLACES.items() if kind in config_class.delta().kinds]
    small = {"rank": 2} if "rank" in names else {}
    return config_class(**({"targets": places} | small | changes))


def shaken(model, seed=0, names=("default",)):
    """Move adapters away from their start, so that no term of their formula is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".adapters.{adapter}." in name for adapter in names):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


IDS = torch.tensor([[1, 5, 2, 10], [0, 3, 3, 7]])


@methods
def test_a_new_adapter_changes_nothing(method):
    model = model_of()
    before = model(IDS)
    attach(model, config_of(method))
    assert torch.equal(model(IDS), before)


@methods
def test_gradients_reach_what_the_delta_declares_and_nothing_else(method):
    model = model_of()
    attach(model, config_of(method))
    shaken(model)
    declared = {
        f"{place}.adapters.default.{name}"
        for place in config_of(method).targets
        for name, _ in getattr(model, place).adapters["default"].named_parameters()
    }
    assert declared and set(trainable(model)) == declared
    model(IDS).square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == declared
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable(model).values())


@methods
@pytest.mark.parametrize("kind", sorted(PLACES))
def test_gradients_equal_finite_differences(method, kind):
    place = PLACES[kind]
    if place not in config_of(method).targets:
        pytest.skip(f"{method} does not go on {kind}")
    model = shaken(attach(model_of(torch.float64), config_of(method, targets=[place], dtype="auto")))
    layer = getattr(model, place)
    names = list(dict(layer.adapters["default"].named_parameters()))
    parameters = [p.detach().clone().requires_grad_() for p in layer.adapters["default"].parameters()]
    x = IDS if kind == "embedding" else torch.randn(3, layer.site.n_in, dtype=torch.float64, requires_grad=True)

    def answer(x, *values):
        changed = {f"adapters.default.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(layer, changed, (x,))

    assert torch.autograd.gradcheck(answer, (x, *parameters))


@methods
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_merged_answers_as_the_adapter_and_unmerging_restores_every_bit(method, dtype, tolerance):
    model = shaken(attach(model_of(dtype), config_of(method, dtype="auto")))
    before, plain, adapted = bits(model), model_of(dtype)(IDS), model(IDS)
    assert (adapted - plain).abs().max() > 0.01
    merge_in_place(model)
    assert not same(bits(model), before)
    merged = model(IDS)
    assert (merged - adapted).abs().max() <= tolerance * adapted.abs().max()
    with disabled(model):
        assert torch.equal(model(IDS), plain)
    assert torch.equal(model(IDS), merged)
    unmerge(model)
    assert same(bits(model), before) and torch.equal(model(IDS), adapted)


@methods
def test_merging_for_good_leaves_a_plain_model(method):
    model = shaken(attach(model_of(), config_of(method)))
    adapted = model(IDS)
    assert merge(model) is model
    assert bits(model).keys() == bits(model_of()).keys()
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in model_of().modules()]
    assert torch.allclose(model(IDS), adapted, atol=1e-5)


@methods
def test_detaching_restores_every_bit_and_what_was_trainable(method):
    model = model_of()
    model.embed.weight.requires_grad_(False)
    before, layers = bits(model), dict(model.named_modules())
    shaken(attach(model, config_of(method, modules_to_save=["lm_head"])))
    merge_in_place(model)
    detach(model)
    assert same(bits(model), before)
    assert dict(model.named_modules()) == layers
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["embed.weight"]
    assert vars(model).keys() == vars(model_of()).keys()


@methods
def test_a_saved_adapter_is_read_back_exactly(method, tmp_path):
    model = shaken(attach(model_of(), config_of(method, modules_to_save=["lm_head"])))
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(model_of(), tmp_path / "adapter")
    assert torch.equal(again(IDS), model(IDS))
    assert same(bits(again), bits(model))
    assert not trainable(again)
    assert trainable(load_adapter(model_of(), tmp_path / "adapter", trainable=True)).keys() == trainable(model).keys()


@methods
def test_two_adapters_run_together_alone_and_not_at_all(method):
    model = model_of()
    attach(model, config_of(method), name="one")
    attach(model, config_of(method), name="two", seed=1)
    shaken(model, names=["one"], seed=1)
    shaken(model, names=["two"], seed=2)
    alone = {name: detach(copy.deepcopy(model), other)(IDS) for name, other in (("one", "two"), ("two", "one"))}
    for name in alone:
        switch(model, name)
        assert torch.equal(model(IDS), alone[name])
        assert all(f".adapters.{name}." in parameter for parameter in trainable(model))
    switch(model, ["one", "two"])
    both = model(IDS)
    assert not torch.allclose(both, alone["one"]) and not torch.allclose(both, alone["two"])
    merge_in_place(model)
    assert torch.allclose(model(IDS), both, atol=1e-5)
    switch(model, [])
    assert torch.equal(model(IDS), model_of()(IDS))
    assert not trainable(model)


@methods
def test_a_bfloat16_base_takes_a_float32_adapter(method):
    model = shaken(attach(model_of(torch.bfloat16), config_of(method)))
    assert all(parameter.dtype == torch.float32 for parameter in trainable(model).values())
    answer = model(IDS)
    assert answer.dtype == torch.bfloat16
    exact = shaken(attach(model_of(torch.bfloat16).float(), config_of(method)))
    assert torch.allclose(answer.float(), exact(IDS), atol=0.05)
    answer.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainable(model).values())


@methods
def test_auto_stores_the_adapter_in_the_bases_type(method):
    model = attach(model_of(torch.bfloat16), config_of(method, dtype="auto"))
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.bfloat16}


@methods
def test_dropout_is_off_in_eval_and_on_in_training(method):
    config = config_of(method)
    dropping = dataclasses.replace(config, dropout=0.5)
    plain, model = shaken(attach(model_of(), config)), shaken(attach(model_of(), dropping))
    assert torch.equal(model(IDS), plain(IDS))
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.allclose(model(IDS), model(IDS))


@methods
def test_the_start_depends_on_the_seed_and_the_layers_name_alone(method):
    def start(targets, seed=0, noise=0):
        with torch.random.fork_rng():
            torch.manual_seed(noise)
            torch.rand(noise)
            return {name: p.detach() for name, p in trainable(attach(model_of(), config_of(method, targets=targets), seed=seed)).items()}

    everything = config_of(method).targets
    every, again = start(everything), start(everything, noise=5)
    assert same(every, again)
    torch.set_default_dtype(torch.float64)
    try:
        assert same(every, {name: tensor.float() for name, tensor in start(everything).items()})
    finally:
        torch.set_default_dtype(torch.float32)
    for place in everything:
        alone = start([place])
        assert same(alone, {name: every[name] for name in alone})
    other = start(everything, seed=1)
    drawn = [name for name in every if every[name].unique().numel() > 2]
    assert all(not torch.equal(every[name], other[name]) for name in drawn)


@methods
def test_attaching_on_the_meta_device_touches_no_weight(method):
    with torch.device("meta"):
        model = Mixed()
    attach(model, config_of(method))
    real = attach(model_of(), config_of(method))
    assert {n: p.shape for n, p in trainable(model).items()} == {n: p.shape for n, p in trainable(real).items()}
    assert all(parameter.is_meta for parameter in model.parameters())


@methods
def test_a_batch_of_one_answers_as_within_a_batch(method):
    model = shaken(attach(model_of(), config_of(method)))
    assert torch.allclose(model(IDS[:1]), model(IDS)[:1], atol=1e-6)
    assert torch.allclose(model(IDS[0, :1]), model(IDS)[0, :1], atol=1e-6)


@methods
def test_a_layer_in_bfloat16_autocast_answers_in_bfloat16(method):
    model = shaken(attach(model_of(), config_of(method)))
    exact = model(IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = model(IDS)
    assert answer.dtype == torch.bfloat16
    assert torch.allclose(answer.float(), exact, atol=0.05)


@methods
def test_training_lowers_the_loss_and_leaves_the_base_alone(method):
    model = model_of().train()
    base = bits(model)
    attach(model, config_of(method))
    target = torch.randint(11, IDS.shape, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    detach(model)
    assert same(bits(model), base)


@methods
def test_what_a_delta_declares_about_itself_is_true(method):
    delta_class = ADAPTERS.resolve(method).delta()
    model = attach(model_of(), config_of(method))
    for place in config_of(method).targets:
        delta = getattr(model, place).adapters["default"]
        assert kind_of(getattr(model, place).base_layer) in delta_class.kinds
        assert set(delta_class.factors or ()) <= set(dict(delta.named_parameters()))
        assert set(delta.ranked()) <= set(delta.state_dict())
        assert set(delta.leaves()) == set(delta.state_dict())
        assert len(set(delta.leaves().values())) == len(delta.leaves())
        product = delta.product()
        if product is not None:
            left, right, scale = product
            assert torch.allclose(scale * left @ right, delta.delta(None), atol=1e-7)
