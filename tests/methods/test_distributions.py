"""What tensors are drawn from at the start and what settings are by default, for methods with cores, curves, banks and scales."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from deltune.adapters.attach import attach
from deltune.adapters.config import named

N_IN, N_OUT, RANK, HALF = 64, 96, 32, 16
ZERO, ONE = ("fill", 0.0), ("fill", 1.0)


def U(fan):
    """kaiming_uniform with a = √5: uniform within ±1/√fan."""
    return "uniform", 1 / math.sqrt(fan)


def HE(fan):
    """kaiming_uniform with a ReLU's gain: uniform within ±√(6 / fan)."""
    return "uniform", math.sqrt(6 / fan)


def N(std):
    return "normal", std


PAIR = {"lora_A": U(N_IN), "lora_B": ZERO}
OWN = {"A": U(N_IN), "B": ZERO}
SHARED = {"block.A": U(HALF), "block.B": ZERO, "model.A": U(HALF), "model.B": ZERO}
KRON = {"into": U(N_IN // HALF), "outward": U(1)}
GATE = {"into": U(N_IN), "down": U(1), "up": U(HALF), "outward": U(1)}


def both(vectors):
    return {f"from_{bank}.{name}": start for bank in ("block", "model") for name, start in vectors.items()}


# the frozen ones that are drawn, and every trained one; None: cut out of W or computed, as the method's own tests state
STARTS = [
    ("moslora", {}, PAIR | {"mixer": U(RANK)}),
    ("slora", {}, PAIR | {"lora_N": U(RANK)}),
    ("nora", {"inner_rank": HALF}, {"inner_A": U(RANK), "inner_B": ZERO}),
    ("lora_xs", {}, {"lora_R": ZERO}),
    ("kasa", {}, PAIR | {"lora_diag": N(1)}),
    ("sinelora", {}, PAIR),
    ("loran", {}, PAIR),
    ("loda", {}, PAIR | {"mixer_1": U(RANK), "mixer_2": U(RANK)}),
    ("aurora", {}, PAIR | {"aurora_H": N(1 / math.sqrt(RANK)), "aurora_C": ("uniform", 0.1)}),
    ("ridgelora", {}, {"ridge_A": N(1 / math.sqrt(RANK)), "ridge_B": None, "ridge_rho": None, "ridge_kappa": ONE}),
    ("peanut", {"depth": 1}, {"peanut_A": U(N_OUT), "peanut_B": ZERO, "peanut_encoders.0": U(RANK), "peanut_decoders.0": U(RANK)}),
    ("deft", {}, {"deft_P": N(0.02), "deft_R": None}),
    ("vera", {}, {"vera_lambda_b": ZERO, "vera_lambda_d": ("fill", 0.1), "shared.vera_A": HE(N_IN), "shared.vera_B": HE(RANK)}),
    ("pvera", {}, {"pvera_lambda_b": ZERO, "pvera_lambda_d": ("fill", 0.1), "shared.pvera_A": HE(N_IN), "shared.pvera_B": HE(RANK)}),
    ("tied_lora", {}, {"tied.A": U(N_IN), "tied.B": ZERO, "u": ONE, "v": ONE}),
    ("sharelora", {}, {"shared.A": U(N_IN), "B": ZERO}),
    ("sharelora", {"part": "B"}, {"A": U(N_IN), "shared.B": ZERO}),
    ("rasa", {"shared_rank": HALF}, OWN | {"pool.A": U(N_IN), "pool.B": ZERO, "e": ("fill", 0.5 * 8 / HALF)}),
    ("denselora", {}, {"pair.A": U(N_IN), "pair.B": ZERO, "M": U(RANK)}),
    ("bslora", {"share": HALF}, OWN | SHARED | both(KRON)),
    ("bslora", {"form": "gate", "share": HALF}, OWN | SHARED | both(GATE)),
    ("randlora", {}, {"randlora_lambda": ZERO, "randlora_gamma": ("fill", 1 / N_IN)}),
    ("vblora", {"vector_length": HALF}, {"vectors.vblora_vector_bank": ("uniform", 0.02), "vblora_logits_A": N(0.1), "vblora_logits_B": N(0.1)}),
    ("unilora", {}, {"theta.unilora_theta_d": ("uniform", 0.02)}),
    ("frod", {}, {"frod_lambda_l": None, "frod_lambda_s_values": ZERO}),
    ("road", {"group_size": 4}, {"road_theta": ZERO, "road_alpha": ONE}),
    ("ia3", {}, {"ia3_l": ONE}),
]


@pytest.mark.parametrize(("method", "fields", "starts"), STARTS, ids=lambda value: value if isinstance(value, str) else "")
def test_tensors_start_as_published(method, fields, starts):
    ranked = {"rank": RANK} if hasattr(named(method), "rank") else {}
    drawn = []
    for seed in range(6):  # some tensors have few entries
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(N_IN, N_OUT))
        delta = attach(model, named(method, **(ranked | fields)), seed=seed)[0].adapters["default"]
        assert dict(delta.named_parameters()).keys() <= starts.keys()
        drawn.append(dict(delta.named_parameters()) | {name: buffer for name, buffer in delta.named_buffers() if name in starts})
    for name, start in starts.items():
        if start is None:
            continue
        kind, size = start
        values = torch.cat([tensors[name].detach().flatten() for tensors in drawn])
        if kind == "fill":
            assert torch.equal(values, torch.full_like(values, size)), name
            continue
        values = values.unique()  # a projection is the same with every seed
        most, count = float(values.abs().max()), len(values)
        std = size if kind == "normal" else size / math.sqrt(3)
        # twenty-some entries at the least; four times what a ratio of deviations strays by
        assert abs(float(values.std()) / std - 1) < 4 * (0.71 if kind == "normal" else 0.45) / math.sqrt(count), name
        assert abs(float(values.mean())) < 4 * std / math.sqrt(count), name
        assert most > 2.2 * size if kind == "normal" else 0.75 * size < most <= size * (1 + 1e-6), name


def test_ridgeloras_diagonal_starts_at_the_sigmoid_of_a_normal_around_two():
    starts = []
    for seed in range(20):
        model = attach(nn.Sequential(nn.Linear(N_IN, 4)), named("ridgelora", rank=RANK), seed=seed)
        starts.append(torch.logit(model[0].adapters["default"].ridge_rho.detach()[:RANK]))
    values = torch.cat(starts)
    assert abs(float(values.mean()) - 2) < 0.15 and abs(float(values.std()) - 1) < 0.1


# the authors' code's or the paper's; where those have none, the specification's
DEFAULTS = {
    "moslora": {"mixer_init": "kaiming"},
    "nlora": {"alpha": 8, "rank": 8, "mode": "nlora", "residual": True},
    "slora": {"alpha": 8, "rank": 8, "mode": "slora"},
    "inttune": {"alpha": 8, "rank": 8, "mode": "inttune"},
    "nora": {"inner_rank": 16, "alpha": 1, "split": "left"},
    "lora_xs": {"init_std": 0},
    "kasa": {"alpha": 16, "beta": 1e-4, "gamma": 1e-3, "init": "zero"},
    "sinelora": {"omega": 200, "gain": None},
    "loran": {"amplitude": 5e-5, "freq": 1e4, "wave": "relu", "on": "weight"},
    "loda": {"slope": 0.8, "plus": False},
    "loda_plus": {"slope": 0.8, "plus": True},
    "aurora": {"rank": 2, "alpha": 4, "mode": "dynamic"},
    "ridgelora": {"mu": 2, "sigma": 1, "beta": 0, "exact": True},
    "peanut": {"rank": 32, "depth": 0, "act_fn": "relu", "scale": 1, "side": "out"},
    "deft": {"rank": 8, "alpha": None, "decomposition": "relu", "para": False},
    "para": {"rank": 8, "decomposition": "relu", "para": True},
    "vera": {"rank": 256, "d_initial": 0.1, "projection_seed": 0, "save_projection": True},
    "pvera": {"rank": 256, "d_initial": 0.1, "projection_seed": 0, "sample_at_inference": False},
    "tied_lora": {"train": ["A", "B", "u", "v"]},
    "sharelora": {"part": "A", "scope": "type"},
    "rasa": {"rank": 8, "shared_rank": 1, "alpha": 8},
    "denselora": {"rank": 16, "alpha": 32},
    "bslora": {"rank": 2, "block_rank": 4, "model_rank": 8, "form": "kron", "width": 256, "window": "centre", "scale": 2},
    "randlora": {"rank": 32, "alpha": 64, "bases": "dense", "peft_compat": False},
    "vblora": {"rank": 4, "num_vectors": 256, "vector_length": 256, "topk": 2, "bank_bound": 0.02, "logits_std": 0.1},
    "unilora": {"rank": 4, "length": 256, "bound": 0.02, "projection_seed": 42},
    "frod": {"sparse_rate": 0.01, "ridge": 1e-3},
    "road": {"variant": "road_1", "group_size": 64},
    "road_2": {"variant": "road_2", "group_size": 64},
    "road_4": {"variant": "road_4", "group_size": 64},
}


@pytest.mark.parametrize("method", DEFAULTS)
def test_settings_are_by_default_as_published(method):
    config = named(method)
    assert {name: getattr(config, name) for name in DEFAULTS[method]} == DEFAULTS[method]
    assert config.dropout == 0 and not config.magnitude


def test_bsloras_shares_are_the_authors_for_both_forms():
    assert named("bslora", form="gate").width == 1024
