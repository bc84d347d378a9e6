"""MoRA, MiSS and C3A, held to PEFT and to the papers' equations written out entry by entry."""

from __future__ import annotations

import math

import peft
import pytest
import torch

from deltune.adapters.attach import attach, enable, merge_in_place, switch, trainable
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.methods.test_products import adapted, check_matrix, count, layer
from tests.peft_twin import held_to_peft
from tests.tiny import tiny_model

LLAMA = ["q_proj", "v_proj", "down_proj"]


# ---------------------------------------------------------------- MoRA


def filled(n_in, side):
    """Place in the filled-up input -> input that stands there."""
    return [place % n_in for place in range(math.ceil(n_in / side) * side)]


@pytest.mark.parametrize(("n_in", "n_out", "rank", "side"), [(6, 8, 1, 4), (9, 5, 2, 5), (12, 30, 1, 6), (4, 60, 2, 11)])
def test_mora_sharing_sums_the_chunks(n_in, n_out, rank, side):
    model, delta = adapted("mora_sharing", n_in, n_out, rank=rank)
    M = delta.mora.detach()
    assert side == int(math.sqrt((n_in + n_out) * rank) + 0.5) and count(model) == side**2
    expected = torch.zeros(n_out, n_in, dtype=torch.float64)
    for o in range(n_out):
        for place, i in enumerate(filled(n_in, side)):
            expected[o, i] += M[o % side, place % side]
    check_matrix(model, delta, expected, n_in, n_out)


@pytest.mark.parametrize(("n_in", "n_out", "rank", "side"), [(6, 8, 1, 4), (9, 5, 2, 4), (12, 30, 1, 6), (4, 60, 2, 10)])
def test_mora_rotates_each_chunk_by_its_place(n_in, n_out, rank, side):
    model, delta = adapted("mora", n_in, n_out, rank=rank)
    M, half = delta.mora.detach(), side // 2
    assert side == int(math.sqrt((n_in + n_out) * rank) + 0.5) // 2 * 2 and count(model) == side**2
    expected = torch.zeros(n_out, n_in, dtype=torch.float64)
    chunks = math.ceil(n_in / side)
    for o in range(n_out):
        c, row = o % (chunks * side) // side, o % side
        for place, i in enumerate(filled(n_in, side)):
            if place // side != c:
                continue
            # where entry p of the chunk goes: p < half to cos at p and sin at p + half, the other half to -sin and cos
            p = place % side
            angle = c * 10_000.0 ** (-2 * (p % half) / side)
            other, sign = (p + half, 1) if p < half else (p - half, -1)
            expected[o, i] += M[row, p] * math.cos(angle) + sign * M[row, other] * math.sin(angle)
    check_matrix(model, delta, expected, n_in, n_out)


@pytest.mark.parametrize("method", ["mora", "mora_sharing"])
@pytest.mark.parametrize(("n_in", "n_out", "rank"), [(24, 24, 2), (20, 47, 1), (47, 20, 1), (30, 9, 1), (9, 40, 1), (16, 16, 2)])
def test_many_tokens_are_answered_as_one_by_one(method, n_in, n_out, rank):
    """Where M has fewer rows than x another way is taken."""
    model, delta = adapted(method, n_in, n_out, rank=rank)
    x = torch.randn(3, 9, n_in, dtype=torch.float64, requires_grad=True)
    assert delta.goes_in_one(x) and not delta.goes_in_one(x[:1, :1])
    found = []
    for answer in (model(x), torch.stack([model(token) for token in x.reshape(-1, 1, n_in)]).view(3, 9, n_out)):
        found.append([answer, *torch.autograd.grad(answer.sin().sum(), [x, delta.mora])])
    assert all(torch.allclose(one, other, rtol=1e-10, atol=1e-12) for one, other in zip(*found, strict=True))


# ---------------------------------------------------------------- MiSS


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 8}, {"r": 5}, {"r": 32}, {"r": 8, "init_weights": False}, {"r": 8, "miss_dropout": 0.1},
        {"r": 8, "init_weights": "bat"}, {"r": 16, "init_weights": "bat"},
        {"r": 8, "init_weights": "mini"}, {"r": 5, "mini_r": 4, "init_weights": "mini"},
    ],
    ids=str,
)
def test_miss_is_pefts(fields, tmp_path):
    held_to_peft(peft.MissConfig(target_modules=LLAMA, **fields), tmp_path)


@pytest.mark.parametrize("rank", [2, 4, 6])
def test_miss_repeats_its_shard_over_the_inputs(rank):
    model, delta = adapted("miss", rank=rank)
    D = delta.miss_block.detach()
    expected = torch.tensor([[float(D[i % rank, o]) for i in range(6)] for o in range(8)], dtype=torch.float64)
    assert count(model) == rank * 8
    check_matrix(model, delta, expected)


def test_mini_repeats_over_the_outputs_too():
    model, delta = adapted("miss_mini", rank=4, mini_rank=2)
    D = delta.miss_block.detach()
    expected = torch.tensor([[float(D[i % 4, o % 2]) for i in range(6)] for o in range(8)], dtype=torch.float64)
    assert count(model) == 4 * 2
    check_matrix(model, delta, expected)


def test_bat_acts_on_each_block_of_the_weight():
    model, delta = adapted("miss_bat", rank=2)
    W, D = layer()[0].weight.detach(), delta.miss_block.detach()
    expected = torch.zeros_like(W)
    for a in range(4):
        for b in range(3):
            for i in range(2):
                for j in range(2):
                    inner = sum(W[2 * a + i, 2 * b + k] * D[a, k, j] for k in range(2))
                    expected[2 * a + i, 2 * b + j] = inner + D[a, i, j]
    assert count(model) == 8 // 2 * 2 * 2
    check_matrix(model, delta, expected)


