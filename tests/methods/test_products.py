"""LoHa, LoKr, KronA, HiRA and DeLoRA, held to PEFT and to the papers' equations written out entry by entry."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from deltune.adapters.attach import attach, merge, merge_in_place, trainable
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.methods.products import near_factors
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.peft_twin import held_to_peft, save_peft, with_peft
from tests.tiny import tiny_model

LLAMA = ["q_proj", "v_proj", "down_proj"]
PATTERNS = {"rank_pattern": {r"layers\.1\..*v_proj": 2}, "alpha_pattern": {"down_proj": 3}}


def layer(n_in=6, n_out=8, seed=0, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(n_in, n_out)).to(dtype).eval()


def adapted(method, n_in=6, n_out=8, shake=0.3, dtype=torch.float64, **fields):
    """One layer with the method's adapter, away from its start unless shake is 0; the model and its delta."""
    model = attach(layer(n_in, n_out, dtype=dtype), named(method, targets=["0"], dtype="auto", **fields))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(shake * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype))
    return model, wrappers(model)[0][1].adapters["default"]


def check_matrix(model, delta, expected, n_in=6, n_out=8):
    """The delta, the adapted layer's answer and the merged weight are those of the expected ΔW."""
    base = layer(n_in, n_out)[0]
    x = torch.randn(5, n_in, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert (delta.delta(base.weight.detach()) - expected).abs().max() < 1e-9
    assert (model(x) - x @ (base.weight + expected).T - base.bias).abs().max() < 1e-9
    assert expected.abs().max() > 1e-3
    merge(model)
    assert (model[0].weight - base.weight - expected).abs().max() < 1e-9


def count(model):
    return sum(parameter.numel() for parameter in trainable(model).values())


# ---------------------------------------------------------------- LoHa


@pytest.mark.parametrize("fields", [{}, {"r": 2}, PATTERNS, {"init_weights": False}], ids=str)
def test_loha_is_pefts(fields, tmp_path):
    """Rank 2 is computed as a product over pairs of ranks, rank 4 through ΔW."""
    held_to_peft(peft.LoHaConfig(**({"r": 4, "alpha": 6, "target_modules": LLAMA} | fields)), tmp_path)


@pytest.mark.parametrize("rank", [1, 3])
def test_loha_multiplies_two_products_entry_by_entry(rank):
    model, delta = adapted("loha", rank=rank, alpha=5.0)
    assert delta.is_cheap_as_product == (rank == 1)
    b1, a1, b2, a2 = (p.detach() for p in (delta.hada_w1_a, delta.hada_w1_b, delta.hada_w2_a, delta.hada_w2_b))
    expected = torch.zeros(8, 6, dtype=torch.float64)
    for o in range(8):
        for i in range(6):
            expected[o, i] = 5 / rank * sum(b1[o, j] * a1[j, i] for j in range(rank)) * sum(b2[o, j] * a2[j, i] for j in range(rank))
    assert count(model) == 2 * rank * (8 + 6)
    check_matrix(model, delta, expected)


@pytest.mark.parametrize("rank", [1, 3])
def test_lohas_gradient_is_not_zero_at_the_start(rank):
    """With both second factors at zero it would be, in every tensor and for good."""
    model, delta = adapted("loha", rank=rank, shake=0)
    model(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
    assert delta.hada_w2_b.grad.abs().max() > 1e-3
    assert all(parameter.grad is not None for parameter in trainable(model).values())


@pytest.mark.parametrize("field", [{"rank_dropout": 0.1}, {"module_dropout": 0.1}], ids=str)
def test_pefts_dropping_of_ranks_is_refused_by_name(field, tmp_path):
    folder = save_peft(with_peft(tiny_model(), peft.LoHaConfig(r=2, target_modules=LLAMA, **field)), tmp_path)
    with pytest.raises(AdapterError, match=next(iter(field))):
        load_adapter(tiny_model(), folder)


# ---------------------------------------------------------------- Kronecker products


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 2}, {"r": 16}, {"r": 2, "decompose_both": True}, {"r": 1, "decompose_both": True, "decompose_factor": 16},
        {"r": 2, "decompose_factor": 4}, {"r": 2, "decompose_factor": 5}, {"r": 2, "init_weights": "lycoris"}, {"r": 2} | PATTERNS,
    ],
    ids=str,
)
def test_lokr_is_pefts(fields, tmp_path):
    held_to_peft(peft.LoKrConfig(alpha=6, target_modules=LLAMA, **fields), tmp_path)


