"""Methods with a non-linearity in the change, held to their formulas stated entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from deltune.adapters.attach import attach, merge, trainable
from deltune.adapters.config import named
from deltune.errors import AdapterError

N_IN, N_OUT, RANK = 7, 5, 2


def model_of():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(N_IN, N_OUT)).double().eval()


def adapted(method, shake=0.3, **fields):
    """The model, its weight, and its delta away from its start."""
    model = model_of()
    W = model[0].weight.detach().clone()
    attach(model, named(method, **({"rank": RANK, "dtype": "auto"} | fields)), seed=3)
    delta = model[0].adapters["default"]
    assert delta.lora_B.abs().max() == 0
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(shake * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model, W, delta


def rows(count=6):
    return torch.randn(count, N_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def product(delta):
    """BA, summed term by term."""
    Z = torch.zeros(N_OUT, N_IN, dtype=torch.float64)
    for i in range(N_OUT):
        for j in range(N_IN):
            Z[i, j] = sum(delta.lora_B[i, k] * delta.lora_A[k, j] for k in range(delta.rank)).detach()
    return Z


def entrywise(f, Z):
    return torch.tensor([[f(float(z)) for z in row] for row in Z], dtype=torch.float64)


def held_to_matrix(model, W, delta, expected):
    x, bias = rows(), model[0].bias.detach()
    assert expected.abs().max() > 1e-3
    assert (delta.delta(W) - expected).abs().max() < 1e-9
    assert (model(x) - (x @ (W + expected).T + bias)).abs().max() < 1e-9
    merge(model)
    assert (model[0].weight - (W + expected)).abs().max() < 1e-9


def count(model):
    return sum(p.numel() for p in trainable(model).values())


@pytest.mark.parametrize("gain", [None, 2.5])
def test_sinelora_is_its_formula_with_the_root_of_in_and_alpha_over_rank(gain):
    model, W, delta = adapted("sinelora", alpha=6, omega=30.0, gain=gain)
    assert count(model) == RANK * (N_IN + N_OUT)
    g = math.sqrt(N_IN) if gain is None else gain
    held_to_matrix(model, W, delta, entrywise(lambda z: 6 / RANK * math.sin(30 * z) / g, product(delta)))


@pytest.mark.parametrize("wave", ["relu", "identity"])
def test_loran_on_the_weight_is_its_formula(wave):
    model, W, delta = adapted("loran", alpha=6, amplitude=0.3, freq=40.0, wave=wave)
    assert count(model) == RANK * (N_IN + N_OUT)
    held_to_matrix(model, W, delta, entrywise(lambda z: 3 * (z + 0.3 * (max(z, 0) if wave == "relu" else z) * math.sin(40 * z)), product(delta)))


@pytest.mark.parametrize("method", ["sinelora", "loran"])
def test_the_backward_of_an_entrywise_change_keeps_no_matrix_and_is_autograds(method):
    _, W, delta = adapted(method, **({"omega": 30.0} if method == "sinelora" else {"amplitude": 0.3, "freq": 40.0}))
    x = rows().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = delta.out(x, None)
    assert kept and not any(tensor.numel() >= N_IN * N_OUT for tensor in kept if tensor.shape != x.shape)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    wanted = (x, delta.lora_A, delta.lora_B)
    ours = torch.autograd.grad((y * weights).sum(), wanted)
    plain = torch.autograd.grad(((x @ delta.delta(W).T) * weights).sum(), wanted)
    assert all((one - other).abs().max() < 1e-10 for one, other in zip(ours, plain, strict=True))


def test_sineloras_first_step_is_omega_over_the_root_of_in_times_loras():
    steps = {}
    for method, fields in {"lora": {}, "sinelora": {"omega": 200.0}}.items():
        model = attach(model_of(), named(method, rank=RANK, alpha=4, dtype="auto", **fields))
        model(rows()).sum().backward()
        steps[method] = model[0].adapters["default"].lora_B.grad
    assert torch.allclose(steps["sinelora"], steps["lora"] * 200 / math.sqrt(N_IN))


def test_an_entrywise_change_under_autocast_takes_its_sine_of_full_numbers():
    model, W, delta = adapted("sinelora", omega=2000.0)
    model.float()
    x = rows().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = delta.out(x, None)
    assert y.dtype == torch.bfloat16
    exact = x @ delta.delta(W.float()).T
    assert (y - exact).abs().max() < 0.02 * exact.abs().max()


def test_loran_on_activations_is_its_formula_and_cannot_be_merged():
    model, W, delta = adapted("loran", alpha=6, amplitude=0.3, freq=40.0, on="activation")
    x = rows()
    z = x @ product(delta).T
    expected = entrywise(lambda v: 3 * (v + 0.3 * max(v, 0) * math.sin(40 * v)), z)
    assert (model(x) - (x @ W.T + model[0].bias + expected)).abs().max() < 1e-9
    with pytest.raises(AdapterError, match="cannot be merged, for its wave is on the activations"):
        merge(model)
    with pytest.raises(AdapterError, match=r"magnitude cannot go around loran: .* its wave is on the activations"):
        attach(model_of(), named("loran", on="activation", magnitude=True))


@pytest.mark.parametrize("method", ["loda", "loda_plus"])
def test_loda_is_its_formula(method):
    model, W, delta = adapted(method, alpha=6, slope=0.6)
    assert count(model) == RANK * (N_IN + N_OUT) + 2 * RANK * RANK
    A, B, M1, M2 = (p.detach() for p in (delta.lora_A, delta.lora_B, delta.mixer_1, delta.mixer_2))

    def f(vector):
        return torch.stack([v if v > 0 else 0.6 * v for v in vector])

    for x, y in zip(rows(), model(rows()), strict=True):
        z = torch.einsum("ri,i->r", A, x)
        inner = f(torch.einsum("ij,j->i", M2, f(torch.einsum("ij,j->i", M1, f(z)))))
        change = f(torch.einsum("or,r->o", B, inner))
        if method == "loda_plus":
            change = change + torch.einsum("or,r->o", B, z)
        assert (y - (W @ x + model[0].bias + 6 / RANK * change)).abs().max() < 1e-9


def test_loda_draws_one_dropout_mask():
    model, W, delta = adapted("loda_plus", dropout=0.5)
    model.train()
    x = torch.ones(1, N_IN, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = model(x)
        torch.manual_seed(0)
        dropped = nn.functional.dropout(x, 0.5)
    assert 0 < (dropped == 0).sum() < N_IN
    assert torch.allclose(y, x @ W.T + model[0].bias + delta.out(dropped, None))


def spline(i, order, z, knots):
    """B_i of an order at z, by Cox and de Boor's recursion."""
    if order == 0:
        return float(knots[i] <= z < knots[i + 1])
    left = (z - knots[i]) / (knots[i + order] - knots[i]) * spline(i, order - 1, z, knots)
    right = (knots[i + order + 1] - z) / (knots[i + order + 1] - knots[i + 1]) * spline(i + 1, order - 1, z, knots)
    return left + right