@pytest.mark.parametrize(
    ("method", "fields", "words"),
    [
        ("miss", {"rank": 7}, r"0: rank is 7, and this layer has 6 inputs .*; 6 is the most"),
        ("miss_bat", {"rank": 3}, r"0: rank is 3, which does not divide inputs=6 and outputs=8; 1, 2 would"),
        ("miss_mini", {"rank": 2, "mini_rank": 3}, r"0: mini_rank is 3, which does not divide outputs=8; 1, 2, 4, 8 would"),
        ("mora", {"rank_pattern": {"9": 2}}, r"rank_pattern: '9' matches none of the adapted modules"),
        ("c3a", {"block_size": 4}, r"0: block_size is 4, which does not divide inputs=6 and outputs=8; 1, 2 would"),
        ("c3a", {"block_size_pattern": {"nowhere": 2}, "block_size": 2}, r"block_size_pattern: 'nowhere' matches none"),
    ],
)
def test_what_does_not_suit_the_layer_is_refused_with_what_would(method, fields, words):
    with pytest.raises(AdapterError, match=words):
        adapted(method, **fields)


@pytest.mark.parametrize("method", ["miss", "miss_bat"])
def test_magnitude_goes_around(method, tmp_path):
    x = torch.randn(4, 6)
    model, _ = adapted(method, shake=0, dtype=torch.float32, magnitude=True, rank=2)
    assert torch.equal(model(x), layer(dtype=torch.float32)(x))
    model, _ = adapted(method, dtype=torch.float32, magnitude=True, rank=2)
    save_adapter(model, tmp_path)
    answer = model(x)
    merge_in_place(model)
    assert (model(x) - answer).abs().max() <= 1e-6 * answer.abs().max()
    assert torch.equal(load_adapter(layer(dtype=torch.float32), tmp_path)(x), answer)


# ---------------------------------------------------------------- C3A


@pytest.mark.parametrize(
    "fields",
    [{"block_size": 8}, {"block_size": 4, "block_size_pattern": {"v_proj": 16}}, {"block_size": 16, "init_weights": True}, {"block_size": 1}],
    ids=str,
)
def test_c3a_is_pefts(fields, tmp_path):
    """PEFT computes it in float32 whatever the model is in.

    Its gradient of the input is wrong (0.21.2 has the conjugate of one factor), so gradients are compared where no other
    layer lies below; the suite holds ours to finite differences.
    """
    held_to_peft(peft.C3AConfig(target_modules=LLAMA, **fields), tmp_path / "many", tolerance=1e-6, gradients=fields["block_size"] == 1)
    held_to_peft(peft.C3AConfig(target_modules=r".*layers\.1\.self_attn\.v_proj", **fields), tmp_path / "one", tolerance=1e-6, changes=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_c3a_is_made_of_circulant_blocks(size):
    model, delta = adapted("c3a", 6, 12, block_size=size)
    w = delta.c3a_kernel.detach()
    expected = torch.zeros(12, 6, dtype=torch.float64)
    for o in range(12):
        for i in range(6):
            expected[o, i] = w[o // size, i // size, (i % size - o % size) % size] / 6
    assert count(model) == 12 * 6 // size
    check_matrix(model, delta, expected, 6, 12)


def test_c3a_starts_as_it_is_asked_to():
    bounds = {"xavier": (6 / 14) ** 0.5, "kaiming": 6**-0.5, "gaussian": 9.0, "zero": 0.0}
    for init, bound in bounds.items():
        _, delta = adapted("c3a", block_size=2, init=init, shake=0)
        assert delta.c3a_kernel.abs().max() <= bound
        assert (delta.c3a_kernel.abs().max() > 0.7 * bound) == (init in ("xavier", "kaiming"))


def test_c3a_trains_from_zero():
    model, delta = adapted("c3a", block_size=2, init="zero", shake=0)
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(model(x), layer()(x))
    model(x).square().sum().backward()
    assert (delta.c3a_kernel.grad != 0).all()


def test_c3a_gives_each_row_what_it_would_have_alone():
    model, _ = adapted("c3a", block_size=2)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    together = model(x)
    for row in range(2):
        for place in range(5):
            assert (model(x[row, place]) - together[row, place]).abs().max() < 1e-12


def test_c3a_is_independent_of_the_adapters_before_it():
    """It reads the layer's input, also where another adapter ran first and where in and out differ."""
    x = torch.randn(3, 6, dtype=torch.float64)
    model, _ = adapted("c3a", block_size=2)
    attach(model, named("c3a", targets=["0"], dtype="auto", block_size=1), name="two", seed=3)
    with torch.no_grad():
        base = layer()(x)
        change = {}
        for name in ("default", "two"):
            switch(model, name)
            change[name] = model(x) - base
        enable(model, "default")
        assert (model(x) - base - change["default"] - change["two"]).abs().max() < 1e-12
        switch(model, ["default", "two"])
        assert (model(x) - base - change["default"] - change["two"]).abs().max() < 1e-12


def test_c3a_on_a_bfloat16_base_has_finite_gradients():
    model = attach(tiny_model().bfloat16(), named("c3a", targets=LLAMA, block_size=8))
    model(torch.arange(6).unsqueeze(0)).logits.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable(model).values())
    assert all(delta.adapters["default"].c3a_kernel.dtype == torch.float32 for _, delta in wrappers(model))
