"""FourierFT and WaveFT, held to PEFT and to their transforms written out as sums."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from torch import nn

from deltune.adapters.attach import attach, trainable
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter
from deltune.adapters.methods.frequency import WAVELETS, daubechies
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.peft_twin import held_to_peft, save_peft, with_peft
from tests.test_adapters_methods import shaken
from tests.tiny import tiny_model

LLAMA = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def double(monkeypatch):
    """PEFT transforms in float32 whatever the model is in; for a comparison it does so in float64 here."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr("peft.tuners.fourierft.layer.torch.zeros", lambda *shape, **kwargs: torch.ones(*shape, **kwargs).double() * 0)


def odd_model():
    """No side a power of two, and odd ones."""
    return tiny_model(hidden_size=33, intermediate_size=51, num_attention_heads=3, num_key_value_heads=1, head_dim=10)


@pytest.mark.parametrize("make", [tiny_model, odd_model])
@pytest.mark.parametrize(
    "fields", [{}, {"init_weights": True, "random_loc_seed": 3, "scaling": 7.5}, {"n_frequency_pattern": {"v_proj": 17}}], ids=str
)
def test_fourierft_is_pefts(fields, make, tmp_path, double):
    held_to_peft(peft.FourierFTConfig(n_frequency=60, target_modules=LLAMA, **fields), tmp_path, make=make)


@pytest.mark.parametrize("make", [tiny_model, odd_model])
@pytest.mark.parametrize(
    "fields",
    [{}, {"wavelet_family": "db2"}, {"wavelet_family": "db3"}, {"wavelet_family": "db4", "init_weights": False}, {"wavelet_family": "db10"}, {"use_idwt": False}],
    ids=str,
)
def test_waveft_is_pefts(fields, make, tmp_path):
    held_to_peft(peft.WaveFTConfig(n_frequency=90, target_modules=LLAMA, **fields), tmp_path, make=make)


@pytest.mark.parametrize("fields", [{"proportional_parameters": True}, {"n_frequency_pattern": {"v_proj": 17}, "random_loc_seed": 1, "scaling": 3.0}], ids=str)
def test_waveft_counts_as_pefts_does(fields, tmp_path):
    held_to_peft(peft.WaveFTConfig(n_frequency=50, target_modules=LLAMA, **fields), tmp_path)


def places(n_out, n_in, count, seed=777):
    flat = torch.randperm(n_out * n_in, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return [divmod(place, n_in) for place in flat]


@pytest.mark.parametrize(("n_out", "n_in"), [(6, 8), (7, 5), (4, 9), (1, 3), (2, 2)])
def test_fourierft_is_the_sum_of_its_waves(n_out, n_in):
    count = n_out * n_in  # every frequency, so that none of the special ones is left out
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n_in, n_out)).double()
    attach(model, named("fourierft", targets=["0"], n_frequency=count, scaling=3.0, dtype="auto"))
    delta = model[0].adapters["default"]
    assert [p.numel() for p in trainable(model).values()] == [count]
    expected = torch.zeros(n_out, n_in, dtype=torch.float64)
    for c, (p, q) in zip(delta.coefficients.tolist(), places(n_out, n_in, count), strict=True):
        for a in range(n_out):
            for b in range(n_in):
                expected[a, b] += 3.0 * c / (n_out * n_in) * math.cos(2 * math.pi * (p * a / n_out + q * b / n_in))
    x = torch.randn(2, 3, n_in, dtype=torch.float64)
    assert (delta.delta(None) - expected).abs().max() < 1e-12
    assert (delta.out(x, None) - x @ expected.T).abs().max() < 1e-12


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_a_wavelets_filter_is_daubechies(wavelet):
    """What defines it (up to which half of the roots): orthonormal to its even shifts, and its high band annihilates
    polynomials of as many degrees as it has moments."""
    moments = int(wavelet[2:])
    low = torch.tensor(daubechies(moments), dtype=torch.float64)
    assert len(low) == 2 * moments
    for shift in range(moments):
        assert abs(float(low[2 * shift :] @ low[: len(low) - 2 * shift]) - (shift == 0)) < 1e-11
    high = torch.tensor([(-1.0) ** i for i in range(len(low))], dtype=torch.float64) * low.flip(0)
    grid = torch.linspace(-1, 1, len(low), dtype=torch.float64)
    assert all(abs(float(high @ grid**degree)) < 1e-10 for degree in range(moments))
    assert low[: moments + 1].square().sum() > low[moments + 1 :].square().sum()  # its energy comes first


