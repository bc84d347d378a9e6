"""Methods with a core between two factors, held to their papers' formulas, and KaSA to PEFT's."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from deltune.adapters.attach import attach, extra_loss, merge, trainable
from deltune.adapters.config import OverTime, named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.schedules import over_time
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.peft_twin import held_to_peft
from tests.tiny import tiny_model

LLAMA = ["q_proj", "v_proj", "down_proj"]
N_IN, N_OUT = 14, 10
ALONE = ("kasa_dropped_A", "kasa_dropped_B")  # saved so that a load needs no SVD


def layer(std=0.3, n_in=N_IN, n_out=N_OUT, dtype=torch.float64, seed=0):
    """A model of one linear layer, with Gaussian weights."""
    model = nn.Sequential(nn.Linear(n_in, n_out)).to(dtype).eval()
    with torch.no_grad():
        model[0].weight.copy_(std * torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed), dtype=dtype))
        model[0].bias.normal_(generator=torch.Generator().manual_seed(seed + 1))
    return model


def adapted(method, shake=0.2, std=0.3, **fields):
    """The model, its weight, its delta, and what each trained tensor was at the start."""
    model = layer(std)
    W = model[0].weight.detach().clone()
    attach(model, named(method, dtype="auto", **fields), seed=3)
    delta = model[0].adapters["default"]
    first = {name: p.detach().clone() for name, p in delta.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(shake * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model, W, delta, first


def held_to_formula(model, W, delta, expected):
    """The delta, the forward and the merged weight are what the formula says."""
    x = torch.randn(5, W.shape[1], dtype=W.dtype, generator=torch.Generator().manual_seed(7))
    bias = model[0].bias.detach()
    assert expected.abs().max() > 1e-3
    assert (delta.delta(W) - expected).abs().max() < 1e-9
    assert (model(x) - (x @ (W + expected).T + bias)).abs().max() < 1e-9
    merge(model)
    assert (model[0].weight - (W + expected)).abs().max() < 1e-9


def summed(B, C, A, s):
    """s·Σ_ij B[:, i] C[i, j] A[j, :], term by term."""
    total = torch.zeros(B.shape[0], A.shape[1], dtype=B.dtype)
    for i in range(C.shape[0]):
        for j in range(C.shape[1]):
            total += s * C[i, j] * torch.outer(B[:, i], A[j])
    return total.detach()


def count(model):
    return sum(p.numel() for p in trainable(model).values())


@pytest.mark.parametrize("mixer_init", ["kaiming", "orthogonal"])
def test_moslora_is_its_formula(mixer_init):
    model, W, delta, first = adapted("moslora", rank=3, alpha=6, mixer_init=mixer_init)
    assert first["lora_B"].abs().max() == 0 and first["mixer"].abs().max() > 0
    if mixer_init == "orthogonal":
        assert torch.allclose(first["mixer"] @ first["mixer"].T, torch.eye(3, dtype=torch.float64), atol=1e-6)
    assert count(model) == 3 * (N_IN + N_OUT) + 3 * 3  # r(in + out) + r²
    held_to_formula(model, W, delta, summed(delta.lora_B, delta.mixer, delta.lora_A, 6 / 3))


@pytest.mark.parametrize("residual", [True, False])
def test_nlora_is_its_formula(residual):
    model, W, delta, first = adapted("nlora", std=0.15, rank=3, alpha=1.5, residual=residual)
    cut = W[:3], W[:, :3], W[:3, :3]
    assert all(torch.equal(first[f"lora_{name}"], tensor) for name, tensor in zip("ABN", cut, strict=True))
    assert count(model) == 3 * (N_IN + N_OUT) + 3 * 3
    expected = summed(delta.lora_B, delta.lora_N, delta.lora_A, 0.5)
    if residual:
        expected -= summed(cut[1], cut[2], cut[0], 0.5)
    held_to_formula(model, W, delta, expected)


def test_slora_is_its_formula():
    model, W, delta, first = adapted("slora", rank=3, alpha=6)
    assert first["lora_B"].abs().max() == 0 and not delta.starts_from_base
    assert count(model) == 3 * (N_IN + N_OUT) + 3 * 3
    held_to_formula(model, W, delta, summed(delta.lora_B, delta.lora_N, delta.lora_A, 2))


@pytest.mark.parametrize("residual", [True, False])
def test_inttune_is_its_formula_and_trains_the_core_alone(residual):
    model, W, delta, _ = adapted("inttune", std=0.15, rank=3, alpha=1.5, residual=residual)
    assert count(model) == 3 * 3
    core = delta.lora_N - W[:3, :3] if residual else delta.lora_N
    held_to_formula(model, W, delta, summed(W[:, :3], core, W[:3], 0.5))


def test_an_inttune_file_holds_the_core_alone(tmp_path):
    model = attach(layer(0.1), named("inttune", rank=3, dtype="auto"))
    with torch.no_grad():
        model[0].adapters["default"].lora_N.add_(1)
    save_adapter(model, tmp_path)
    from safetensors.torch import load_file

    assert [tensor.shape for tensor in load_file(tmp_path / "adapter_model.safetensors").values()] == [(3, 3)]
    x = torch.ones(1, N_IN, dtype=torch.float64)
    assert torch.equal(load_adapter(layer(0.1), tmp_path)(x), model(x))


@pytest.mark.parametrize("method", ["nlora", "inttune"])
def test_what_was_cut_out_of_w_stays_where_the_base_follows_the_change(method):
    model = layer(0.15)
    W = model[0].weight.detach().clone()
    attach(model, named(method, rank=3, alpha=1.5, dtype="auto", schedule=OverTime(name="delta_lora", begin=0, ratio=2.0)))
    delta, schedule = model[0].adapters["default"], over_time(model)
    for step in (1, 2):
        schedule.before_update(step)
        with torch.no_grad():
            for i, p in enumerate(delta.parameters()):
                p.add_(torch.linspace(-0.1 * step, 0.2 + i, p.numel(), dtype=p.dtype).view_as(p))
        schedule.after_step(step)
    A, B = (W[:3], W[:, :3]) if method == "inttune" else (delta.lora_A, delta.lora_B)
    change = summed(B, delta.lora_N, A, 0.5) - summed(W[:, :3], W[:3, :3], W[:3], 0.5)
    assert (delta.delta(None) - change).abs().max() < 1e-9
    assert (model[0].base_layer.weight - (W + 2 * change)).abs().max() < 1e-9


def test_sloras_zero_start_has_nothing_to_subtract():
    with pytest.raises(AdapterError, match="residual has no effect with mode=slora, which starts at zero"):
        attach(layer(), named("slora", residual=False))


@pytest.mark.parametrize("rank", [16, 128])
def test_nloras_start_is_a_small_part_of_a_gaussian_weight_and_the_pseudo_inverse_would_not_be(rank):
    W = layer(0.02, 512, 512, torch.float32)[0].weight.detach()

    def part(core):
        return float((W[:, :rank] @ core @ W[:rank]).norm() / W.norm())

    assert part(W[:rank, :rank]) < 0.2
    assert part(torch.linalg.pinv(W[:rank, :rank])) > 1
    attach(layer(0.02, 512, 512, torch.float32), named("nlora", rank=rank, alpha=rank))


@pytest.mark.parametrize("method", ["nlora", "inttune"])
def test_a_start_that_is_a_large_part_of_the_weight_is_refused(method):
    model = layer(1.0)
    W = model[0].weight.detach()
    part = float((W[:, :4] @ W[:4, :4] @ W[:4]).norm() / W.norm())
    with pytest.raises(AdapterError, match=rf"^0: {method}'s start is {part:.2g} of this layer's weight.* an alpha below {4 * 0.2 / part:.2g}"):
        attach(model, named(method, rank=4, alpha=4))
    assert type(model[0]) is nn.Linear
    attach(model, named(method, rank=4, alpha=0.99 * 4 * 0.2 / part))


@pytest.mark.parametrize("split", ["left", "right", "sqrt"])
def test_nora_is_its_formula_and_freezes_the_outer_factors(split):
    model, W, delta, first = adapted("nora", rank=5, inner_rank=2, alpha=10, split=split)
    U, S, Vh = torch.linalg.svd(W)
    power_left, power_right = {"left": (1, 0), "right": (0, 1), "sqrt": (0.5, 0.5)}[split]
    B, A = U[:, :5] * S[:5] ** power_left, S[:5, None] ** power_right * Vh[:5]
    for i in range(5):  # a singular vector's sign is free; both of a pair turn together
        sign = torch.sign(delta.lora_A[i] @ A[i])
        B[:, i] *= sign
        A[i] *= sign
    assert (delta.lora_A - A).abs().max() < 1e-9 and (delta.lora_B - B).abs().max() < 1e-9
    assert first["inner_B"].abs().max() == 0
    assert set(dict(delta.named_parameters())) == {"inner_A", "inner_B"} and count(model) == 2 * 5 * 2  # 2 r r'
    core = torch.einsum("ik,kj->ij", delta.inner_B, delta.inner_A)
    held_to_formula(model, W, delta, summed(B, core, A, 10 / 5))
    assert torch.linalg.matrix_rank(core) == 2  # not of rank one, which a public copy of the method trains


def test_lora_xs_is_its_formula_with_the_singular_values_on_the_input_side():
    model, W, delta, first = adapted("lora_xs", rank=4, alpha=8, svd="full")
    assert first["lora_R"].abs().max() == 0 and count(model) == 4 * 4
    assert (delta.lora_B.T @ delta.lora_B - torch.eye(4)).abs().max() < 1e-9
    S = torch.linalg.svdvals(W)[:4]
    assert (delta.lora_A @ delta.lora_A.T - torch.diag(S**2)).abs().max() < 1e-9
    U, S, Vh = torch.linalg.svd(W)
    assert (delta.lora_B @ delta.lora_A - (U[:, :4] * S[:4]) @ Vh[:4]).abs().max() < 1e-9
    held_to_formula(model, W, delta, summed(delta.lora_B, delta.lora_R, delta.lora_A, 8 / 4))


def test_lora_xs_draws_its_core_where_asked():
    _, _, _, first = adapted("lora_xs", rank=8, alpha=8, init_std=1e-5)
    assert 0.5e-5 < first["lora_R"].std() < 2e-5


def kasa_terms(W, delta, rank, s):
    """W without its smallest triplets, and the branch, by loops."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    kept = sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(len(S) - rank))
    branch = sum(s * delta.lora_diag[i] * torch.outer(delta.lora_B[:, i], delta.lora_A[i]) for i in range(rank))
    return kept, branch.detach()


