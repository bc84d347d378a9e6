"""Every adaptation method on a quantised base: what it owes on any base it owes there, and codes are never written to."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from deltune import weights
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
from deltune.adapters.config import METHODS, named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.fused import fuse
from deltune.adapters.quantised import follow_starts
from deltune.adapters.schedules import over_time
from deltune.errors import AdapterError
from deltune.weights.arithmetic import BLOCK_ELEMENTS_CPU
from tests.adapted import shaken
from tests.test_adapters_methods import IDS, LAYERS, Mixed, config_of, far
from tests.tiny import tiny_model

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


def refused(method):
    """Why a method cannot be on a quantised base alone, as it says itself; empty where it can."""
    try:
        attach(mixed("nf4")[0], linear_config(method))
    except AdapterError as error:
        return str(error)
    return ""


def parts_of(tensor):
    return {name: part.clone() for name, part in tensor.parts().items()}


def same_parts(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@bases
@methods
def test_a_method_answers_and_learns_as_on_a_base_of_the_same_values(method, base):
    if refused(method):
        assert re.fullmatch(r"linear: .*, and this layer's weight is rounded already: give originals, .*", refused(method))
        return
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
    if refused(method):
        return
    model, _, _ = mixed("nf4")
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

RESIDUAL = ["pissa", "milora", "olora", "loftq", "dude", "psoft", "kasa", "melora"]
residual = pytest.mark.parametrize("method", RESIDUAL)


def residual_config(method, **changes):
    return linear_config(method, **(({"init": "pissa"} if method == "melora" else {}) | changes))


def taken(method, base="nf4", dtype=torch.float32, **changes):
    """The toy model with an adapter whose start was taken out of its quantised layer, and that layer's weight before."""
    model, _, before = mixed(base, dtype)
    return attach(model, residual_config(method, **changes), originals=before.__getitem__), before["linear"]


def test_these_are_all_methods_that_take_their_start_out_of_the_weight():
    found = []
    for method in LINEAR:
        model, _, before = mixed("nf4")
        attach(model, residual_config(method), originals=before.__getitem__)
        delta = model.linear.adapters["default"]
        found += [method] if delta.taken_out() is not None and delta.starts_from_original else []
    assert sorted(found) == sorted(RESIDUAL)


@bases
@residual
def test_a_start_is_taken_out_of_the_full_weight_which_is_rounded_once(method, base):
    model, W = taken(method, base)
    layer, delta = model.linear, model.linear.adapters["default"]
    B, A, scale = delta.taken_out()
    start = scale * B @ A
    assert start.norm() > 0
    expected = start + weights.dequantised(weights.quantise(W - start, **BASES[base]))
    assert torch.allclose(weights.dequantised(layer.base_layer.weight), expected, atol=1e-5)
    with disabled(model):
        base_answer = model(IDS)
    assert far(model(IDS), base_answer) <= METHODS[method].start  # nothing to the bit, or no more than on any base


def test_a_layer_that_is_stored_turned_is_rounded_as_any_other():
    conv = nn.Sequential(Conv1D(12, 16)).eval()
    W = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    conv[0].weight = nn.Parameter(weights.quantise(W, "nf4").T, requires_grad=False)
    linear = nn.Sequential(nn.Linear(16, 12)).eval()
    linear[0].weight = nn.Parameter(weights.quantise(W, "nf4"), requires_grad=False)
    nn.init.zeros_(linear[0].bias)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    for method in ("pissa", "dude", "loftq"):
        config = named(method, targets=["0"], rank=4)
        one, two = (shaken(attach(copy.deepcopy(model), config, originals=lambda name: W)) for model in (conv, linear))
        assert torch.allclose(one(x), two(x), atol=1e-5)
        assert same_parts(parts_of(detach(one)[0].weight.T), parts_of(linear[0].weight))


