"""What every adaptation method owes, once over the whole table: a method is tested by being registered."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from deltune.adapters.adapted import Below
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
from deltune.adapters.config import DELTAS, METHODS, name_of, named
from deltune.adapters.delta import Delta
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.layers import kind_of, out_in
from deltune.adapters.magnitude import Magnitude
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.adapted import bits, same, shaken

ALL = sorted(METHODS)
LAYERS = [name for name in ALL if named(name).delta_class().kinds != ("model",)]  # those that go on single layers
methods = pytest.mark.parametrize("method", LAYERS)
mergeable = pytest.mark.parametrize("method", [name for name in LAYERS if named(name).delta_class().mergeable])
PLACES = {"embedding": ["embed"], "conv1d": ["conv"], "linear": ["linear"], "norm": ["norm"]}


class Mixed(nn.Module):
    """One layer of each kind that an adapter can be on, and a head that stays as it is."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = Conv1D(16, 8)
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 12)
        self.lm_head = nn.Linear(12, 11, bias=False)

    def forward(self, ids):
        return self.lm_head(torch.tanh(self.linear(self.norm(torch.tanh(self.conv(self.embed(ids)))))))


def model_of(dtype=torch.float32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Mixed()
    with torch.no_grad():
        model.conv.weight.normal_(std=0.4, generator=torch.Generator().manual_seed(seed))
        model.conv.bias.normal_(std=0.4, generator=torch.Generator().manual_seed(seed + 1))
    return model.to(dtype).eval()


def config_of(method, **changes):
    """The method on all kinds of layers that it takes, but small."""
    kinds = named(method).delta_class().kinds
    places = [place for kind, found in PLACES.items() if kind in kinds for place in found]
    return named(method, **({"targets": places} | dict(METHODS[method].small) | changes))


def places_of(method):
    return config_of(method).targets


def stops_gradient(method):
    config = named(method)
    return bool((Magnitude if config.magnitude else config.delta_class()).stops_gradient)


def deltas_of(model, name="default"):
    return {place: wrapper.adapters[name] for place, wrapper in wrappers(model) if name in wrapper.adapters}


IDS = torch.tensor([[1, 5, 2, 10], [0, 3, 3, 7]])


def far(one, other):
    """Largest difference, relative to the largest value."""
    return float((one - other).detach().abs().max() / other.detach().abs().max())


@methods
def test_a_new_adapter_changes_nothing_or_no_more_than_it_says(method):
    model = model_of()
    before = model(IDS)
    attach(model, config_of(method))
    if METHODS[method].start:
        assert 0 < far(model(IDS), before) <= METHODS[method].start
    else:
        assert torch.equal(model(IDS), before)


def declared(model):
    """Names of the parameters that the deltas hold; one that several share counts once, by its first name."""
    own = {id(p) for delta in deltas_of(model).values() for p in delta.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in own}


@methods
def test_gradients_reach_what_the_delta_declares_and_nothing_else(method):
    model = model_of()
    attach(model, config_of(method))
    shaken(model)
    expected = declared(model)
    assert expected and set(trainable(model)) == expected
    model(IDS).square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == expected
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable(model).values())


@methods
def test_gradients_equal_finite_differences(method):
    """A method that stops a gradient by intention says so, and its own test states the formula with that part fixed."""
    if stops_gradient(method):
        return
    for place in places_of(method):
        model = shaken(attach(model_of(torch.float64), config_of(method, targets=[place], dtype="auto")))
        layer = getattr(model, place)
        parameters = dict(layer.adapters["default"].named_parameters())
        values = [p.detach().clone().requires_grad_() for p in parameters.values()]
        x = IDS if place == "embed" else torch.randn(3, PLACE_WIDTH[place], dtype=torch.float64, requires_grad=True)

        def answer(x, *values, layer=layer, names=tuple(parameters)):
            changed = {f"adapters.default.{name}": value for name, value in zip(names, values, strict=True)}
            return torch.func.functional_call(layer, changed, (x,))

        assert torch.autograd.gradcheck(answer, (x, *values), atol=1e-5), place


PLACE_WIDTH = {"conv": 8, "norm": 16, "linear": 16}


@pytest.mark.parametrize("method", [name for name in LAYERS if named(name).delta_class().in_product_form])
def test_what_says_that_it_is_in_product_form_computes_that_product(method):
    """Value and gradients, so that a node may be used in `out`'s place; and exactly nothing where the start is nothing."""
    model = attach(model_of(torch.float64), config_of(method, dtype="auto"))
    inner = {place: delta.inner if isinstance(delta, Magnitude) else delta for place, delta in deltas_of(model).items()}
    inner = {place: delta for place, delta in inner.items() if delta.site.kind != "embedding"}

    def below(place):
        return Below(model.get_submodule(place), ["default"], 0)

    def products():
        return {place: (lambda B, A, scale: lambda x: scale * (x @ A.T) @ B.T)(*delta.running_product(below(place).stored())) for place, delta in inner.items()}

    xs = {place: torch.randn(3, PLACE_WIDTH[place], dtype=torch.float64) for place in inner}
    if not METHODS[method].start:
        assert not any(product(xs[place]).any() for place, product in products().items())
    shaken(model)
    for place, product in products().items():
        delta, x = inner[place], xs[place]
        answers = below(place)(x) + product(x), delta(x, below(place))
        assert torch.allclose(*answers, rtol=1e-12, atol=1e-14)
        parameters = list(delta.parameters())
        gradients = [torch.autograd.grad(y.square().sum(), parameters, allow_unused=True) for y in answers]
        assert all((a is None and b is None) or torch.allclose(a, b, rtol=1e-11, atol=1e-13) for a, b in zip(*gradients, strict=True))


