"""Starts of a pair, held to dense decompositions; rules over pairs, held to their formulas; what is added to the loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from deltune.adapters.attach import attach, trainable
from deltune.adapters.config import METHODS, named
from deltune.adapters.init import svd
from deltune.adapters.methods.lora import LoraConfig
from deltune.adapters.rules import gradient_rules, lr_ratios
from deltune.errors import AdapterError
from deltune.optim.build import build_optimizer
from deltune.optim.config import SGD, AdamW
from deltune.optim.groups import parameter_groups
from tests.synthetic import make_loop
from tests.test_adapters_methods import deltas_of, shaken
from tests.tiny import tiny_model

SHAPES = [(40, 40), (30, 50), (50, 30)]  # out, in


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layer_of(n_out, n_in, seed=0):
    model = nn.Sequential(nn.Linear(n_in, n_out, bias=False)).double()
    with torch.no_grad():
        model[0].weight.normal_(generator=generator(seed))
    return model


def start_of(model, **fields):
    """(s·B·A, A, B, s) of the start on the only layer."""
    attach(model, LoraConfig(**{"rank": 4, "alpha": 10.0, "dtype": "auto", **fields}))
    delta = deltas_of(model)["0"]
    return delta.scale * delta.lora_B.detach() @ delta.lora_A.detach(), delta.lora_A.detach(), delta.lora_B.detach(), delta.scale


def component(W, place):
    """σ u vᵀ, by the eigenvectors of W Wᵀ, the largest value first."""
    vectors = torch.linalg.eigh(W @ W.T)[1]
    u = vectors[:, W.shape[0] - 1 - place]
    return torch.outer(u, u @ W)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("fields", "places"),
    [
        ({"init": "pissa", "svd": "full"}, range(4)), ({"init": "milora", "svd": "full"}, range(26, 30)), ({"init": "milora"}, range(26, 30)),
        ({"init": "milora", "part": "mid"}, range(13, 17)), ({"init": "milora", "part": "max", "svd": "full"}, range(4)),
    ],
    ids=str,
)  # fmt: skip
def test_pissa_and_milora_take_their_components(shape, fields, places):
    model = layer_of(*shape)
    W = model[0].weight.detach().clone()
    fewer = min(shape)
    places = [place if fewer == 30 or place < 5 else place + (5 if fields.get("part") == "mid" else 10) for place in places]
    found, A, B, s = start_of(model, **fields)
    assert s != 1
    assert torch.allclose(found, sum(component(W, place) for place in places), atol=1e-9)
    # the values are shared evenly: AAᵀ and BᵀB are one diagonal matrix
    assert torch.allclose(A @ A.T, B.T @ B, atol=1e-9) and torch.allclose(A @ A.T, torch.diag(torch.diag(A @ A.T)), atol=1e-9)


def test_miloras_random_components_are_components_and_follow_the_seed():
    W = layer_of(30, 50)[0].weight.detach()
    one, again = start_of(layer_of(30, 50), init="milora", part="random")[0], start_of(layer_of(30, 50), init="milora", part="random")[0]
    assert torch.equal(one, again)
    values = torch.linalg.svdvals(W)
    found = torch.linalg.svdvals(one)[:4]
    assert all((values - value).abs().min() < 1e-9 for value in found)


def spectrum(m, n, power):
    """A matrix whose i-th value is i to the minus power."""
    k = min(m, n)
    left = torch.linalg.qr(torch.randn(m, k, generator=generator(1)))[0]
    right = torch.linalg.qr(torch.randn(n, k, generator=generator(2)))[0]
    return left * torch.arange(1, k + 1).float() ** -power @ right.T


@pytest.mark.parametrize("shape", [(256, 256), (200, 300), (300, 200)])
def test_the_fast_decomposition_is_as_near_as_it_says(shape):
    for power, limit in ((1.0, 0.01), (0.5, 0.12)):
        W = spectrum(*shape, power)
        U, S, V = svd.largest(W, 16, generator())
        true = torch.linalg.svd(W.double(), full_matrices=False)
        best = true[0][:, :16] * true[1][:16] @ true[2][:16]
        assert (U * S @ V.T - best).norm() / best.norm() < limit
        assert torch.allclose(U.T @ U, torch.eye(16), atol=1e-5) and torch.allclose(V.T @ V, torch.eye(16), atol=1e-5)
        assert torch.equal(U, svd.largest(W, 16, generator())[0])


@pytest.mark.parametrize("fast", [False, True])
def test_a_bfloat16_weight_is_decomposed_without_a_copy_of_it(monkeypatch, fast):
    """Whether or not the machine multiplies bfloat16: the part is that of a float32 weight of the same values."""
    monkeypatch.setattr(svd, "multiplies_bfloat16", lambda device: fast)
    n, rank = 512, 16
    Q = torch.linalg.qr(torch.randn(2, n, n, generator=generator()))[0]
    W = (Q[0] * (1 / torch.arange(1, n + 1))) @ Q[1].T
    stored = W.bfloat16()
    U, S, V = svd.chosen(stored.float(), range(rank))
    best = (U * S) @ V.T
    U, S, V = svd.largest(stored, rank, generator())
    assert U.dtype == S.dtype == V.dtype == torch.float32
    assert torch.linalg.vector_norm((U * S) @ V.T - best) < 0.006 * torch.linalg.vector_norm(best)
    # the triplets belong together exactly, however the subspace was found
    torch.testing.assert_close(stored.float().T @ U, V * S, rtol=0, atol=1e-5 * S[0].item())
    left = torch.randn(n, 3, generator=generator())
    torch.testing.assert_close(svd.left_product(left, stored), left.T @ stored.float())


@pytest.mark.parametrize("shape", [(256, 256), (200, 300), (300, 200)])
@pytest.mark.parametrize("kind", ["flat", "falling", "deficient"])
def test_the_smallest_components_are_found_without_the_others(shape, kind):
    if kind == "falling":
        W = spectrum(*shape, 1.0)
    else:
        W = torch.randn(shape, generator=generator())
    if kind == "deficient":
        W[7], W[:, 9] = W[3], W[:, 11]
    U, S, V = svd.smallest(W, 8, generator())
    values = torch.linalg.svdvals(W.double())
    assert (S - values[-8:]).abs().max() < 1e-6 * values[0]
    assert torch.allclose(U.T @ U, torch.eye(8), atol=1e-5) and torch.allclose(V.T @ V, torch.eye(8), atol=1e-5)
    assert torch.allclose(W @ V, U * S, atol=1e-5 * float(values[0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_olora_is_the_head_of_the_full_qr(shape):
    model = layer_of(*shape)
    W = model[0].weight.detach().clone()
    found, _, B, s = start_of(model, init="olora")
    Q, R = torch.linalg.qr(W)
    assert torch.allclose(found, s * Q[:, :4] @ R[:4], atol=1e-9)
    assert torch.allclose(B.T @ B, torch.eye(4, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["fast", "full"])
def test_micas_b_spans_the_smallest_left_vectors_and_stays(shape, how):
    model = layer_of(*shape)
    W = model[0].weight.detach().clone()
    _, A, B, _ = start_of(model, init="mica", train="A", svd=how)
    left = torch.linalg.svd(W, full_matrices=False)[0][:, -4:]
    assert torch.allclose(B @ B.T, left @ left.T, atol=1e-9) and not A.any()
    assert set(trainable(model)) == {"0.adapters.default.lora_A"}


def test_the_orthogonal_start_is_zero_though_neither_factor_is():
    torch.manual_seed(0)
    found, A, B, _ = start_of(layer_of(400, 300), init="orthogonal", rank=6)
    assert found.abs().max() < 1e-7
    # rows of the halves are spread by standard normals over ten
    assert A.std().item() == pytest.approx(0.1 / 2**0.5, rel=0.1) and B.std().item() == pytest.approx(0.1 / 2**0.5, rel=0.1)
    assert all(torch.linalg.matrix_rank(factor, rtol=1e-5) == 3 for factor in (A, B))


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_nzloras_factors_are_both_within_gamma_over_root_in(gamma):
    found, A, B, _ = start_of(layer_of(400, 100), init="nonzero", gamma=gamma, rank=16)
    for factor in (A, B):  # B's fan is `in` too
        assert 0.98 * gamma / 10 < factor.abs().max() <= gamma / 10
        assert factor.std().item() == pytest.approx(gamma / 10 / 3**0.5, rel=0.05)
    assert found.abs().max() > 0.001


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.choices.get("init") in ("pissa", "milora", "olora", "loftq")])
def test_a_start_that_is_taken_out_changes_no_bit_of_the_answer_and_none_of_the_base(name):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model().to(dtype)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        x = torch.arange(12).view(2, 6)
        answer = model(x).logits
        attach(model, named(name, rank=4))
        assert torch.equal(model(x).logits, answer)
        assert all(torch.equal(tensor, before[key.replace(".base_layer", "")]) for key, tensor in model.state_dict().items() if ".adapters." not in key)


# -- LoftQ

NF4_LEVELS = [
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip


def slow_nf4(W):
    """Value by value: blocks of 64 that run on over the ends of rows, each value to the nearest level times the block's largest."""
    flat = W.flatten()
    result = torch.zeros_like(flat)
    for begin in range(0, len(flat), 64):
        block = flat[begin : begin + 64]
        scale = max(abs(float(v)) for v in block)
        for j, v in enumerate(block):
            result[begin + j] = scale * min(NF4_LEVELS, key=lambda level: abs(level * scale - float(v)))
    return result.view_as(W)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("alpha", [4.0, 10.0])