def test_waveft_with_haars_wavelet_adds_blocks_of_two_by_two():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).double()
    shaken(attach(model, named("waveft", targets=["0"], n_frequency=20, scaling=2.0, dtype="auto")))
    delta = model[0].adapters["default"]
    expected = torch.zeros(6, 8, dtype=torch.float64)
    for c, (p, q) in zip(delta.coefficients.tolist(), places(6, 8, 20), strict=True):
        down, right = p >= 3, q >= 4  # the block of E: below, beside
        for i in range(2):
            for j in range(2):
                # what is beside changes sign from row to row, what is below from column to column
                sign = (-1) ** (i * right + j * down)
                expected[2 * (p % 3) + i, 2 * (q % 4) + j] += 2.0 * c * sign / 2
    x = torch.randn(5, 8, dtype=torch.float64)
    assert (delta.delta(None) - expected).abs().max() < 1e-12
    assert (delta.out(x, None) - x @ expected.T).abs().max() < 1e-12


def test_parameters_count_as_configured():
    for method in ("fourierft", "waveft"):
        model = attach(tiny_model(), named(method, n_frequency=40, n_frequency_pattern={"v_proj": 7}))
        layers = {place: wrapper.adapters["default"].coefficients.numel() for place, wrapper in wrappers(model)}
        assert all(count == (7 if place.endswith("v_proj") else 40) for place, count in layers.items()) and len(layers) == 14


def test_fourierft_can_start_without_a_change():
    model = tiny_model()
    before = model(torch.tensor([[1, 2, 3]])).logits
    assert torch.equal(attach(model, named("fourierft", n_frequency=40, init="zero"))(torch.tensor([[1, 2, 3]])).logits, before)


def test_training_follows_an_evaluation_in_inference_mode():
    for method in ("fourierft", "waveft", "shira"):
        model = attach(tiny_model(intermediate_size=48), named(method, **({"rank": 2} if method == "shira" else {"n_frequency": 33})))
        with torch.inference_mode():
            model(torch.tensor([[1, 2, 3]]))
        model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
        assert all(parameter.grad is not None for parameter in trainable(model).values())


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("fourierft", {}, r"0: n_frequency is 1000, and this layer of 30×20 has 1 to 600"),
        ("fourierft", {"n_frequency": 5, "n_frequency_pattern": {"q_proj": 3}}, "n_frequency_pattern: 'q_proj' matches none"),
        ("waveft", {"n_frequency": 5, "idwt": False, "wavelet": "db2"}, "wavelet has no effect: idwt is false"),
        ("waveft", {"n_frequency": 5, "proportional": True, "n_frequency_pattern": {"0": 3}}, "n_frequency_pattern has no effect"),
        ("waveft", {"n_frequency": 5, "wavelet": "coif1"}, "wavelet is 'coif1'; it can be db1"),
    ],
)
def test_what_does_not_fit_is_refused(method, changes, message):
    with pytest.raises(AdapterError, match=message):
        attach(nn.Sequential(nn.Linear(20, 30)), named(method, targets=["0"], **changes))


def test_a_peft_file_with_another_wavelet_is_refused_by_name(tmp_path):
    save_peft(with_peft(tiny_model(), peft.WaveFTConfig(n_frequency=9, target_modules=LLAMA, wavelet_family="sym4")), tmp_path)
    with pytest.raises(AdapterError, match="wavelet_family is 'sym4'; supported are db1, db2"):
        load_adapter(tiny_model(), tmp_path)