def test_kasa_is_its_formula():
    model, W, delta, first = adapted("kasa", rank=3, alpha=6)
    assert first["lora_B"].abs().max() == 0
    assert count(model) == 3 * (N_IN + N_OUT) + 3  # r(in + out) + r
    kept, branch = kasa_terms(W, delta, 3, 2)
    held_to_formula(model, W, delta, kept + branch - W)


@pytest.mark.parametrize(("n_in", "n_out"), [(14, 10), (10, 14)])
def test_kasa_leaves_out_the_smallest_triplets_of_the_shorter_side(n_in, n_out):
    model = layer(n_in=n_in, n_out=n_out)
    W = model[0].weight.detach().clone()
    merge(attach(model, named("kasa", rank=3, dtype="auto")))
    before, after = torch.linalg.svdvals(W), torch.linalg.svdvals(model[0].weight)
    assert torch.allclose(after[:7], before[:7]) and after[7:].max() < 1e-9 * before[0]


def test_kasa_that_starts_with_what_it_drops_changes_nothing():
    model = layer()
    x = torch.ones(3, N_IN, dtype=torch.float64)
    before = model(x)
    attach(model, named("kasa", rank=3, init="dropped", dtype="auto", gamma=1, beta=0))
    assert torch.allclose(model(x), before, atol=1e-12)
    assert extra_loss(model) < 1e-6  # singular vectors are orthonormal