def test_loftq_alternates_and_holds_for_any_scale(iterations, alpha):
    model = layer_of(12, 100)
    W = model[0].weight.detach().clone()
    R = torch.zeros_like(W)
    for _ in range(iterations):
        U, S, Vh = torch.linalg.svd(W - slow_nf4(W - R), full_matrices=False)
        R = U[:, :4] * S[:4] @ Vh[:4]
    found = start_of(model, init="loftq", loftq_iterations=iterations, alpha=alpha, svd="full")[0]
    assert torch.allclose(found, R, atol=2e-6)


# -- LoRA+


def test_lora_plus_gives_every_b_sixteen_times_the_rate():
    model = tiny_model()
    attach(model, named("dora", targets=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]))
    ratios = lr_ratios(model, "lora_plus", 16.0)
    assert ratios and set(ratios.values()) == {16.0}
    config = AdamW(lr=1e-3, weight_decay=0.1, rule="lora_plus", lr_scales={"*layers.0*": 0.5})
    rates = {name: group["lr"] for group in parameter_groups(model.named_parameters(), config, ratios) for name in group["names"]}
    assert rates.keys() == trainable(model).keys()
    for name, rate in rates.items():
        expected = 1e-3 * (16 if name.endswith("lora_B") else 1) * (0.5 if "layers.0" in name else 1)
        assert rate == pytest.approx(expected), name