@mergeable
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_merged_answers_as_the_adapter_and_unmerging_restores_every_bit(method, dtype, tolerance):
    model = shaken(attach(model_of(dtype), config_of(method, dtype="auto")))
    before, plain, adapted = bits(model), model_of(dtype)(IDS), model(IDS)
    assert (adapted - plain).abs().max() > 0.01
    merge_in_place(model)
    assert not same(bits(model), before)
    merged = model(IDS)
    assert far(merged, adapted) <= tolerance
    with disabled(model):
        assert torch.equal(model(IDS), plain)
    assert torch.equal(model(IDS), merged)
    unmerge(model)
    assert same(bits(model), before) and torch.equal(model(IDS), adapted)


@mergeable
def test_merging_for_good_leaves_a_plain_model(method):
    model = shaken(attach(model_of(), config_of(method)))
    adapted = model(IDS)
    assert merge(model) is model
    assert bits(model).keys() == bits(model_of()).keys()
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in model_of().modules()]
    assert torch.allclose(model(IDS), adapted, atol=1e-5)


@pytest.mark.parametrize("method", [name for name in LAYERS if not named(name).delta_class().mergeable])
def test_what_cannot_merge_says_why_and_stays_as_it_is(method):
    model = shaken(attach(model_of(), config_of(method)))
    before = model(IDS)
    for call in (merge, merge_in_place):
        with pytest.raises(AdapterError, match="cannot be merged, for ") as caught:
            call(model)
        assert named(method).delta_class().why_not_mergeable in str(caught.value)
    assert torch.equal(model(IDS), before)


@methods
def test_detaching_restores_every_bit_and_what_was_trainable(method):
    model = model_of()
    model.embed.weight.requires_grad_(False)
    before, layers = bits(model), dict(model.named_modules())
    shaken(attach(model, config_of(method, modules_to_save=["lm_head"])))
    if named(method).delta_class().mergeable:
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
    if not named(method).delta_class().mergeable and named(method).delta_class().reads_base:
        with pytest.raises(AdapterError, match="cannot be merged"):
            switch(model, ["one", "two"])
            model(IDS)
    else:
        switch(model, ["one", "two"])
        both = model(IDS)
        assert not torch.allclose(both, alone["one"]) and not torch.allclose(both, alone["two"])
        if named(method).delta_class().mergeable:
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
def test_auto_stores_the_adapter_in_float32_or_wider(method):
    for base, stored in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)):
        model = attach(model_of(base), config_of(method))
        assert {parameter.dtype for parameter in trainable(model).values()} == {stored}