def test_kasas_loss_is_the_mean_over_layers_of_its_two_terms_with_small_grams():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5)).double()
    attach(model, named("kasa", rank=3, dtype="auto", targets=["0", "1"], beta=0.3, gamma=0.7))
    expected = 0.0
    for _, wrapper in wrappers(model):
        delta = wrapper.adapters["default"]
        with torch.no_grad():
            delta.lora_B.normal_(generator=torch.Generator().manual_seed(1))
        grams = [delta.lora_B.T @ delta.lora_B, delta.lora_A @ delta.lora_A.T]
        assert all(gram.shape == (3, 3) for gram in grams)
        off = [sum((gram[i, j] - float(i == j)) ** 2 for i in range(3) for j in range(3)).sqrt() for gram in grams]
        expected += 0.3 * sum(d**2 for d in delta.lora_diag) + 0.7 * sum(off)
    assert abs(float((extra_loss(model) - expected / 2).detach())) < 1e-12
    assert extra_loss(attach(layer(), named("kasa", rank=3, beta=0, gamma=0))) is None


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}], ids=str)
def test_kasa_is_pefts(fields, tmp_path):
    # PEFT computes the truncation in float32 whatever the model's type
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LLAMA, kasa_config=peft.KasaConfig(beta=0.2, gamma=0.1), **fields)
    back = held_to_peft(settings, tmp_path, tolerance=1e-5, ours_alone=ALONE)
    config = next(wrapper.adapters["default"].config for _, wrapper in wrappers(back))
    assert (config.delta, config.beta, config.gamma) == ("kasa", 0.2, 0.1)


