"""The Delta contract carries methods unlike LoRA: ones that read W, multiply, act on the input, move the bias, have no matrix."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import pytest
import torch
from torch import nn

from deltune.adapters.attach import attach, detach, extra_loss, merge, merge_in_place, trainable, unmerge
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Delta
from deltune.adapters.files import save_adapter
from deltune.adapters.methods.lora import LoraConfig
from deltune.config.fields import option
from deltune.errors import AdapterError


class Hadamard(Delta):
    """ΔW = W ⊙ (B A): needs W in every forward."""

    reads_base = True

    def build(self):
        self.A = nn.Parameter(torch.empty(2, self.site.n_in, **self.storage))
        self.B = nn.Parameter(torch.empty(self.site.n_out, 2, **self.storage))

    def reset(self, generator):
        with torch.no_grad():
            self.A.copy_(torch.empty(self.A.shape).normal_(generator=generator))
            self.B.zero_()

    def delta(self, W):
        return W * (self.B @ self.A)


class Scaled(Delta):
    """y = l ⊙ (W x + b): multiplies the layer's output, bias included."""

    reads_base = True

    def build(self):
        self.scale = nn.Parameter(torch.empty(self.site.n_out, **self.storage))

    def reset(self, generator):
        nn.init.ones_(self.scale)

    def delta(self, W):
        return (self.scale - 1)[:, None] * W

    def bias_delta(self, W, bias):
        return None if bias is None else (self.scale - 1) * bias

    def forward(self, x, base):
        return self.scale * base(x)


class InputSide(Delta):
    """y = W (d ⊙ x) + b: changes what the layer is given."""

    reads_base = True

    def build(self):
        self.gain = nn.Parameter(torch.empty(self.site.n_in, **self.storage))

    def reset(self, generator):
        nn.init.ones_(self.gain)

    def delta(self, W):
        return W * (self.gain - 1)

    def forward(self, x, base):
        return base(self.gain * x)


class Bias(Delta):
    """y = W x + b + c."""

    adds_bias = True

    def build(self):
        self.c = nn.Parameter(torch.empty(self.site.n_out, **self.storage))

    def reset(self, generator):
        nn.init.zeros_(self.c)

    def delta(self, W):
        return torch.zeros(self.site.n_out, self.site.n_in, **self.storage)

    def bias_delta(self, W, bias):
        return self.c

    def out(self, x, W):
        return self.c.expand(*x.shape[:-1], -1)


class Curved(Delta):
    """y = W x + b + tanh(M x): no matrix."""

    mergeable = False

    def build(self):
        self.M = nn.Parameter(torch.empty(self.site.n_out, self.site.n_in, **self.storage))

    def reset(self, generator):
        nn.init.zeros_(self.M)

    def out(self, x, W):
        return torch.tanh(x @ self.M.T)

    def loss(self):
        return self.M.square().sum()


class Measured(Delta):
    """ΔW = (m / ‖W₀‖row − 1) ⊙ W with m = ‖W₀‖row at the start: measures the final W once, and keeps it in a buffer."""

    reads_base = True

    def build(self):
        self.m = nn.Parameter(torch.empty(self.site.n_out, **self.storage))
        self.register_buffer("norm", torch.empty(self.site.n_out, **self.storage))

    def reset(self, generator):
        pass

    def ready(self, W):
        with torch.no_grad():
            self.norm.copy_(W.norm(dim=1))
            self.m.copy_(self.norm)

    def delta(self, W):
        return (self.m / self.norm - 1)[:, None] * W


def config_of(made):

    @dataclass(frozen=True)
    class ToyConfig(AdapterConfig):
        delta: str = option(made.__name__.lower(), "Parametrisation.")
        dtype: str = option("auto", "Type.")

        @staticmethod
        def delta_class():
            return made

    return ToyConfig()


LORA = LoraConfig(rank=2, dtype="auto", exclude=["2"])
WITH_MATRIX = {cls.__name__: config_of(cls) for cls in (Hadamard, Scaled, InputSide, Bias, Measured)} | {"Lora": LORA}
X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def model_of(bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3)).double().eval()


