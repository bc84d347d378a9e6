"""Every adaptation method on a quantised base: what it owes on any base it owes there, and codes are never written to."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltune import weights
from deltune.adapters.attach import (
    attach,
    detach,
    merge,
    merge_in_place,
    trainable,
    unmerge,
)
from deltune.adapters.config import METHODS, named
from deltune.adapters.files import load_adapter, save_adapter
from tests.adapted import shaken
from tests.test_adapters_methods import IDS, LAYERS, Mixed, config_of, far

LINEAR = [name for name in LAYERS if "linear" in named(name).delta_class().kinds]
methods = pytest.mark.parametrize("method", LINEAR)
BASES = {"nf4": {"kind": "nf4", "double": True}, "int8": {"kind": "int8"}}
bases = pytest.mark.parametrize("base", BASES)


def quantise_linear(model, places, base="nf4", dtype=None):
    """These layers quantised, in place; their weights as they were, by name."""
    before = {}
    for place in places:
        layer = model.get_submodule(place)
        before[place] = layer.weight.detach().clone()
        layer.weight = nn.Parameter(weights.quantise(layer.weight, dtype=dtype, **BASES[base]), requires_grad=False)
    return before


def mixed(base, dtype=torch.float32):
    """The methods' toy model with its linear layer quantised, and one with that layer's values in plain."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mixed().to(dtype).eval()
    plain = copy.deepcopy(model)
    before = quantise_linear(model, ["linear"], base)
    plain.linear.weight.data = weights.dequantised(model.linear.weight)
    return model, plain, before


def linear_config(method, **changes):
    return config_of(method, targets=["linear"], **changes)


def parts_of(tensor):
    return {name: part.clone() for name, part in tensor.parts().items()}


def same_parts(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@bases
@methods
def test_a_method_answers_and_learns_as_on_a_base_of_the_same_values(method, base):
    model, plain, _ = mixed(base)
    codes, before = parts_of(model.linear.weight), model(IDS)
    for one in (model, plain):
        attach(one, linear_config(method))
    if METHODS[method].start:
        assert 0 < far(model(IDS), before) <= METHODS[method].start
    else:
        assert torch.equal(model(IDS), before)
    for one in (model, plain):
        shaken(one.train())
        torch.manual_seed(0)  # some draw noise while they train
        one(IDS).square().sum().backward()
        one.eval()
    assert far(model(IDS), plain(IDS)) < 1e-5
    gradients = [{name: p.grad for name, p in trainable(one).items()} for one in (model, plain)]
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, expected in gradients[1].items():
        assert far(gradients[0][name], expected) < 1e-4, name
    assert same_parts(parts_of(model.linear.base_layer.weight), codes)


@methods
def test_an_adapter_on_a_quantised_base_is_saved_merged_and_taken_off(method, tmp_path):
    model, plain, _ = mixed("nf4")
    weight, codes = model.linear.weight, parts_of(model.linear.weight)
    shaken(attach(model, linear_config(method)))
    answer = model(IDS)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(mixed("nf4")[0], tmp_path)(IDS), answer)
    if named(method).delta_class().mergeable:
        merge_in_place(model)
        assert not weights.is_quantised(model.linear.base_layer.weight)
        assert far(model(IDS), answer) < 1e-5
        unmerge(model)
        assert model.linear.base_layer.weight is weight and torch.equal(model(IDS), answer)
        merged = merge(copy.deepcopy(model))
        assert type(merged.linear) is nn.Linear and not weights.is_quantised(merged.linear.weight)
        assert far(merged(IDS), answer) < 1e-5
    detach(model)
    assert model.linear.weight is weight and same_parts(parts_of(weight), codes)


# ---------------------------------------------------------------- starts that are taken out of W

RESIDUAL = ["pissa", "milora", "olora", "loftq", "dude", "psoft", "kasa", "osf", "melora"]


def residual_config(method, **changes):
    extra = {"init": "pissa"} if method == "melora" else {}
    return linear_config(method, **(extra | changes))


def relative(found, W):
    return float((found - W).norm() / W.norm())


def output_error(kind, W, x, how):
    """‖x (W' - W)ᵀ‖ / ‖x Wᵀ‖ at rank 8 on NF4, W' being what the layer has at the start."""
    layer = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False))
    layer[0].weight = nn.Parameter(weights.quantise(W, "nf4"), requires_grad=False)
    config = named("pissa", rank=8, targets=["0"], svd="full")
    if how == "original":
        attach(layer, config, originals={"0": W}.__getitem__)
    elif how == "rounded twice":
        rounded = weights.dequantised(layer[0].weight)
        attach(layer, config, originals={"0": rounded}.__getitem__)
    with torch.no_grad():
        return float((layer(x) - x @ W.T).norm() / (x @ W.T).norm())


def spread(out=192, n_in=256, seed=0):
    """A weight whose singular values fall like those of trained ones, some far above the rest."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(out, out, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(n_in, out, generator=generator))[0]
    return (U * torch.arange(1, out + 1).float().pow(-0.7)) @ V.T


def real():
    """A projection of the model that comes with the package, which was trained."""
    from deltune.models.config import ModelConfig
    from deltune.models.load import load

    return load(ModelConfig()).model.layers[0].self_attn.q_proj.weight.detach().float()


@pytest.mark.parametrize("W", [spread, real], ids=["random", "trained"])
def test_a_start_that_is_taken_out_before_rounding_is_nearer_than_none_and_one_that_is_rounded_twice_is_further(W):
    W = W()
    x = torch.randn(64, W.shape[1], generator=torch.Generator().manual_seed(1))
    once, plain, twice = (output_error("nf4", W, x, how) for how in ("original", "none", "rounded twice"))
    assert once < 0.95 * plain and plain < 0.95 * twice