def sigma(z, H, C):
    """σ of one vector, with cubic splines on five cells of [−1, 1] and knots beyond them."""
    knots = [-1 + 0.4 * (k - 3) for k in range(12)]
    bases = torch.tensor([sum(spline(i, 3, float(v), knots) for v in z) for i in range(8)], dtype=torch.float64)
    return torch.tanh(H @ torch.tanh(z)) + C @ bases


def aurora_parts(**fields):
    model, W, delta = adapted("aurora", alpha=6, **fields)
    return model, W, delta, *(p.detach() for p in (delta.lora_A, delta.lora_B, delta.aurora_H, delta.aurora_C))


@pytest.mark.parametrize("mode", ["dynamic", "paper"])
def test_aurora_is_its_formula(mode):
    model, W, _, A, B, H, C = aurora_parts(mode=mode)
    assert count(model) == RANK * (N_IN + N_OUT) + RANK * RANK + 8 * RANK
    for x, y in zip(rows(), model(rows()), strict=True):
        expected = W @ x + model[0].bias + 6 / RANK * B @ sigma(A @ x, H, C)
        assert (y - expected).abs().max() < 1e-9


def test_aurora_with_its_curve_on_a_is_a_matrix_and_merges():
    model, W, delta, A, B, H, C = aurora_parts(mode="static")
    curved = torch.stack([sigma(A[:, j], H, C) for j in range(N_IN)], 1)
    held_to_matrix(model, W, delta, 6 / RANK * B @ curved)


def test_auroras_merge_is_refused_unless_the_papers_is_asked_for_which_is_another_function():
    model, *_ = aurora_parts()
    before = model(rows())
    with pytest.raises(AdapterError, match=r"cannot be merged, for .* another function; adapter\.mode=paper asks for that"):
        merge(model)
    assert torch.equal(model(rows()), before)

    model, W, _, A, B, H, C = aurora_parts(mode="paper")
    before = model(rows())
    merge(model)
    curved = torch.stack([sigma(A[:, j], H, C) for j in range(N_IN)], 1)
    assert (model[0].weight - (W + 6 / RANK * B @ curved)).abs().max() < 1e-9
    assert (model(rows()) - before).abs().max() > 0.1


def test_what_is_only_roughly_a_matrix_is_not_taken_for_one():
    with pytest.raises(AdapterError, match="magnitude cannot go around aurora"):
        attach(model_of(), named("aurora", mode="paper", magnitude=True))
    model = attach(model_of(), named("aurora", mode="paper", dtype="auto"))
    attach(model, named("dora", rank=2, dtype="auto"), name="second")
    with pytest.raises(AdapterError, match="cannot be merged"):  # DoRA would measure the norms of the wrong weight
        model(rows())
    attach(attach(model_of(), named("aurora", mode="static", dtype="auto")), named("dora", rank=2, dtype="auto"), name="second")(rows())


def test_sinelora_with_magnitude_measures_and_applies_one_and_the_same_sine():
    model = model_of()
    W = model[0].weight.detach().clone()
    attach(model, named("sinelora", rank=RANK, alpha=6, omega=30.0, magnitude=True, dtype="auto"))
    delta = model[0].adapters["default"]
    with torch.no_grad():
        delta.inner.lora_B.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        delta.magnitude.add_(0.5)
    whole = W + entrywise(lambda z: 3 * math.sin(30 * z) / math.sqrt(N_IN), product(delta.inner))
    expected = (delta.magnitude.detach() / whole.norm(dim=1)).unsqueeze(1) * whole
    assert (model(rows()) - (rows() @ expected.T + model[0].bias)).abs().max() < 1e-9