def moved(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.mark.parametrize("method", WITH_MATRIX)
def test_any_method_starts_as_the_identity_and_merges_exactly(method):
    model = attach(model_of(), WITH_MATRIX[method])
    assert torch.allclose(model(X), model_of()(X), atol=1e-15)
    before = moved(model)(X)
    assert not torch.allclose(before, model_of()(X), atol=1e-3)
    merge_in_place(model)
    assert torch.allclose(model(X), before, atol=1e-12)
    unmerge(model)
    assert torch.equal(model(X), before)
    assert torch.allclose(merge(model)(X), before, atol=1e-12)


@pytest.mark.parametrize("first,second", permutations(WITH_MATRIX, 2))
def test_any_two_methods_on_one_layer_merge_to_what_they_compute(first, second):
    model = attach(model_of(), WITH_MATRIX[first], name="first")
    attach(model, WITH_MATRIX[second], name="second")
    before = moved(model)(X)
    merge_in_place(model)
    assert torch.allclose(model(X), before, atol=1e-12)
    unmerge(model)
    assert torch.allclose(merge(model)(X), before, atol=1e-12)


@pytest.mark.parametrize("first,second", [("Hadamard", "Lora"), ("Lora", "Hadamard"), ("Lora", "Scaled"), ("Scaled", "Measured")])
def test_gradients_pass_through_a_weight_that_another_method_reads(first, second):
    model = attach(attach(model_of(), WITH_MATRIX[first], name="first"), WITH_MATRIX[second], name="second")
    moved(model)
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in trainable(model).items()), strict=True)

    def answer(*parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (X,))

    assert torch.autograd.gradcheck(answer, values)


def test_a_method_without_a_matrix_runs_and_says_that_it_cannot_merge():
    model = moved(attach(model_of(), config_of(Curved)))
    assert not torch.allclose(model(X), model_of()(X), atol=1e-3)
    before = model(X)
    for call in (merge, merge_in_place):
        with pytest.raises(AdapterError, match=r"0: adapter default \(curved\) cannot be merged.*not a matrix"):
            call(model)
    assert torch.equal(model(X), before)
    attach(model, config_of(Hadamard), name="above")
    with pytest.raises(AdapterError, match="cannot be merged"):
        model(X)  # the weight below `above` would have to hold what is no matrix
    assert torch.equal(detach(model)(X), model_of()(X))


def test_a_bias_is_not_merged_where_there_is_none():
    model = moved(attach(model_of(bias=False), config_of(Bias)))
    before = model(X)
    with pytest.raises(AdapterError, match="0: adapter default changes the bias, and this layer has none"):
        merge(model)
    assert torch.equal(model(X), before)


def test_extra_losses_are_summed_over_the_active_deltas():
    assert extra_loss(attach(model_of(), LORA)) is None
    model = moved(attach(model_of(), config_of(Curved)))
    expected = sum(parameter.square().sum() for parameter in trainable(model).values())
    assert torch.allclose(extra_loss(model), expected)


def test_buffers_are_not_trained():
    assert {name.rpartition(".")[2] for name in trainable(attach(model_of(), config_of(Measured)))} == {"m"}


def test_a_method_goes_only_on_its_kinds_of_layers():
    model = nn.Sequential(nn.Embedding(3, 4))

    @dataclass(frozen=True)
    class OnTables(type(config_of(Scaled))):
        targets: list[str] = option(["0"], "Where.")

    with pytest.raises(AdapterError, match=r"0 is a Embedding, of kind embedding; scaled works on layers of kind linear, conv1d"):
        attach(model, OnTables())


def test_a_method_that_peft_has_no_word_for_is_not_saved_as_something_else(tmp_path):
    with pytest.raises(AdapterError, match="is in no table"):
        save_adapter(attach(model_of(), config_of(Scaled)), tmp_path / "x")
    assert not (tmp_path / "x").exists()