class Wide(Mixed):
    """As Mixed, with layers so wide that sparse changes are sparse."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(11, 96), Conv1D(96, 48)
        self.norm, self.linear = nn.LayerNorm(96), nn.Linear(96, 48)


WIDTHS = {"embed": (11, 96), "conv": (48, 96), "norm": (96, 96), "linear": (96, 48)}
TOKENS = 101  # prime, so that a tensor whose size it divides holds activations


class FloatActivations(TorchDispatchMode):
    """Records the float32 tensors of at least `least` numbers a token that operations make."""

    def __init__(self, least):
        super().__init__()
        self.least, self.found = least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.float32, torch.float64, torch.complex64):
                continue
            if tensor.layout == torch.strided and tensor.numel() % TOKENS == 0 and tensor.numel() >= TOKENS * self.least:
                self.found.append(f"{function} {list(tensor.shape)} {tensor.dtype}")
        return result


def passed(method, place, base, stored):
    """Output and gradients of one layer in this type, with an adapter that is stored in that one: in float64, and what was in float32."""
    def made(dtype, stored):
        model = Wide().to(torch.bfloat16)
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=torch.Generator().manual_seed(i))
        return attach(model.eval().to(dtype), config_of(method, targets=[place], dtype=stored))

    model = made(base, stored)
    model.load_state_dict(shaken(made(torch.bfloat16, "float32"), size=0.1).state_dict())
    n_in, n_out = WIDTHS[place]
    generator = torch.Generator().manual_seed(1)
    ids, x, back = torch.randint(n_in, (TOKENS,), generator=generator), torch.randn(TOKENS, n_in, generator=generator), torch.randn(TOKENS, n_out, generator=generator)
    x = ids if place == "embed" else x.bfloat16().to(base).requires_grad_()
    back = back.bfloat16().to(base)
    layer = getattr(model, place)
    with FloatActivations(min(WIDTHS[place]) if place != "embed" else n_out) as wide:
        y = layer(x)
        y.backward(back)
    assert y.dtype == base
    gradients = [parameter.grad for parameter in trainable(model).values()]
    assert {gradient.dtype for gradient in gradients} == {parameter.dtype for parameter in trainable(model).values()}
    inputs = [] if place == "embed" else [x.grad]
    return [t.detach().double().flatten() for t in (y, *inputs, torch.cat([g.double().flatten() for g in gradients]))], wide.found


@methods
def test_a_float32_adapter_computes_in_the_activations_type_and_no_worse_than_one_in_that_type(method):
    for place in places_of(method):
        exact, _ = passed(method, place, torch.float64, "auto")
        short, _ = passed(method, place, torch.bfloat16, "bfloat16")
        found, wide = passed(method, place, torch.bfloat16, "auto")
        for one, other, true in zip(found, short, exact, strict=True):
            assert (one - true).norm() <= 1.1 * (other - true).norm() + 1e-3 * true.norm(), place
        assert not wide or named(method).delta_class().widens, (place, wide)


@methods
def test_dropout_is_off_in_eval_and_on_in_training(method):
    config = config_of(method)
    dropping = dataclasses.replace(config, dropout=0.5)
    if dropping.problems():  # a method that drops nothing, or one whose mathematics it would break, says so
        with pytest.raises(AdapterError, match=r"dropout (has no effect|cannot go)"):
            attach(model_of(), dropping)
        return
    plain, model = shaken(attach(model_of(), config)), shaken(attach(model_of(), dropping))
    assert torch.equal(model(IDS), plain(IDS))
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.allclose(model(IDS), model(IDS))


@methods
def test_the_start_depends_on_the_seed_and_the_layers_name_alone(method):
    base = model_of()

    def start(targets, seed=0, noise=0):
        with torch.random.fork_rng():
            torch.manual_seed(noise)
            torch.rand(noise)
            model = attach(copy.deepcopy(base), config_of(method, targets=targets), seed=seed)
            return {name: tensor for name, tensor in bits(model).items() if ".adapters." in name}

    everything = places_of(method)
    every, again = start(everything), start(everything, noise=5)
    assert same(every, again)
    torch.set_default_dtype(torch.float64)
    try:
        assert same(every, start(everything))
    finally:
        torch.set_default_dtype(torch.float32)
    if not named(method).delta_class().banks(config_of(method)):  # what layers share depends on which layers there are
        for place in everything:
            alone = start([place])
            assert same(alone, {name: every[name] for name in alone})


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
    assert torch.allclose(answer.float(), exact, atol=0.06 * float(exact.detach().abs().max()))


@methods
def test_training_lowers_the_loss_and_leaves_the_base_alone(method):
    model = model_of().train()
    base = bits(model)
    attach(model, config_of(method))
    target = torch.randint(11, IDS.shape, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.05)
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(0)  # some draw noise while they train
        for _ in range(20):
            loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), target.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert nn.functional.cross_entropy(model.eval()(IDS).flatten(0, 1), target.flatten()) < losses[0] - 0.1
    detach(model)
    assert same(bits(model), base)


@methods
def test_what_a_delta_declares_about_itself_is_true(method):
    model = shaken(attach(model_of(), config_of(method)))
    delta_class = named(method).delta_class()
    for place, delta in deltas_of(model).items():
        layer = getattr(model, place).base_layer
        assert kind_of(layer) in delta_class.kinds
        names = set(dict(delta.named_parameters())) | set(dict(delta.named_buffers()))
        assert set(delta.ranked()) <= names
        assert set(delta.lr_ratios()) <= set(dict(delta.named_parameters()))
        assert set(delta.leaves()) <= names and len(set(delta.leaves().values())) == len(delta.leaves())
        assert delta_class.additive == (delta_class.forward is Delta.forward)
        inner = delta.inner if isinstance(delta, Magnitude) else delta
        assert set(delta_class.factors or ()) <= set(dict(inner.named_parameters())) | set(dict(inner.named_buffers()))
        product = inner.product()
        if product is not None:
            left, right, scale = product
            W = out_in(layer, layer.weight)
            assert torch.allclose(scale * left @ right, inner.delta(W), atol=1e-6)


def test_every_parametrisation_has_a_named_method_and_every_method_has_its_facts():
    assert {method.choices["delta"] for method in METHODS.values()} == set(DELTAS)
    for name, method in METHODS.items():
        assert method.paper and method.formula, name
        config = named(name)
        assert not config.problems(), name
        if not any(key.startswith("optim.") for key in method.choices):
            assert METHODS[name_of(config)].adapter_choices == method.adapter_choices, name