def test_a_rule_without_effect_is_refused():
    model = attach(tiny_model(), LoraConfig(train="A"))
    with pytest.raises(AdapterError, match="lora_plus has no effect"):
        lr_ratios(model, "lora_plus")
    with pytest.raises(AdapterError, match="lora_fa has no effect"):
        gradient_rules(model, "lora_fa")
    assert lr_ratios(tiny_model()) == {} and gradient_rules(model) == []


# -- LoRA-FA


@pytest.mark.parametrize("magnitude", [False, True])
def test_lora_fa_makes_a_step_of_b_the_nearest_to_the_weights_gradient(magnitude):
    """The corrected gB is the X with the least ‖s·X·A - G‖, G being the gradient that W would have."""
    config = named("dora" if magnitude else "lora", rank=3, alpha=7, train="B", dtype="auto")
    model = shaken(attach(layer_of(6, 9), config))
    delta = deltas_of(model)["0"]
    inner = delta.inner if magnitude else delta
    x, g = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    (model(x) * g).sum().backward()
    gain = delta.magnitude.detach() / delta.norms(model[0].base_layer.weight) if magnitude else torch.ones(6, dtype=torch.float64)
    G = (g * gain).T @ x  # of W + ΔW
    (rule,) = gradient_rules(model, "lora_fa")
    rule()
    A = inner.lora_A
    nearest = torch.linalg.lstsq((inner.scale * A).T, G.T).solution.T
    assert torch.allclose(inner.lora_B.grad, nearest, atol=1e-6)
    with torch.no_grad():  # a checkpoint is loaded, say: what was worked out from A before counts no more
        inner.lora_A.mul_(2)
    before = inner.lora_B.grad.clone()
    rule()
    gram = inner.lora_A @ inner.lora_A.T + 1e-8 * torch.eye(3, dtype=torch.float64)
    assert torch.allclose(inner.lora_B.grad, before @ torch.linalg.inv(gram) / inner.scale**2, atol=1e-9)


