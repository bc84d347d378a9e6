"""MELoRA, GraLoRA, BD-LoRA and PRoLoRA, held to PEFT and to the papers' equations written out entry by entry."""

from __future__ import annotations

import logging
import math

import peft
import pytest
import torch

from deltune.adapters.attach import attach
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.methods.test_products import adapted, check_matrix, count, layer
from tests.peft_twin import held_to_peft, save_peft, with_peft
from tests.tiny import tiny_model

LLAMA = ["q_proj", "v_proj", "down_proj"]


# ---------------------------------------------------------------- MELoRA


def melora(A, B, scale, n_in=6, n_out=8):
    """One product for each block of the diagonal, zero elsewhere."""
    n = len(A)
    result = torch.zeros(n_out, n_in, dtype=torch.float64)
    for o in range(n_out):
        for i in range(n_in):
            a, b = i // (n_in // n), o // (n_out // n)
            if a == b:
                result[o, i] = scale * sum(B[b, o % (n_out // n), j] * A[a, j, i % (n_in // n)] for j in range(A.shape[1]))
    return result


@pytest.mark.parametrize(
    ("fields", "mini_rank", "scale"),
    [
        ({"rank": 3}, 3, 6 / 3),  # as the authors: rank is that of one block, and so is the scale's
        ({"rank": 4, "rank_counts": "whole"}, 2, 2 * 6 / 4),  # given for both blocks: s = n·α/r
        ({"rank": 4, "scaling": "rslora"}, 4, 6 / 2),
        ({"rank": 8, "rank_counts": "whole", "scaling": "rslora"}, 4, 6 / 2),
    ],
    ids=str,
)
def test_melora_scales_by_the_rank_of_one_block(fields, mini_rank, scale):
    model, delta = adapted("melora", blocks=2, alpha=6.0, **fields)
    A, B = delta.lora_A.detach(), delta.lora_B.detach()
    assert A.shape == (2, mini_rank, 3) and B.shape == (2, 4, mini_rank)
    assert count(model) == mini_rank * (6 + 8)  # as many as LoRA of the mini rank
    assert delta.lora_A.abs().max() > 0
    check_matrix(model, delta, melora(A, B, scale))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_melora_can_start_from_the_weights_own_blocks(init, tmp_path):
    model, delta = adapted("melora", blocks=2, rank=2, alpha=3.0, init=init, shake=0)
    W, x = layer()[0].weight.detach(), torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(model(x), layer()(x))
    for i in range(2):
        block = W[4 * i : 4 * i + 4, 3 * i : 3 * i + 3]
        product = delta.lora_B[i] @ delta.lora_A[i]
        if init == "pissa":
            U, S, Vh = torch.linalg.svd(block, full_matrices=False)
            assert (3 / 2 * product - U[:, :2] * S[:2] @ Vh[:2]).abs().max() < 1e-9
        else:
            Q, R = torch.linalg.qr(block)
            assert (product - Q[:, :2] @ R[:2]).abs().max() < 1e-9
    A0, B0 = delta.start_A.clone(), delta.start_B.clone()
    model, delta = adapted("melora", blocks=2, rank=2, alpha=3.0, init=init)
    assert torch.equal(delta.start_A, A0)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(layer(), tmp_path)(x), model(x))
    check_matrix(model, delta, melora(delta.lora_A.detach(), delta.lora_B.detach(), 1.5) - melora(A0, B0, 1.5))


# ---------------------------------------------------------------- GraLoRA


@pytest.mark.parametrize("fields", [{"r": 4}, {"r": 8, "gralora_k": 4}, {"r": 4, "hybrid_r": 3}, {"r": 4, "gralora_k": 1}, {"r": 4, "gralora_dropout": 0.1}], ids=str)
def test_gralora_is_pefts(fields, tmp_path):
    held_to_peft(peft.GraloraConfig(alpha=6, target_modules=LLAMA, **fields), tmp_path)


@pytest.mark.parametrize("hybrid", [0, 2])
def test_gralora_has_a_product_for_each_block(hybrid):
    k, rank, n_in, n_out = 2, 6, 6, 8
    q, rows, columns = rank // k, n_out // k, n_in // k
    model, delta = adapted("gralora", rank=rank, alpha=5.0, blocks=k, hybrid_rank=hybrid)
    A, B = delta.gralora_A.detach(), delta.gralora_B.detach()
    expected = torch.zeros(n_out, n_in, dtype=torch.float64)
    for o in range(n_out):
        for i in range(n_in):
            j, n = o // rows, i // columns  # row and column of blocks
            expected[o, i] = sum(B[j, n * q + p, o % rows] * A[n, i % columns, j * q + p] for p in range(q))
    if hybrid:
        expected += delta.general_B.detach() @ delta.general_A.detach()
    assert count(model) == (rank + hybrid) * (n_in + n_out)  # as many as LoRA of this rank
    check_matrix(model, delta, 5 / (rank + hybrid) * expected)


# ---------------------------------------------------------------- BD-LoRA


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({}, {}), ({"use_rslora": True, "rank_pattern": {"v_proj": 2}}, {}), ({}, {"nblocks": 4}),
        ({}, {"target_modules_bd_a": None, "match_strict": False}), ({}, {"target_modules_bd_a": ["mlp"]}),
    ],
    ids=str,
)
def test_bd_lora_is_pefts(fields, own, tmp_path):
    blocks = {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj", "v_proj"], "nblocks": 2} | own
    rank = 8 if blocks["nblocks"] == 4 else 4
    config = peft.LoraConfig(r=rank, lora_alpha=6, target_modules=LLAMA, use_bdlora=peft.tuners.lora.BdLoraConfig(**blocks), **fields)
    model = held_to_peft(config, tmp_path)
    assert {type(w.adapters["default"]).__name__ for _, w in wrappers(model)} == {"BdLora"}


def test_a_plain_lora_is_not_taken_for_block_diagonal(tmp_path):
    model = held_to_peft(peft.LoraConfig(r=4, lora_alpha=6, target_modules=LLAMA), tmp_path)
    assert {type(w.adapters["default"]).__name__ for _, w in wrappers(model)} == {"Lora"}


@pytest.mark.parametrize("side", ["a", "b"])
def test_bd_lora_has_one_block_diagonal_factor(side):
    rank, n = 4, 2
    model, delta = adapted("bd_lora", rank=rank, alpha=6.0, diagonal_a=["0"] * (side == "a"), diagonal_b=["0"] * (side == "b"))
    A, B = torch.zeros(rank, 6, dtype=torch.float64), torch.zeros(8, rank, dtype=torch.float64)
    for j in range(rank):
        for i in range(6):
            if side == "b":
                A[j, i] = delta.lora_A[j, i]
            elif j // (rank // n) == i // 3:
                A[j, i] = delta.lora_A[j, i % 3]
        for o in range(8):
            if side == "a":
                B[o, j] = delta.lora_B[o, j]
            elif o // 4 == j // (rank // n):
                B[o, j] = delta.lora_B[o, j % (rank // n)]
    assert count(model) == rank * (6 / n + 8 if side == "a" else 6 + 8 / n)
    check_matrix(model, delta, 6 / rank * B @ A)


def test_bd_lora_refuses_layers_that_it_has_no_rule_for(tmp_path):
    with pytest.raises(AdapterError, match="0: it is meant neither by diagonal_a nor by diagonal_b"):
        adapted("bd_lora", rank=2)
    with pytest.raises(AdapterError, match="only one factor can be block-diagonal"):
        adapted("bd_lora", rank=2, diagonal_a=["0"], diagonal_b=["0"])
    own = peft.tuners.lora.BdLoraConfig(target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj"], nblocks=2)
    folder = save_peft(with_peft(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_bdlora=own)), tmp_path)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"nblocks"', '"new_field": 1, "nblocks"'))
    with pytest.raises(AdapterError, match="new_field"):
        load_adapter(tiny_model(), folder)


def test_bd_loras_lists_fit_common_models():
    model = attach(tiny_model(), named("bd_lora", rank=4))
    assert len(wrappers(model)) == 14


# ---------------------------------------------------------------- PRoLoRA


@pytest.mark.parametrize(
    ("n_in", "n_out", "m", "n", "rank", "unshared"),
    [(6, 8, 2, 2, 6, 2), (6, 8, 3, 2, 7, 1), (7, 9, 2, 4, 5, 0), (6, 8, 1, 1, 3, 1), (12, 8, 4, 2, 3, 1)],
)
def test_prolora_rolls_its_chunks_along_the_ranks(n_in, n_out, m, n, rank, unshared):
    fields = {"rank": rank, "alpha": 5.0, "unshared": unshared, "repeat_in": m, "repeat_out": n}
    model, delta = adapted("prolora", n_in, n_out, **fields)
    shared, wide, high = rank - unshared, math.ceil(n_in / m), math.ceil(n_out / n)
    A0, B0 = delta.shared_A.detach(), delta.shared_B.detach()
    assert A0.shape == (shared, wide) and B0.shape == (high, shared)
    stride_in, stride_out = max(shared // m, 1), max(shared // n, 1)
    expected = torch.zeros(n_out, n_in, dtype=torch.float64)
    for o in range(n_out):
        for i in range(n_in):
            for j in range(shared):
                a = A0[(j + i // wide * stride_in) % shared, i % wide]
                b = B0[o % high, (j + o // high * stride_out) % shared]
                expected[o, i] += b * a
            for j in range(unshared):
                expected[o, i] += delta.unshared_B[o, j].item() * delta.unshared_A[j, i].item()
    if n_in % m == 0 and n_out % n == 0:
        assert count(model) == unshared * (n_in + n_out) + shared * (n_in // m + n_out // n)
    check_matrix(model, delta, 5 / rank * expected, n_in, n_out)


def test_proloras_roll_keeps_the_rank_whole():
    """Rolled along the features the chunks would span no more than the rank of one, and less than that of A."""
    _, delta = adapted("prolora", 12, 16, rank=4, unshared=0, repeat_in=4, repeat_out=2)
    _, A, _ = delta.product()
    for chunk in A.split(3, dim=1):
        rows = {tuple(row.tolist()) for row in chunk}
        assert rows == {tuple(row.tolist()) for row in delta.shared_A}  # the same rows, in another order
    assert not torch.equal(A[:, :3], A[:, 3:6])
    assert torch.linalg.matrix_rank(A) == 4


def test_prolora_without_unshared_ranks_repeats_its_blocks_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        _, delta = adapted("prolora", 6, 8, rank=4, unshared=0)
    assert "blocks of the change along the diagonal are all equal" in caplog.text
    matrix = delta.delta(None)
    assert (matrix[:4, :3] - matrix[4:, 3:]).abs().max() < 1e-12
    assert (matrix[:4, :3] - matrix[4:, :3]).abs().max() > 1e-3
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for fields in ({}, {"unshared": 1}, {"unshared": 0, "repeat_in": 3}, {"unshared": 0, "repeat_in": 1, "repeat_out": 1}):
            _, delta = adapted("prolora", 6, 8, rank=4, **fields)
    assert not caplog.text
    _, delta = adapted("prolora", 6, 8, rank=4)
    assert delta.unshared == 1
    matrix = delta.delta(None)
    assert (matrix[:4, :3] - matrix[4:, 3:]).abs().max() > 1e-3


def test_proloras_chunk_starts_within_the_bound_of_the_whole_input():
    _, delta = adapted("prolora", 64, 8, rank=4, repeat_in=4, shake=0)
    bound = 64**-0.5
    assert 0.9 * bound < delta.shared_A.abs().max() <= bound and 0.9 * bound < delta.unshared_A.abs().max() <= bound


@pytest.mark.parametrize(
    ("method", "fields", "words"),
    [
        ("melora", {"blocks": 4}, r"0: blocks is 4, which does not divide inputs=6 and outputs=8; 1, 2 would"),
        ("melora", {"rank": 3, "rank_counts": "whole"}, r"0: rank is 3 for all 2 blocks together, which do not divide it; 2 would"),
        ("melora", {"rank": 4, "init": "pissa"}, r"0: init=pissa gives a block a rank of at most 3, and it is 4"),
        ("melora", {"svd": "full"}, r"svd has no effect"),
        ("gralora", {"rank": 3}, r"0: blocks is 2, which does not divide rank=3 and inputs=6 and outputs=8; 1 would"),
        ("prolora", {"rank": 2, "unshared": 2}, r"0: unshared is 2, and the rank 2; at most 1 fit"),
    ],
)
def test_what_does_not_suit_the_layer_is_refused_with_what_would(method, fields, words):
    with pytest.raises(AdapterError, match=words):
        adapted(method, **fields)