def test_lokrs_factors_are_pefts():
    from peft.tuners.lokr.layer import factorization

    for size in (*range(1, 130), 768, 4096, 11008, 14336):
        for factor in (-1, 1, 2, 3, 4, 8, 12, 16, 100):
            assert near_factors(size, factor) == factorization(size, factor), (size, factor)
            assert near_factors(size, factor)[0] * near_factors(size, factor)[1] == size


def kronecker(left, right):
    rows, columns = left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]
    result = torch.zeros(rows, columns, dtype=left.dtype)
    for o in range(rows):
        for i in range(columns):
            result[o, i] = left[o // right.shape[0], i // right.shape[1]] * right[o % right.shape[0], i % right.shape[1]]
    return result


@pytest.mark.parametrize("both", [False, True])
def test_lokr_is_a_kronecker_product_with_a_low_rank_factor(both):
    """out = 32 = 4·8 and in = 48 = 6·8: w1 4×6, w2 8×8."""
    model, delta = adapted("lokr", 48, 32, rank=2, alpha=3.0, decompose_both=both)
    own = {name: parameter.detach() for name, parameter in delta.named_parameters()}
    w1 = own["lokr_w1_a"] @ own["lokr_w1_b"] if both else own["lokr_w1"]
    assert w1.shape == (4, 6)
    assert count(model) == (2 * (4 + 6) if both else 4 * 6) + 2 * (8 + 8)
    check_matrix(model, delta, 3 / 2 * kronecker(w1, own["lokr_w2_a"] @ own["lokr_w2_b"]), 48, 32)


def test_krona_is_a_kronecker_product_of_two_whole_matrices():
    model, delta = adapted("krona", 12, 20, scale=2.5)
    assert delta.krona_A.shape == (4, 3) and delta.krona_B.shape == (5, 4)
    assert count(model) == 4 * 3 + 5 * 4
    check_matrix(model, delta, 2.5 * kronecker(delta.krona_A.detach(), delta.krona_B.detach()), 12, 20)
    with pytest.raises(AdapterError, match="factor cannot be 0"):
        adapted("krona", factor=0)


# ---------------------------------------------------------------- HiRA


@pytest.mark.parametrize("fields", [{}, {"init_weights": "gaussian"}, {"rank_pattern": {"v_proj": 2}}, {"hira_dropout": 0.1}], ids=str)
def test_hira_is_pefts(fields, tmp_path):
    held_to_peft(peft.HiraConfig(r=4, target_modules=LLAMA, **fields), tmp_path)


def test_hira_on_an_embedding_is_pefts(tmp_path):
    held_to_peft(peft.HiraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), tmp_path)


def test_hira_has_no_scale():
    model, delta = adapted("hira", rank=2)
    W, A, B = layer()[0].weight.detach(), delta.hira_A.detach(), delta.hira_B.detach()
    expected = torch.tensor([[float(W[o, i] * sum(B[o, j] * A[j, i] for j in range(2))) for i in range(6)] for o in range(8)], dtype=torch.float64)
    assert count(model) == 2 * (8 + 6)
    assert not {"alpha", "scaling"} & set(vars(delta.config))
    check_matrix(model, delta, expected)


def test_hira_takes_no_dropout():
    with pytest.raises(AdapterError, match="dropout"):
        adapted("hira", rank=2, dropout=0.1)


# ---------------------------------------------------------------- DeLoRA


@pytest.mark.parametrize("fields", [{}, {"rank_pattern": {"v_proj": 2}, "lambda_pattern": {"down_proj": 4}}, {"module_dropout": 0.1}], ids=str)
def test_delora_from_zero_is_pefts(fields, tmp_path):
    """At 1e-4 or less the norms are clamped, so B is kept away from zero by little and by much."""
    for shake in (0.1, 1e-6):
        held_to_peft(peft.DeloraConfig(r=4, target_modules=LLAMA, **fields), tmp_path, shake=shake, changes=1e-4)


