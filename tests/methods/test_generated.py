"""Methods whose change is made from the weight, held to their formulas by loops, and PEANuT and DEFT to PEFT's."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from deltune.adapters.attach import attach, extra_loss, merge, trainable
from deltune.adapters.config import METHODS, named
from deltune.adapters.files import save_adapter
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.peft_twin import held_to_peft
from tests.tiny import tiny_model

LLAMA = ["q_proj", "v_proj", "down_proj"]
N_IN, N_OUT = 9, 7


def model_of(n_in=N_IN, n_out=N_OUT):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(n_in, n_out)).double().eval()


def adapted(method, shake=0.3, seed=3, **fields):
    """The model, its weight, its delta away from its start, and the tensors of the start."""
    model = model_of()
    W = model[0].weight.detach().clone()
    attach(model, named(method, dtype="auto", **fields), seed=seed)
    delta = model[0].adapters["default"]
    first = {name: p.detach().clone() for name, p in delta.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(shake * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model, W, delta, first


def rows(n_in=N_IN, count=6):
    return torch.randn(count, n_in, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def held_to_matrix(model, W, delta, expected):
    x, bias = rows(), model[0].bias.detach()
    assert expected.abs().max() > 1e-3
    assert (delta.delta(W) - expected).abs().max() < 1e-9
    assert (model(x) - (x @ (W + expected).T + bias)).abs().max() < 1e-9
    merge(model)
    assert (model[0].weight - (W + expected)).abs().max() < 1e-9


def count(model):
    return sum(p.numel() for p in trainable(model).values())


# ---------------------------------------------------------------- RidgeLoRA


def transform(tensors, s):
    """T = κ·diag(ρ) + s·BA, entry by entry."""
    A, B, rho, kappa = (tensors[f"ridge_{name}"].detach() for name in ("A", "B", "rho", "kappa"))
    n = len(rho)
    T = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            T[i, j] = sum(s * B[i, k] * A[k, j] for k in range(A.shape[0])) + (kappa[0] * rho[i] if i == j else 0)
    return T


@pytest.mark.parametrize("exact", [True, False])
def test_ridgelora_is_its_formula(exact):
    model, W, delta, first = adapted("ridgelora", rank=3, alpha=6, exact=exact)
    assert count(model) == 3 * 2 * N_IN + N_IN + 1  # 2·r·in + in + 1
    T, T0 = transform(dict(delta.named_parameters()), 2), transform(first, 2)
    held_to_matrix(model, W, delta, W @ (T - (T0 if exact else torch.eye(N_IN))))


def test_ridgelora_starts_as_its_algorithm_says():
    _, _, _, first = adapted("ridgelora", rank=3, alpha=6)
    rho, A, B = first["ridge_rho"], first["ridge_A"], first["ridge_B"]
    assert first["ridge_kappa"] == 1 and torch.equal(rho[3:], torch.ones(N_IN - 3).double()) and ((rho[:3] > 0) & (rho[:3] < 1)).all()
    expected = (3 / 6) * torch.diag(1 - rho) @ torch.linalg.pinv(A.T).T
    assert (B - expected).abs().max() < 1e-6
    draws = torch.cat([adapted("ridgelora", rank=4, seed=seed)[3]["ridge_A"].flatten() for seed in range(20)])
    assert abs(draws.var() * 4 - 1) < 0.2  # variance 1/r


def test_ridgeloras_transform_leaves_x_as_it_is_at_the_start_only_with_the_correction():
    def moved(exact):
        """How far the transform moves a random x, relative to it."""
        model = attach(model_of(64, 8), named("ridgelora", rank=8, dtype="auto", exact=exact))
        seen = []
        model[0].base_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        x = rows(64, 200)
        model(x)
        return float((seen[0] - x).detach().norm() / x.norm())

    assert moved(True) == 0
    assert 0.04 < moved(False) < 0.15  # what the paper calls the identity


def test_ridgelora_drops_in_its_branch_alone():
    model, W, delta, first = adapted("ridgelora", rank=3, alpha=6, dropout=0.5)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = model(rows())
        torch.manual_seed(0)
        seen = nn.functional.dropout(rows(), 0.5)
    now = dict(delta.named_parameters())
    diagonal = now["ridge_kappa"] * now["ridge_rho"] - first["ridge_rho"]
    branch = seen @ (transform(now, 2) - transform(first, 2) - torch.diag(diagonal)).T
    assert torch.allclose(y, (rows() + diagonal * rows() + branch) @ W.T + model[0].bias)


def test_ridgeloras_loss_is_the_mean_nuclear_norm_of_its_transform_without_the_identity():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5)).double()
    attach(model, named("ridgelora", rank=2, alpha=2, dtype="auto", targets=["0", "1"], beta=-0.1))
    norms = []
    for _, wrapper in wrappers(model):
        delta = wrapper.adapters["default"]
        T = transform(dict(delta.named_parameters()), 1)
        norms.append(torch.linalg.svdvals(T - torch.eye(len(T))).sum())
    loss = extra_loss(model)
    assert abs(loss.detach() + 0.1 * sum(norms) / 2) < 1e-9
    loss.backward()
    assert all(p.grad.isfinite().all() for p in trainable(model).values())
    assert extra_loss(attach(model_of(), named("ridgelora"))) is None


def test_a_rank_above_a_layers_inputs_is_refused():
    with pytest.raises(AdapterError, match=r"^0: ridgelora with rank 10 needs as many inputs, and this layer has 9; rank can be 1 to 9"):
        attach(model_of(), named("ridgelora", rank=10))


# ---------------------------------------------------------------- PEANuT


@pytest.mark.parametrize("side", ["out", "in"])
@pytest.mark.parametrize("depth", [0, 2])
def test_peanut_is_its_formula_vector_by_vector(side, depth):
    model, W, delta, first = adapted("peanut", rank=3, depth=depth, act_fn="tanh", scale=0.7, side=side)
    n = N_OUT if side == "out" else N_IN
    assert first["peanut_B"].abs().max() == 0
    assert count(model) == 2 * 3 * n + 2 * depth * 3 * 3  # 2·r·n + 2·depth·r²
    expected = torch.zeros(N_OUT, N_IN, dtype=torch.float64)
    for place in range(N_IN if side == "out" else N_OUT):
        h = torch.tanh(delta.peanut_A @ (W[:, place] if side == "out" else W[place]))
        residuals = []
        for encoder in delta.peanut_encoders:
            residuals.insert(0, h)
            h = torch.tanh(encoder @ h)
        for decoder, residual in zip(delta.peanut_decoders, residuals, strict=True):
            h = torch.tanh(decoder @ h) + residual
        vector = (0.7 * delta.peanut_B @ h).detach()
        if side == "out":
            expected[:, place] = vector
        else:
            expected[place] = vector
    held_to_matrix(model, W, delta, expected)


@pytest.mark.parametrize(
    "fields", [{}, {"depth": 1}, {"depth": 3, "act_fn": "silu", "scaling": 0.5}, *({"act_fn": name} for name in ("gelu", "tanh", "sigmoid", "leaky_relu", "mish", "linear"))], ids=str
)
def test_peanut_is_pefts(fields, tmp_path):
    held_to_peft(peft.PeanutConfig(r=4, target_modules=LLAMA, **fields), tmp_path)


def test_peanut_on_the_input_side_is_a_file_of_our_own(tmp_path):
    save_adapter(attach(tiny_model(), named("peanut", rank=2, side="in")), tmp_path)
    assert '"peft_type": "DELTUNE_peanut"' in (tmp_path / "adapter_config.json").read_text()


# ---------------------------------------------------------------- DEFT


@pytest.mark.parametrize("method", ["deft", "para"])
@pytest.mark.parametrize("decomposition", ["relu", "qr"])
def test_deft_is_its_formula(method, decomposition):
    model, W, delta, first = adapted(method, rank=3, alpha=6, decomposition=decomposition)
    assert count(model) == 3 * N_OUT + (3 * N_IN if method == "deft" else 0)  # r·out + r·in
    P = delta.deft_P.detach()
    L, G = (P, P.clamp_min(0)) if decomposition == "relu" else (torch.linalg.qr(P).Q,) * 2
    whole = torch.zeros(N_OUT, N_OUT, dtype=torch.float64)  # what is taken out: L Gᵀ, term by term
    for k in range(3):
        whole += torch.outer(L[:, k], G[:, k])
    if decomposition == "qr":
        assert torch.allclose(whole @ whole, whole)  # a projection
    expected = -whole @ W
    if method == "deft":
        expected = expected + 6 / 3 * torch.einsum("ok,ki->oi", L, delta.deft_R.detach())
    held_to_matrix(model, W, delta, expected)
    assert abs(first["deft_P"].std() - 0.02) < 0.01


@pytest.mark.parametrize("decomposition", ["relu", "qr"])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_deft_starts_unchanged_whatever_its_scale_and_dropout(decomposition, alpha):
    model = model_of().train()
    before = model(rows())
    attach(model, named("deft", rank=3, alpha=alpha, decomposition=decomposition, dropout=0.5, dtype="auto"))
    assert (model(rows()) - before).abs().max() < 1e-14


def test_para_takes_out_the_whole_of_its_directions_with_qr():
    assert METHODS["para"].start > 0
    model = attach(model_of(), named("para", rank=3, decomposition="qr", dtype="auto"))
    P = model[0].adapters["default"].deft_P.detach()
    merge(model)
    assert (P.T @ model[0].weight).abs().max() < 1e-12


class InDouble:
    """torch, with float64 where PEFT's layer writes float32, so that the two can be compared to the last digits."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


DEFTS = [{}, {"alpha": 6}, {"decomposition_method": "qr"}, {"para": True}, {"para": True, "decomposition_method": "qr"}, {"init_weights": False, "init_scale": 2.0}, {"r": 40}]


@pytest.mark.parametrize("fields", DEFTS, ids=str)
def test_deft_is_pefts(fields, tmp_path, monkeypatch):
    monkeypatch.setattr(peft.tuners.deft.layer, "torch", InDouble())
    held_to_peft(peft.DeftConfig(**({"r": 4, "target_modules": LLAMA} | fields)), tmp_path)


def test_deft_on_gpt2s_layers_is_pefts(tmp_path, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()

    monkeypatch.setattr(peft.tuners.deft.layer, "torch", InDouble())
    held_to_peft(peft.DeftConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True), tmp_path, make=make)
