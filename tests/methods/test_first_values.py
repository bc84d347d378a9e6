"""How tensors start: the distribution that the paper, the authors' code or PEFT states, for methods whose formula tests move them first."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from deltune.adapters.attach import attach
from deltune.adapters.config import ADAPTERS, DELTAS, named

N_IN, N_OUT = 256, 384


def uniform(bound):
    def check(tensor):
        size = tensor.abs().max()
        assert size <= bound and size > 0.8 * bound
        assert abs(float(tensor.std()) / bound * 3**0.5 - 1) < 2.5 / tensor.numel() ** 0.5

    return check


def normal(std):
    def check(tensor):
        assert abs(float(tensor.std()) / std - 1) < 2.5 / tensor.numel() ** 0.5
        assert abs(float(tensor.mean())) < 4 * std / tensor.numel() ** 0.5
        assert tensor.abs().max() > 2 * std  # no uniform one

    return check


def all_of(value):
    def check(tensor):
        assert torch.equal(tensor, torch.full_like(tensor, value))

    return check


zero, one = all_of(0.0), all_of(1.0)
KU = uniform(N_IN**-0.5)  # of a matrix [r, in]

STARTS = [
    ("loha", {"rank": 4}, {"hada_w1_a": uniform(4**-0.5), "hada_w1_b": KU, "hada_w2_a": uniform(4**-0.5), "hada_w2_b": zero}),
    # 256 = 16·16, 384 = 16·24
    ("lokr", {"rank": 4}, {"lokr_w1": zero, "lokr_w2_a": uniform(4**-0.5), "lokr_w2_b": uniform(16**-0.5)}),
    ("lokr", {"rank": 4, "zero": "second"}, {"lokr_w1": uniform(16**-0.5), "lokr_w2_a": uniform(4**-0.5), "lokr_w2_b": zero}),
    ("lokr", {"rank": 16, "zero": "second"}, {"lokr_w1": uniform(16**-0.5), "lokr_w2": zero}),
    ("lokr", {"rank": 4, "decompose_both": True}, {"lokr_w1_a": zero, "lokr_w1_b": uniform(16**-0.5)}),
    ("krona", {}, {"krona_A": zero, "krona_B": uniform(16**-0.5)}),
    ("hira", {"rank": 8}, {"hira_A": KU, "hira_B": zero}),
    ("hira", {"rank": 8, "init": "gaussian"}, {"hira_A": normal(1 / 8), "hira_B": zero}),
    ("delora", {}, {"delora_A": KU, "delora_B": uniform(8**-0.5), "delora_lambda": all_of(8.0)}),
    ("delora", {"init": "zero"}, {"delora_A": KU, "delora_B": zero}),
    ("mora", {}, {"mora": zero}),
    ("miss", {}, {"miss_block": zero}),
    ("miss_bat", {}, {"miss_block": zero}),
    ("melora", {}, {"lora_A": uniform((N_IN / 2) ** -0.5), "lora_B": zero}),
    ("gralora", {"hybrid_rank": 4}, {"gralora_A": uniform((N_IN / 2) ** -0.5), "gralora_B": zero, "general_A": KU, "general_B": zero}),
    ("bd_lora", {"diagonal_a": ["0"]}, {"lora_A": uniform((6 / (N_IN / 2)) ** 0.5), "lora_B": zero}),  # kaiming with a = 0
    ("bd_lora", {"diagonal_b": ["0"]}, {"lora_A": KU, "lora_B": zero}),
    ("prolora", {}, {"shared_A": KU, "unshared_A": KU, "shared_B": zero, "unshared_B": zero}),
    ("shira", {}, {"values": zero}),
    ("supertuning", {"rank": 4}, {"values": zero, "lora_A": KU, "lora_B": zero}),
    ("fourierft", {}, {"coefficients": normal(1.0)}),
    ("waveft", {}, {"coefficients": zero}),
    ("waveft", {"init": "normal"}, {"coefficients": normal(0.01)}),
    ("c3a", {"block_size": 64}, {"c3a_kernel": uniform((6 / (N_IN + N_OUT)) ** 0.5)}),
    ("c3a", {"block_size": 64, "init": "kaiming"}, {"c3a_kernel": KU}),
    ("c3a", {"block_size": 64, "init": "gaussian"}, {"c3a_kernel": normal(1.0)}),
    ("glora", {}, {"A_Xd": zero, "A_Xu": KU, "B_Xd": zero, "B_Xu": KU, "C_Xd": zero, "D_X": zero, "E_X": zero}),
    ("adamss", {}, {"adamss_B": zero}),
    ("svft", {"gate": True}, {"svft_M": zero, "svft_gate": zero}),
    ("psoft", {}, {"psoft_R": zero, "vector_a": one, "vector_b": one}),
    ("tinylora", {}, {"tied.v.0": zero, "tinylora_P": normal(2**-0.5)}),
    ("tinylora", {"init": "uniform"}, {"tied.v.0": uniform(0.02)}),
    ("oft", {"strength": True}, {"oft_R": zero, "oft_s": one}),
    ("boft", {}, {"boft_R": zero, "boft_s": one}),
    ("hra", {}, {"hra_u": uniform((8 / 2) ** -0.5)}),
    ("hra_gs", {}, {"hra_u": uniform(8**-0.5)}),
    ("ssf", {"targets": ["0"]}, {"scale": one, "shift": zero}),
    ("beft", {}, {"bias": zero}),
]


@pytest.mark.parametrize(("method", "fields", "starts"), STARTS, ids=lambda value: value if isinstance(value, str) else "")
def test_tensors_start_as_it_is_said(method, fields, starts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N_IN, N_OUT))
    attach(model, named(method, **({"targets": ["0"]} | fields)))
    state = model[0].adapters["default"].state_dict()
    for name, check in starts.items():
        check(state[name])


def test_a_pair_of_reflections_starts_as_equals():
    model = attach(nn.Sequential(nn.Linear(12, 6)), named("hra", targets=["0"]))
    u = model[0].adapters["default"].hra_u
    assert torch.equal(u[:, 0::2], u[:, 1::2]) and not torch.equal(u[:, 0], u[:, 2])


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("oft", {"eps": 1e-3}), ("oft", {"bound": "peft"}), ("oft", {"terms": 6}), ("hra", {"exact_start": False}),
        ("svft", {"off_diagonals": 2}), ("psoft", {"terms": 6}), ("psoft", {"bound": 0.5}), ("psoft", {"orthogonal": False, "cayley": "neumann", "terms": 6}),
        ("tinylora", {"init_bound": 0.1}), ("adamss", {"threshold": 0.2}), ("svft", {"svd": "full"}),
        ("miss", {"mini_rank": 8}), ("glora", {"rank": 4, "form_ab": "vector", "form_c": "none"}),
    ],
    ids=str,
)
def test_settings_without_effect_are_refused(method, fields):
    assert any("has no effect" in problem for problem in named(method, **fields).problems())


DEFAULTS = {
    "svft": {"pattern": "plain", "off_diagonals": 16, "rank": 0, "gate": False},
    "psoft": {"rank": 32, "orthogonal": True, "strength_in": True, "strength_out": True, "terms": 5},
    "tinylora": {"rank": 2, "weight_tying": 0.0, "init": "zeros", "projection_seed": 42},
    "osf": {"kept": 0.5},
    "adamss": {"rank": 100, "num_subspaces": 5, "subspace_rank": 1, "dynamic_rank": False},
    "glora": {"rank": 8, "form_ab": "lora", "form_c": "lora", "form_de": "constant"},
    "oft": {"block_size": 32, "cayley": "exact", "coft": False, "block_share": False},
    "oftv2": {"cayley": "neumann", "terms": 5},
    "boft": {"block_size": 4},
    "hra": {"rank": 8, "gram_schmidt": False},
    "loha": {"rank": 8, "alpha": 8.0},
    "lokr": {"rank": 8, "alpha": 8.0, "factor": -1, "decompose_both": False, "zero": "first"},
    "hira": {"rank": 32},
    "delora": {"rank": 8, "boundary": 8.0, "boundary_lr_ratio": 0.5, "init": "frozen"},  # for Llama-2: λ 8, learning rates 1e-2 and 5e-3
    "mora": {"form": "rope"},
    "miss": {"rank": 64},
    "miss_mini": {"mini_rank": 64},
    "c3a": {"block_size": 256, "init": "xavier"},
    "melora": {"alpha": 16.0, "rank_counts": "block"},
    "gralora": {"rank": 32, "alpha": 64.0, "blocks": 2, "hybrid_rank": 0},
    "prolora": {"alpha": 16.0, "unshared": None, "repeat_in": 2, "repeat_out": 2},
    "shira": {"rank": 32, "mask": "random"},
    "supertuning": {"sparsity": 0.99, "select": "top", "rank": None, "alpha": None},
    "fourierft": {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777, "init": "normal"},
    "waveft": {"n_frequency": 2592, "scaling": 25.0, "random_loc_seed": 777, "wavelet": "db1", "init": "zero"},
}


@pytest.mark.parametrize("method", DEFAULTS)
def test_settings_are_those_of_the_paper_or_of_peft(method):
    config = named(method)
    assert {key: getattr(config, key) for key in DEFAULTS[method]} == DEFAULTS[method]


# ---------------------------------------------------------------- what PEFT means where a file is silent

UNSAID = {"bd_lora", "kasa", "ia3", "llama_adapter", "prompt_tuning", "p_tuning", "prefix_tuning"}  # no such file: a field is needed
IN_PEFT = [name for name in DELTAS if (found := ADAPTERS.resolve(name).delta_class().peft) and name not in UNSAID]


@pytest.mark.parametrize("delta", IN_PEFT)
def test_a_field_that_a_file_does_not_have_has_pefts_default(delta):
    """Files of older versions are short; PEFT fills in its defaults, which are not always ours."""
    form = ADAPTERS.resolve(delta).delta_class().peft
    defaults = {}
    for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(form.type)]):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    whole = {name: value for name, value in defaults.items() if name in form.fields}
    assert bool(whole) == bool(form.fields) and form.read({}) == form.read(whole)