def delora(W, A, B, boundary):
    """(λ/r)·Σ b aᵀ/(‖b‖‖a‖)·diag(‖W‖ of the columns)"""
    rank = len(A)
    result = torch.zeros_like(W)
    for o in range(W.shape[0]):
        for i in range(W.shape[1]):
            term = sum(B[o, j] * A[j, i] / (B[:, j].square().sum().sqrt() * A[j].square().sum().sqrt()) for j in range(rank))
            result[o, i] = boundary / rank * term * W[:, i].square().sum().sqrt()
    return result


@pytest.mark.parametrize("init", ["frozen", "fold", "zero"])
def test_delora_counts_from_its_start(init):
    fields = {"rank": 2, "boundary": 3.0, "init": init}
    _, before = adapted("delora", shake=0, **fields)
    A0, B0 = before.delora_A.detach(), before.delora_B.detach()
    model, delta = adapted("delora", **fields)
    W, boundary = layer()[0].weight.detach(), delta.delora_lambda.detach()
    expected = delora(W, delta.delora_A.detach(), delta.delora_B.detach(), boundary)
    assert boundary != 3
    if init != "zero":
        expected -= delora(W, A0, B0, boundary if init == "frozen" else torch.tensor(3.0, dtype=torch.float64))
    assert count(model) == 2 * (8 + 6) + 1
    check_matrix(model, delta, expected)


def test_deloras_copies_are_tensors_of_their_own():
    """If they shared memory with what is trained they would follow it, and the change would stay zero."""
    for init in ("frozen", "fold"):
        model, delta = adapted("delora", rank=2, init=init, shake=0)
        x = torch.randn(4, 6, dtype=torch.float64)
        assert torch.equal(model(x), layer()(x))
        pointers = {tensor.data_ptr() for tensor in (*delta.parameters(), *delta.buffers())}
        assert len(pointers) == len([*delta.parameters(), *delta.buffers()])
        start = delta.start_A.clone()
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
        assert torch.equal(delta.start_A, start) and not torch.equal(delta.delora_A, start)
        assert not torch.allclose(model(x), layer()(x))


def test_deloras_boundary_alone_changes_nothing_but_in_the_folded_form():
    x = torch.randn(4, 6, dtype=torch.float64)
    for init, still in (("frozen", True), ("fold", False)):
        model, delta = adapted("delora", rank=2, init=init, shake=0)
        with torch.no_grad():
            delta.delora_lambda.mul_(3)
        assert torch.equal(model(x), layer()(x)) == still


def test_deloras_boundary_has_a_learning_rate_of_its_own():
    _, delta = adapted("delora", rank=2, boundary_lr_ratio=0.25)
    assert delta.lr_ratios() == {"delora_lambda": 0.25}


def test_deloras_norms_are_of_the_base_that_it_started_on(tmp_path):
    """They are saved, so a file means the same change on any base."""
    model, delta = adapted("delora", rank=2)
    save_adapter(model, tmp_path)
    other = load_adapter(layer(seed=5), tmp_path, any_base=True)
    again = wrappers(other)[0][1].adapters["default"]
    assert torch.equal(again.delta(None), delta.delta(None))


# ---------------------------------------------------------------- magnitude around them


@pytest.mark.parametrize("method", ["loha", "hira", "lokr", "delora"])
def test_magnitude_goes_around(method, tmp_path):
    fields = {} if method == "delora" else {"rank": 2}
    x = torch.randn(4, 6)
    model, _ = adapted(method, shake=0, dtype=torch.float32, magnitude=True, **fields)
    assert torch.equal(model(x), layer(dtype=torch.float32)(x))
    model, delta = adapted(method, dtype=torch.float32, magnitude=True, **fields)
    W = layer(dtype=torch.float32)[0].weight.detach()
    whole = W + delta.inner.delta(W)
    expected = delta.magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)
    assert (W + delta.delta(W) - expected).abs().max() < 1e-6
    save_adapter(model, tmp_path)
    answer = model(x)
    merge_in_place(model)
    assert (model(x) - answer).abs().max() <= 1e-6 * answer.abs().max()
    assert torch.equal(load_adapter(layer(dtype=torch.float32), tmp_path)(x), answer)
