"""OFT, BOFT and HRA, held to PEFT and to the papers' formulas."""

from __future__ import annotations

import dataclasses
import json

import peft
import pytest
import torch
from peft.tuners.boft import layer as peft_boft
from safetensors.torch import load_file
from torch import nn

from deltune.adapters.attach import attach, merge, trainable
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.methods import orthogonal
from deltune.errors import AdapterError
from tests.peft_twin import held_to_peft, ids, save_peft, with_peft
from tests.tiny import tiny_model

LLAMA = ["q_proj", "v_proj", "down_proj"]


def layer(n_in=16, n_out=6, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_in, n_out)).to(dtype)


def shaken(model, size=0.3):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def adapted(method, model=None, **fields):
    """A shaken adapter on one layer, the layer's W and b, and the delta."""
    model = layer() if model is None else model
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    attach(model, named(method, dtype="auto", **fields))
    shaken(model)
    return model, W, b, model[0].adapters["default"]


def agrees(model, W, b):
    """The adapted model, and the merged one, are this plain layer."""
    x = torch.randn(3, W.shape[1], dtype=torch.float64)
    assert (model(x) - x @ W.T - b).abs().max() < 1e-9
    assert (merge(model)(x) - x @ W.T - b).abs().max() < 1e-9


# ---------------------------------------------------------------- OFT


@pytest.mark.parametrize(
    "fields",
    [{"oft_block_size": 8}, {"r": 2, "oft_block_size": 0}, {"block_share": True, "oft_block_size": 8}, {"num_cayley_neumann_terms": 7}, {"num_cayley_neumann_terms": 3}],
    ids=str,
)
def test_oft_in_its_series_form_is_pefts(fields, tmp_path):
    held_to_peft(peft.OFTConfig(target_modules=LLAMA, **fields), tmp_path, shake=0.03)


@pytest.mark.parametrize("share", [False, True])
def test_exact_oft_is_pefts_with_q_turned(share, tmp_path):
    config = peft.OFTConfig(target_modules=LLAMA, oft_block_size=8, use_cayley_neumann=False, block_share=share)
    held_to_peft(config, tmp_path, gradients=False)
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = load_adapter(tiny_model().double(), tmp_path / "theirs")
    for key, tensor in theirs.items():
        place = key.removeprefix("base_model.model.").removesuffix(".oft_R.weight")
        assert torch.equal(ours.get_submodule(place).adapters["default"].oft_R, -tensor)
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert all(torch.equal(written[key], tensor) for key, tensor in theirs.items())


def test_coft_is_pefts_where_the_bound_is_reached(tmp_path):
    # 4 blocks: PEFT takes the root of their number in float32, which is exact for squares only
    config = peft.OFTConfig(target_modules=["q_proj", "v_proj"], oft_block_size=8, coft=True, eps=0.5)
    held_to_peft(config, tmp_path, gradients=False)


def test_sums_of_peft_that_are_no_series_are_refused(tmp_path):
    folder = save_peft(with_peft(tiny_model(), peft.OFTConfig(target_modules=LLAMA, num_cayley_neumann_terms=2)), tmp_path)
    with pytest.raises(AdapterError, match="num_cayley_neumann_terms is 2"):
        load_adapter(tiny_model(), folder)


@pytest.mark.parametrize("cayley", ["exact", "neumann"])
@pytest.mark.parametrize("share", [False, True])
def test_oft_has_one_sign(cayley, share):
    b, n = 4, 4
    model, W, bias, delta = adapted("oft", block_size=b, cayley=cayley, block_share=share, strength=True, **({} if cayley == "exact" else {"terms": 6}))
    values = delta.oft_R.detach()
    assert values.numel() + 6 == sum(p.numel() for p in trainable(model).values()) == (1 if share else n) * b * (b - 1) // 2 + 6
    eye, R = torch.eye(b, dtype=torch.float64), torch.zeros(16, 16, dtype=torch.float64)
    for block in range(n):
        Q = torch.zeros(b, b, dtype=torch.float64)
        place = iter(values[0 if share else block].tolist())
        for i in range(b):
            for j in range(i + 1, b):
                Q[i, j] = next(place)
                Q[j, i] = -Q[i, j]
        exact = (eye + Q) @ torch.linalg.inv(eye - Q)
        series = eye + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + 2 * Q @ Q @ Q @ Q + Q @ Q @ Q @ Q @ Q
        R[block * b : block * b + b, block * b : block * b + b] = exact if cayley == "exact" else series
    if cayley == "exact":
        assert (R @ R.T - torch.eye(16)).abs().max() < 1e-12
    agrees(model, delta.oft_s.detach().unsqueeze(1) * (W @ R.T), bias)


def test_the_series_tends_to_the_exact_form():
    """In public code the two are transposes of each other."""
    rotations = []
    for fields in ({"cayley": "exact"}, {"cayley": "neumann", "terms": 60}):
        model = layer()
        attach(model, named("oft", block_size=4, dtype="auto", **fields))
        shaken(model, 0.1)
        rotations.append(model[0].adapters["default"].rotation().detach())
    assert (rotations[0] - rotations[1]).abs().max() < 1e-12