def test_kasa_is_pefts_to_the_last_digit_where_pefts_truncation_is_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(peft.tuners.lora.variants.KasaLinearVariant, "_truncate_base_weight", staticmethod(truncated_in_double))
    held_to_peft(peft.LoraConfig(r=4, lora_alpha=8, target_modules=LLAMA, kasa_config=peft.KasaConfig()), tmp_path, ours_alone=ALONE)


def truncated_in_double(module, r):
    weight = module.get_base_layer().weight
    U, S, Vh = torch.linalg.svd(weight.detach(), full_matrices=False)
    dropped = U[:, -r:] * S[-r:], Vh[-r:]
    weight.data = weight.data - dropped[0] @ dropped[1]
    return dropped


def test_a_plain_lora_file_is_not_taken_for_kasa_and_a_wrong_kasa_config_is_refused(tmp_path):
    from tests.peft_twin import save_peft, with_peft

    save_peft(with_peft(tiny_model(), peft.LoraConfig(r=2, target_modules=LLAMA)), tmp_path / "lora")
    model = load_adapter(tiny_model(), tmp_path / "lora")
    assert next(wrapper.adapters["default"].config.delta for _, wrapper in wrappers(model)) == "lora"
    save_peft(with_peft(tiny_model(), peft.LoraConfig(r=2, target_modules=LLAMA, kasa_config=peft.KasaConfig())), tmp_path / "kasa")
    path = tmp_path / "kasa" / "adapter_config.json"
    path.write_text(path.read_text().replace('"gamma"', '"delta"'))
    with pytest.raises(AdapterError, match=r"kasa_config is .*'delta'.*; a mapping with beta and gamma is expected"):
        load_adapter(tiny_model(), tmp_path / "kasa")


@pytest.mark.parametrize(
    ("method", "fields", "words"),
    [
        ("nlora", {"rank": 11}, "nlora with rank 11 .* 10×14; this layer takes a rank of 1 to 10"),
        ("lora_xs", {}, "lora_xs with rank 64 .* takes a rank of 1 to 10"),
        ("nora", {"rank": 12}, "nora with rank 12 .* takes a rank of 1 to 10"),
        ("nora", {"rank": 8}, "inner_rank is 16, and the outer factors have rank 8; inner_rank can be 1 to 8"),
        ("kasa", {"rank": 10}, "kasa with rank 10 .* takes a rank of 1 to 9"),
    ],
)
def test_a_rank_that_a_layer_cannot_give_is_refused_with_those_that_it_can(method, fields, words):
    with pytest.raises(AdapterError, match=f"^0: .*{words}"):
        attach(layer(), named(method, **fields))