def test_the_type_that_is_computed_in_does_not_change_how_a_layer_is_rounded(tmp_path):
    model, W = taken("pissa")
    save_adapter(shaken(model), tmp_path)
    short, plain, _ = mixed("nf4")
    short = mixed("nf4", torch.bfloat16)[0]
    short.linear.weight = nn.Parameter(weights.quantise(W, "nf4", dtype=torch.bfloat16), requires_grad=False)
    for place in ("embed", "conv", "norm", "lm_head"):
        short.get_submodule(place).load_state_dict({name: t.bfloat16() for name, t in plain.get_submodule(place).state_dict().items()})
    load_adapter(short, tmp_path, originals={"linear": W}.__getitem__)
    assert same_parts(parts_of(short.linear.base_layer.weight), parts_of(model.linear.base_layer.weight))


@residual
def test_such_an_adapter_is_the_same_function_on_a_fresh_base(method, tmp_path):
    model, W = taken(method)
    shaken(model)
    answer = model(IDS)
    save_adapter(model, tmp_path)
    again = load_adapter(mixed("nf4")[0], tmp_path, originals={"linear": W}.__getitem__)
    assert torch.equal(again(IDS), answer)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"].startswith("DELTUNE_")
    with pytest.raises(AdapterError, match=r"taken out of this layer before it was quantised.*give originals"):
        load_adapter(mixed("nf4")[0], tmp_path)
    with pytest.raises(AdapterError, match="quantised weights are others"):
        load_adapter(mixed("nf4")[0], tmp_path, originals={"linear": W.flip(0)}.__getitem__)
    plain = Mixed().eval()
    plain.load_state_dict(mixed("nf4")[1].state_dict())
    plain.linear.weight.data = W.clone()
    attached = load_adapter(plain, tmp_path)  # what is taken out and what is added are the same there
    assert far(attached(IDS), answer) < 0.2


@residual
def test_taking_it_off_gives_the_base_back_and_merging_keeps_the_function(method):
    fresh = mixed("nf4")[0]
    model, _ = taken(method)
    merged, copied = shaken(model)(IDS), copy.deepcopy(model)
    merge_in_place(model)
    assert far(model(IDS), merged) < 1e-5
    unmerge(model)
    assert torch.equal(model(IDS), merged)
    assert far(merge(copied)(IDS), merged) < 1e-5
    detach(model)
    assert same_parts(parts_of(model.linear.weight), parts_of(fresh.linear.weight))


def test_a_second_adapter_finds_the_weight_as_it_is():
    model, W = taken("pissa")
    beside = weights.held_beside(model.linear.base_layer.weight)
    attach(model, residual_config("loftq"), name="two", originals={"linear": W}.__getitem__)
    assert all(torch.equal(a, b) for a, b in zip(beside, weights.held_beside(model.linear.base_layer.weight), strict=True))
    both = model(IDS)
    switch(model, "two")
    assert torch.allclose(model(IDS), both, atol=1e-6)
    with pytest.raises(AdapterError, match="rounded without the start of adapter default, and 'two' is a change of that weight"):
        save_adapter(model, "/nowhere", name="two")
    detach(model, "default")  # another adapter stands on this weight still
    assert weights.held_beside(model.linear.base_layer.weight) is not None


def test_a_start_that_cannot_be_leaves_the_base_as_it_was():
    model, _, before = mixed("nf4")
    codes = parts_of(model.linear.weight)
    with pytest.raises(AdapterError, match=r"before it was quantised is \[3, 2\], and the layer has \[12, 16\]"):
        attach(model, residual_config("pissa"), originals=lambda name: torch.zeros(3, 2))

    class Stacked(nn.Sequential):
        pass

    two = Stacked(nn.Linear(16, 16), nn.Linear(16, 16))
    before = quantise_linear(two, ["0", "1"])
    codes = parts_of(two[0].weight)
    with pytest.raises(KeyError):
        attach(two, named("pissa", rank=2, targets=["0", "1"]), originals={"0": before["0"]}.__getitem__)
    assert same_parts(parts_of(two[0].weight), codes)