def test_the_sign_is_recorded(tmp_path):
    model = nn.Sequential(nn.Linear(16, 6))
    attach(model, named("oft", block_size=4, strength=True))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "deltune.json").read_text())["config"]["sign"] == "plus"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["sign"] == "plus"


@pytest.mark.parametrize(("bound", "largest"), [("authors", 0.1 * 4**2 / 2), ("peft", 0.1 / 2)])
def test_coft_holds_each_block_within_its_bound(bound, largest):
    model, _, _, delta = adapted("oft", block_size=4, coft=True, eps=0.1, bound=bound)
    with torch.no_grad():
        delta.oft_R.mul_(10)
    D = delta.rotation()
    Q = D @ torch.linalg.inv(D + 2 * torch.eye(4))  # D = 2(I − Q)⁻¹Q
    assert torch.allclose(torch.linalg.vector_norm(Q, dim=(1, 2)), torch.tensor(largest, dtype=torch.float64))
    before = delta.oft_R.detach().clone()
    model(torch.randn(2, 16, dtype=torch.float64)).sum().backward()
    assert torch.equal(delta.oft_R, before), "a forward pass changes no weight"


def test_coft_can_turn_with_its_defaults():
    """Without the b² of the authors' bound a block of 32 turns by no more than a millionth, and nothing is learned."""
    model = layer(256, 16, torch.float32)
    x = torch.randn(4, 256)
    before = model(x)
    shaken(attach(model, named("coft")))
    assert (model(x) - before).abs().max() > 5e-3 * before.detach().abs().max()
    delta = model[0].adapters["default"]
    assert torch.linalg.vector_norm(delta.rotation(), dim=(1, 2)).max() < 2.1 * 6e-5 * 32**2 / 8**0.5


@pytest.mark.parametrize("fields", [{"block_size": 5}, {"block_size": 0, "blocks": 3}, {"block_size": 4, "blocks": 4}, {"block_size": 1}], ids=str)
def test_blocks_that_do_not_fit_are_an_error(fields):
    with pytest.raises(AdapterError, match="block"):
        attach(layer(), named("oft", **fields))


def test_blocks_can_rest_in_training_and_never_in_eval():
    model = adapted("oft", block_size=4, block_dropout=0.5)[0]
    x = torch.randn(3, 16, dtype=torch.float64)
    resting = model.eval()(x)
    model.train()
    assert len({round(float(model(x).sum().detach()), 9) for _ in range(20)}) > 1
    assert torch.equal(model.eval()(x), resting)


# ---------------------------------------------------------------- BOFT


def plain_block_diagonal(blocks):
    """What PEFT's CUDA extension computes: [m, n, b, b] -> [m, n·b, n·b]."""
    return torch.stack([torch.block_diag(*factor) for factor in blocks])


@pytest.mark.parametrize(("factors", "size"), [(1, 4), (2, 4), (3, 4), (2, 8)])
def test_boft_is_pefts_also_with_the_factors_that_need_its_extension(factors, size, tmp_path, monkeypatch):
    class Plain:
        apply = staticmethod(plain_block_diagonal)

    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft_boft, "FastBlockDiag", Plain)
    config = peft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=LLAMA)
    held_to_peft(config, tmp_path)