def test_lora_fa_is_applied_once_a_step_before_clipping_and_leaves_a_alone():
    def run(split):
        model = tiny_model().double()
        attach(model, LoraConfig(rank=2, train="B", dtype="auto"))
        loop = make_loop(model, steps=1, micro_batch=split[0], accumulate=split[1], max_grad_norm=None)
        loop.optimizer = build_optimizer(parameter_groups(model.named_parameters(), SGD(lr=1.0)), SGD(lr=1.0))
        loop.parameters = [p for group in loop.optimizer.param_groups for p in group["params"]]
        loop.peak_rates = [group["lr"] for group in loop.optimizer.param_groups]
        return model, loop

    plain, loop = run((8, 1))
    loop.run()
    steps = []
    for split in ((8, 1), (2, 4)):
        model, loop = run(split)
        frozen = {name: buffer.clone() for name, buffer in model.named_buffers() if "lora_A" in name}
        loop.gradient_rules = gradient_rules(model, "lora_fa")
        loop.run()
        assert frozen and all(torch.equal(buffer, frozen[name]) for name, buffer in model.named_buffers() if name in frozen)
        steps.append({name: parameter.detach() for name, parameter in trainable(model).items()})
    A = dict(plain.named_buffers())
    for name, parameter in trainable(plain).items():
        own = A[name.replace("lora_B", "lora_A")]
        expected = parameter @ torch.linalg.inv(own @ own.T + 1e-8 * torch.eye(2, dtype=torch.float64)) / 8**2
        assert torch.allclose(steps[0][name], expected, rtol=1e-5, atol=1e-12)
        assert torch.allclose(steps[1][name], expected, rtol=1e-5, atol=1e-12)


# -- what an adapter adds to the loss


class Records:
    def __init__(self):
        self.extra = []

    def __getattr__(self, name):
        return (lambda record: self.extra.append(record.extra)) if name == "on_step" else (lambda *_: None)


def with_extra(folder=None, steps=4, **fields):
    model = attach(tiny_model(), LoraConfig(rank=2, init="nonzero"))
    records = Records()
    loop = make_loop(model, steps=steps, folder=folder, callbacks=[records], **fields)
    parameters = list(trainable(model).values())
    loop.extra_loss = lambda: 0.1 * sum(p.square().sum() for p in parameters)
    return model, loop, records


def test_what_is_added_to_the_loss_counts_once_whatever_the_split():
    ends = []
    for split in ((8, 1), (2, 4)):
        model, loop, records = with_extra(micro_batch=split[0], accumulate=split[1], steps=2)
        expected = loop.extra_loss().item()
        loop.run()
        assert records.extra[0]["extra_loss"] == pytest.approx(expected)
        ends.append({name: parameter.detach() for name, parameter in trainable(model).items()})
    for name, parameter in ends[0].items():
        assert torch.allclose(parameter, ends[1][name], atol=1e-5), name
    without = with_extra(micro_batch=8, steps=2)
    without[1].extra_loss = lambda: None
    without[1].run()
    assert any(not torch.allclose(parameter, ends[0][name], atol=1e-5) for name, parameter in trainable(without[0]).items())
    assert without[2].extra[0] == {}


def test_a_run_with_an_added_loss_resumes_to_the_bit(tmp_path):
    whole, loop, _ = with_extra(tmp_path / "whole")
    loop.run()
    _, first, _ = with_extra(tmp_path / "parts")
    first.info = dataclasses.replace(first.info, num_steps=2)
    first.run()
    second, rest, _ = with_extra(tmp_path / "parts")
    rest.resume()
    rest.run()
    assert rest.progress.step == 4 and rest.progress.loss_chain == loop.progress.loss_chain
    assert all(torch.equal(p, dict(second.named_parameters())[name]) for name, p in whole.named_parameters())