def test_a_start_from_a_checkpoint_is_what_the_layer_is_rounded_without():
    model, _ = taken("pissa")
    other, _ = taken("loftq")
    state = {name: t.clone() for name, t in other.linear.adapters["default"].state_dict().items()}
    model.linear.adapters["default"].load_state_dict(state)
    follow_starts(model)
    assert same_parts(parts_of(model.linear.base_layer.weight), parts_of(other.linear.base_layer.weight))
    weight = model.linear.base_layer.weight
    follow_starts(model)
    assert model.linear.base_layer.weight is weight


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


# ---------------------------------------------------------------- what is held, and for how long


def llama(dtype=torch.float32, method="lora", **changes):
    """A tiny Llama with its blocks' linear layers quantised, and an adapter moved off its start."""
    model = tiny_model().to(dtype)
    quantise_linear(model, [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"], dtype=dtype)
    return shaken(attach(model, named(method, **({"rank": 4} | changes))), size=0.05).train()


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("fused", [False, True])
def test_nothing_of_a_weights_size_is_kept_for_the_backward_pass(method, fused):
    model = llama(method=method)
    ids = torch.arange(7)[None]  # of no weight's size
    expected = torch.autograd.grad(model(ids).logits.square().sum(), list(trainable(model).values()))
    if fused:
        assert not [record for record in fuse(model) if record.why_not]
    sizes = {m.base_layer.weight.numel() for m in model.modules() if hasattr(m, "base_layer")}
    kept = []
    with saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        loss = model(ids).logits.square().sum()
    plain = [t for t in kept if not weights.is_quantised(t) and t.numel() in sizes and t.ndim == 2 and not isinstance(t, nn.Parameter)]
    assert not [list(t.shape) for t in plain]
    assert any(weights.is_quantised(t) for t in kept)
    found = torch.autograd.grad(loss, list(trainable(model).values()))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, expected, strict=True))


class Largest(TorchDispatchMode):
    """The most numbers in any plain floating tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point() and not weights.is_quantised(t)]
        self.numel = max([self.numel, *made])
        return result


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_doras_norm_never_has_more_of_the_weight_than_a_block(dtype, base):
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False)).to(dtype)
    quantise_linear(model, ["0"], base)
    size = model[0].weight.numel()
    assert size > 3 * BLOCK_ELEMENTS_CPU
    with Largest() as began:
        attach(model, named("dora", targets=["0"], rank=4))
    shaken(model, size=0.05)
    layer = model[0]
    with Largest() as found:
        stretch = layer.adapters["default"].stretch(Below(layer, ["default"], 0))
    assert max(began.numel, found.numel) <= BLOCK_ELEMENTS_CPU
    W, delta = weights.dequantised(layer.base_layer.weight, torch.float32), layer.adapters["default"]
    expected = delta.magnitude / (W + delta.inner.delta(None)).norm(dim=1) - 1
    assert torch.allclose(stretch, expected, atol=2e-3 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("schedule", ["relora", "plora", "delta_lora"])
def test_a_base_that_moves_must_not_be_quantised(schedule):
    model = attach(mixed("nf4")[0], linear_config(schedule))
    with pytest.raises(AdapterError, match=f"linear: its weight is stored quantised.*{schedule} needs a base in a floating type"):
        over_time(model)


def test_an_adapter_is_told_bases_apart_as_far_as_can_be(tmp_path, caplog):
    model, plain, before = mixed("nf4")
    save_adapter(shaken(attach(model, linear_config("lora"))), tmp_path / "nf4")
    save_adapter(shaken(attach(plain, linear_config("lora"))), tmp_path / "plain")
    original = mixed("nf4")[1]
    original.linear.weight.data = before["linear"]
    load_adapter(original, tmp_path / "nf4")  # what both hold as it is, is the same
    with pytest.raises(AdapterError, match="quantised otherwise"):
        load_adapter(mixed("int8")[0], tmp_path / "nf4")
    with pytest.raises(AdapterError, match="other weights"):
        other = mixed("nf4")[0]
        other.norm.weight.data.add_(1)
        load_adapter(other, tmp_path / "nf4")
    load_adapter(mixed("int8")[0], tmp_path / "plain")
    assert "cannot be compared" in caplog.text