def butterfly(n, b, i):
    """P_i of the paper: in each segment of 2^(i+1) half blocks, first the even half blocks and then the odd ones."""
    h, span = b // 2, 2 ** (i + 1)
    P = torch.zeros(n, n, dtype=torch.float64)
    for segment in range(n // (span * h)):
        order = [*range(0, span, 2), *range(1, span, 2)]
        for new, old in enumerate(order):
            for j in range(h):
                P[(segment * span + new) * h + j, (segment * span + old) * h + j] = 1
    return P


@pytest.mark.parametrize("factors", [1, 2, 3])
@pytest.mark.parametrize("segment", [orthogonal.SEGMENT, 1], ids=["multiplied first", "one by one"])
def test_boft_is_a_product_of_butterflies_without_any_extension(factors, segment, monkeypatch):
    monkeypatch.setattr(orthogonal, "SEGMENT", segment)
    n, b = 16, 4
    model, W, bias, delta = adapted("boft", factors=factors)
    R = delta.boft_R.detach()
    assert sum(p.numel() for p in trainable(model).values()) == factors * (n // b) * b * b + 6
    eye, whole = torch.eye(b, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    for i in range(factors):
        blocks = []
        for k in range(n // b):
            S = (R[i, k] - R[i, k].T) / 2
            blocks.append((eye - S) @ torch.linalg.inv(eye + S))
        P = butterfly(n, b, i) if i else torch.eye(n, dtype=torch.float64)
        whole = P @ torch.block_diag(*blocks) @ P.T @ whole
    assert (whole @ whole.T - torch.eye(n)).abs().max() < 1e-12
    reach = (whole.abs() > 1e-9).sum(dim=1)
    assert reach.min() == reach.max() == b * 2 ** (factors - 1)
    agrees(model, delta.boft_s.detach() * (W @ whole.T), bias)


def test_more_factors_than_blocks_allow_are_an_error():
    with pytest.raises(AdapterError, match="0: 4 blocks of width 4 have at most 3 butterfly factors, and factors is 4"):
        attach(layer(), named("boft", factors=4))


# ---------------------------------------------------------------- HRA


@pytest.mark.parametrize("rank", [2, 5, 8])
def test_hra_is_pefts(rank, tmp_path):
    held_to_peft(peft.HRAConfig(r=rank, target_modules=LLAMA), tmp_path)


def test_hra_with_gram_schmidt_is_pefts_where_peft_is_finite(tmp_path):
    held_to_peft(peft.HRAConfig(r=4, apply_GS=True, init_weights=False, target_modules=LLAMA), tmp_path)


@pytest.mark.parametrize("rank", [2, 6])
def test_hra_is_a_product_of_reflections_in_order(rank):
    model, W, b, delta = adapted("hra", rank=rank)
    assert sum(p.numel() for p in trainable(model).values()) == 16 * rank
    whole = torch.eye(16, dtype=torch.float64)
    for i in range(rank):
        u = delta.hra_u.detach()[:, i]
        u = u / u.norm()
        whole = whole @ (torch.eye(16, dtype=torch.float64) - 2 * torch.outer(u, u))
    agrees(model, W @ whole, b)


def gram_schmidt(U):
    columns = []
    for i in range(U.shape[1]):
        u = U[:, i] - sum((q @ U[:, i]) * q for q in columns)
        columns.append(u / u.norm())
    Q = torch.stack(columns, dim=1)
    return torch.eye(len(U), dtype=U.dtype) - 2 * Q @ Q.T


@pytest.mark.parametrize("exact_start", [True, False])
def test_hra_with_gram_schmidt_is_orthogonal_reflections_and_the_undone_start(exact_start):
    model, W, b, delta = adapted("hra", rank=4, gram_schmidt=True, exact_start=exact_start)
    whole = gram_schmidt(delta.hra_u.detach())
    if exact_start:
        whole = whole @ gram_schmidt(delta.hra_start)
    agrees(model, W @ whole, b)


@pytest.mark.parametrize("exact_start", [True, False])
def test_hra_with_gram_schmidt_is_finite_at_pairs_of_equals_and_afterwards(exact_start):
    """In public code such a start is 0/0."""
    model = layer(dtype=torch.float32)
    attach(model, named("hra", rank=4, gram_schmidt=True, exact_start=exact_start))
    delta = model[0].adapters["default"]
    with torch.no_grad():
        delta.hra_u.copy_(delta.hra_u[:, :2].repeat_interleave(2, dim=1))
    optimizer = torch.optim.Adam(trainable(model).values(), lr=1e-2)
    x, target = torch.randn(8, 16), torch.randn(8, 6)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert torch.isfinite(delta.hra_u).all()
    assert losses[-1] < losses[0]


def test_a_pair_of_equals_changes_nothing_in_any_type():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = layer(64, 6, dtype)
        x = torch.randn(5, 64).to(dtype)
        before = model(x)
        attach(model, named("hra", rank=8))
        assert torch.equal(model(x), before)


def test_an_odd_rank_cannot_start_as_pairs():
    with pytest.raises(AdapterError, match="rank 5 is odd"):
        attach(layer(), named("hra", rank=5))


def test_more_orthogonal_reflections_than_inputs_are_an_error():
    with pytest.raises(AdapterError, match="rank may be 16 at most"):
        attach(layer(), named("hra", rank=18, gram_schmidt=True))


def test_neither_needs_the_weight_to_answer(monkeypatch):
    """What they do to the input makes the base's own product enough."""
    from deltune.adapters.adapted import Below

    monkeypatch.setattr(Below, "weight", lambda self: pytest.fail("W was read in a forward pass"))
    for method, fields in (("oft", {"block_size": 4}), ("boft", {}), ("hra", {"rank": 4}), ("hra_gs", {"rank": 4})):
        model, *_ = adapted(method, **fields)
        model(torch.randn(2, 16, dtype=torch.float64))


def test_a_file_with_tensors_of_another_number_of_factors_is_refused(tmp_path):
    """PEFT without its extension writes one factor's tensors, whatever its fields say."""
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=LLAMA)
    folder = save_peft(with_peft(tiny_model(), config), tmp_path)
    with pytest.raises(AdapterError, match=r"shape \[1, 8, 4, 4\] found, \[2, 8, 4, 4\] expected"):
        load_adapter(tiny_model(), folder)
    fields = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(fields | {"boft_n_butterfly_factor": 1}))
    model = load_adapter(tiny_model(), folder)
    assert torch.isfinite(model(ids(model)).logits).all()


def test_dropout_survives_a_file_that_has_no_word_for_it(tmp_path):
    model = layer(dtype=torch.float32)
    attach(model, dataclasses.replace(named("boft"), dropout=0.25))
    save_adapter(model, tmp_path)
    assert load_adapter(layer(dtype=torch.float32), tmp_path)[0].adapters["default"].config.dropout == 0.25
