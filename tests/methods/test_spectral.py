"""SVFT, PSOFT, TinyLoRA and OSF, held to PEFT and to the papers' formulas."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft.tuners.psoft.layer import PsoftLayer
from safetensors.torch import load_file, save_file
from torch import nn

from deltune.adapters.attach import attach, detach, merge, trainable
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.errors import AdapterError
from tests.peft_twin import held_to_peft, ids, read_peft, save_peft, with_peft
from tests.tiny import tiny_model

LLAMA = ["q_proj", "v_proj", "down_proj"]
PSOFT_ALONE = ("psoft_A", "psoft_B")
OSF_ALONE = ("osf_U_first", "osf_S_first", "osf_V_first", "osf_U_high", "osf_V_high")


def layer(n_in=9, n_out=6, dtype=torch.float64):
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


def agrees(model, W, b, tolerance=1e-9):
    """The adapted model, and the merged one, are this plain layer."""
    x = torch.randn(3, W.shape[1], dtype=torch.float64)
    assert (model(x) - x @ W.T - b).abs().max() < tolerance
    assert (merge(model)(x) - x @ W.T - b).abs().max() < tolerance


def num_trained(model):
    return sum(parameter.numel() for parameter in trainable(model).values())


# ---------------------------------------------------------------- SVFT


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 6),
        ({"rank": 3}, 3),
        ({"gate": True}, 6 + 1),
        ({"pattern": "banded", "off_diagonals": 2}, 6 * 5 - 2 * 3),
        ({"pattern": "banded", "off_diagonals": 99}, 36),
        ({"pattern": "random", "off_diagonals": 2, "gate": True}, 6 * 5 - 2 * 3 + 1),
    ],
    ids=str,
)
def test_svft_learns_a_sparse_matrix_between_singular_vectors(fields, count):
    model, W, b, delta = adapted("svft", **fields)
    assert num_trained(model) == count  # n(2d + 1) − d(d + 1) places within d of the diagonal
    n = fields.get("rank") or 6
    S = torch.linalg.svdvals(W)
    # signs are free, and go together
    assert (delta.svft_U.T @ W @ delta.svft_V.T - torch.diag(S[:n])).abs().max() < 1e-9
    assert (delta.svft_U.T @ delta.svft_U - torch.eye(n)).abs().max() < 1e-9
    assert (delta.svft_V @ delta.svft_V.T - torch.eye(n)).abs().max() < 1e-9
    M = torch.zeros(n, n, dtype=torch.float64)
    d = fields.get("off_diagonals")
    if d is None:
        places = [(i, i) for i in range(n)]
    elif fields["pattern"] == "banded":
        places = [(i, j) for i in range(n) for j in range(n) if abs(i - j) <= d]
    else:
        places = [tuple(place) for place in delta.svft_places.T.tolist()]
        assert len(set(places)) == len(places) == 24
    values = delta.svft_M.detach() * (torch.sigmoid(delta.svft_gate.detach()) if fields.get("gate") else 1)
    for (i, j), value in zip(places, values.tolist(), strict=True):
        M[i, j] = value
    change = torch.einsum("oi,ij,jk->ok", delta.svft_U, M, delta.svft_V)
    agrees(model, W + change, b)


def test_svft_top_k_takes_the_best_aligned_directions_and_only_in_square_layers():
    delta = adapted("svft", layer(6, 6), pattern="top_k", off_diagonals=1)[-1]
    score = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            score[i, j] = delta.svft_U[:, i] @ delta.svft_V[j]
    places = {tuple(place) for place in delta.svft_places.T.tolist()}
    assert len(places) == 16
    taken = sorted((float(score[place]) for place in places), reverse=True)
    assert taken == sorted(score.flatten().tolist(), reverse=True)[:16]
    with pytest.raises(AdapterError, match="6×9; use banded or random"):
        attach(layer(), named("svft", pattern="top_k"))


@pytest.mark.parametrize("fields", [{}, {"rank": 2}, {"pattern": "banded"}, {"pattern": "random", "gate": True}], ids=str)
def test_svft_changes_nothing_at_its_start_and_never_truncates_the_weight(fields):
    """The authors' code starts from random values, and with a rank keeps only that much of W."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = layer(dtype=dtype)
        x = torch.randn(4, 9).to(dtype)
        before, weight = model(x), model[0].weight.detach().clone()
        attach(model, named("svft", **fields))
        assert torch.equal(model(x), before)
        assert torch.equal(detach(model)[0].weight, weight)


# ---------------------------------------------------------------- PSOFT


@pytest.fixture
def psoft_in_float64(monkeypatch):
    """PEFT takes the weight apart in float32 and refuses a float64 one before it gets there."""
    take_apart = PsoftLayer._build_psoft_ab_cache_buffers

    def in_float32(self, name, how):
        weight = self.get_base_layer().weight
        exact = weight.data
        weight.data = exact.float()
        take_apart(self, name, how)
        weight.data = exact
        self._set_psoft_ab_cache_buffers(name, *(cache.double() for cache in self._get_psoft_ab_cache_buffers(name)))

    monkeypatch.setattr(PsoftLayer, "_build_psoft_ab_cache_buffers", in_float32)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"psoft_svd": "lowrank", "random_seed": 3, "psoft_svd_lowrank_niter": 4},
        {"psoft_alpha": 16, "ab_svd_init": "pissa_init"},
        {"psoft_orth": False},
        {"psoft_mag_a": False},
        {"psoft_mag_a": False, "psoft_mag_b": False, "use_cayley_neumann": True},
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3, "cayley_neumann_eps": 0.2},
    ],
    ids=str,
)
def test_psoft_is_pefts(fields, psoft_in_float64, tmp_path):
    # PEFT divides the singular values by alpha / r in float32, and takes roots: exact for powers of four alone
    config = peft.PsoftConfig(**{"r": 4, "psoft_alpha": 4, "target_modules": LLAMA} | fields)
    held_to_peft(config, tmp_path, ours_alone=PSOFT_ALONE)


@pytest.mark.parametrize("cayley", ["exact", "neumann"])
def test_psoft_turns_the_principal_part(cayley):
    r = 4
    model, W, b, delta = adapted("psoft", rank=r, svd="full", cayley=cayley)
    assert num_trained(model) == r * (r - 1) // 2 + 2 * r
    U, S, V = torch.linalg.svd(W.float(), full_matrices=False)
    U, S, V = U[:, :r].double(), S[:r].double(), V[:r].double()
    Q = torch.zeros(r, r, dtype=torch.float64)
    place = iter(delta.psoft_R.tolist())
    for i in range(r):
        for j in range(i + 1, r):
            Q[i, j] = next(place)
            Q[j, i] = -Q[i, j]
    eye = torch.eye(r, dtype=torch.float64)
    turn = (eye + Q) @ torch.linalg.inv(eye - Q) if cayley == "exact" else eye + 2 * (Q + Q @ Q + Q @ Q @ Q) + Q @ Q @ Q @ Q
    R = torch.diag(delta.vector_b.detach()) @ turn @ torch.diag(delta.vector_a.detach())
    agrees(model, W + U @ torch.diag(S) @ (R - eye) @ V, b, 1e-6)  # the factors are rounded to float32 once
    assert (delta.delta(W) - delta.psoft_B @ (R - eye) @ delta.psoft_A).abs().max() < 1e-12


def test_psoft_keeps_lengths_and_angles_of_the_principal_part():
    _, W, _, delta = adapted("psoft", rank=4, svd="full", strength_in=False, strength_out=False)
    principal = delta.psoft_B @ delta.psoft_A
    moved = principal + delta.delta(W).detach()
    assert torch.allclose(torch.linalg.svdvals(moved)[:4], torch.linalg.svdvals(principal)[:4])


def test_psoft_reads_its_own_file_without_taking_the_weight_apart(tmp_path, monkeypatch):
    model = shaken(attach(layer(dtype=torch.float32), named("psoft", rank=3)))
    save_adapter(model, tmp_path)
    monkeypatch.setattr(torch, "svd_lowrank", lambda *a, **k: pytest.fail("an SVD was repeated"))
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: pytest.fail("an SVD was repeated"))
    x = torch.randn(2, 9)
    assert torch.equal(load_adapter(layer(dtype=torch.float32), tmp_path)(x), model(x))


# ---------------------------------------------------------------- TinyLoRA


@pytest.mark.filterwarnings("ignore:Specified to not save projection")
@pytest.mark.parametrize("tying", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("saved", [True, False])
def test_tinylora_is_pefts(tying, saved, tmp_path):
    # 6 layers: 6, 4, 3 and 1 groups
    config = peft.TinyLoraConfig(r=3, u=5, weight_tying=tying, save_projection=saved, target_modules=LLAMA)
    model = held_to_peft(config, tmp_path)
    numbers = {id(v) for name, v in model.named_parameters() if ".tied.v." in name}
    assert len(numbers) == {0.0: 6, 0.3: 4, 0.5: 3, 1.0: 1}[tying]


def test_tinylora_mixes_frozen_matrices_by_a_few_numbers():
    model, W, b, delta = adapted("tinylora", rank=3, num_trained=5, svd="full")
    assert num_trained(model) == 5
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    root = torch.diag(S[:3].sqrt())
    # each factor is defined up to the signs of its triplets
    signs = torch.sign((delta.tinylora_A @ V[:3].T).diagonal())
    A, B = torch.diag(signs) @ root @ V[:3], U[:, :3] @ root @ torch.diag(signs)
    middle = sum(v * P for v, P in zip(delta.tied.v[0].tolist(), delta.tinylora_P, strict=True))
    agrees(model, W + B @ middle @ A, b)


def test_tinylora_groups_share_one_vector_and_it_is_counted_once():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    attach(model, named("tinylora", num_trained=7, weight_tying=0.5))  # round(2.5) = 2 groups of 2, and the rest to the last
    deltas = [layer.adapters["default"] for layer in model]
    assert [delta.group for delta in deltas] == [0, 0, 1, 1, 1]
    assert num_trained(model) == 2 * 7
    assert deltas[0].tied.v[deltas[0].group] is deltas[1].tied.v[deltas[1].group]


@pytest.mark.parametrize("init", ["zeros", "uniform"])
def test_tinyloras_numbers_are_never_what_memory_held(init, monkeypatch):
    empty = torch.empty

    def dirty(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", dirty)
    model = layer(dtype=torch.float32)
    attach(model, named("tinylora", num_trained=64, init=init))
    v = trainable(model)["0.adapters.default.tied.v.0"]
    if init == "zeros":
        assert torch.equal(v, torch.zeros(64))
    else:
        assert 0 < v.detach().abs().max() <= 0.02


def test_a_peft_file_whose_numbers_were_left_uninitialised_is_read_by_its_tensors(tmp_path):
    config = peft.TinyLoraConfig(r=2, u=4, init_weights=False, target_modules=LLAMA)
    folder = save_peft(with_peft(tiny_model(), config), tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: torch.full_like(t, 0.1) if "tinylora_v" in key else t for key, t in tensors.items()}, folder / "adapter_model.safetensors")
    model = load_adapter(tiny_model(), folder, trainable=True)
    assert all(torch.equal(v, torch.full_like(v, 0.1)) for v in trainable(model).values())


# ---------------------------------------------------------------- OSF


@pytest.mark.parametrize("fields", [{}, {"effective_rank": 5}, {"effective_rank": 0.25, "rank_pattern": {"v_proj": 0.75, r"0\.mlp": 9}}], ids=str)
def test_osf_is_pefts(fields, tmp_path):
    held_to_peft(peft.OSFConfig(target_modules=LLAMA, **fields), tmp_path, ours_alone=OSF_ALONE)


def test_osf_writes_numbers_and_patterns_that_peft_understands(tmp_path):
    model = attach(tiny_model(), named("osf", targets=LLAMA, kept=6, kept_pattern={"v_proj": 0.25, "q_proj": 1}))
    shaken(model, 0.02)
    save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["effective_rank"] == 6 and list(fields["rank_pattern"].values()) == [0.25, 1]
    x = ids(model)
    assert (read_peft(tiny_model(), tmp_path)(x).logits - model(x).logits).abs().max() < 1e-4
    (tmp_path / "deltune.json").unlink()
    assert torch.equal(load_adapter(tiny_model(), tmp_path)(x).logits, model(x).logits)


@pytest.mark.parametrize(("n_in", "n_out"), [(9, 6), (6, 9), (6, 6)])
def test_osf_trains_the_smallest_triplets_beside_an_untouched_weight(n_in, n_out):
    plain = layer(n_in, n_out)
    first = plain[0].weight.detach().clone()
    model, W, b, delta = adapted("osf", plain, kept=2)
    assert torch.equal(model[0].base_layer.weight, first)
    r = 6 - 2
    assert num_trained(model) == r * (n_in + n_out + 1)
    U, S, V = torch.linalg.svd(W.float(), full_matrices=False)
    high = (U[:, :2] * S[:2] @ V[:2]).double()
    low = torch.einsum("or,r,ri->oi", delta.U_low.detach(), delta.S_low.detach(), delta.V_low.detach())
    agrees(model, high + low, b, 1e-5)  # W is taken apart in float32
    exact = W - delta.U_first * delta.S_first @ delta.V_first + low
    assert (W + delta.delta(W) - exact).abs().max() < 1e-12
    assert torch.equal(detach(adapted("osf", layer(n_in, n_out), kept=2)[0])[0].weight, first)


@pytest.mark.parametrize(("n_in", "n_out"), [(9, 6), (6, 9), (6, 6)])
def test_osfs_gradients_stay_off_the_kept_spans_and_are_whole_elsewhere(n_in, n_out):
    model, W, b, delta = adapted("osf", layer(n_in, n_out), kept=2)
    x = torch.randn(5, n_in, dtype=torch.float64)
    model(x).square().sum().backward()
    U, S, V = (t.detach().clone().requires_grad_() for t in (delta.U_low, delta.S_low, delta.V_low))
    change = torch.einsum("or,r,ri->oi", U, S, V) - delta.U_first * delta.S_first @ delta.V_first
    (x @ (W + change).T + b).square().sum().backward()
    assert (delta.U_high.T @ delta.U_low.grad).abs().max() < 1e-5 * delta.U_low.grad.abs().max()
    assert (delta.V_low.grad @ delta.V_high.T).abs().max() < 1e-5 * delta.V_low.grad.abs().max()
    high_U, high_V = delta.U_high @ delta.U_high.T, delta.V_high.T @ delta.V_high
    assert (delta.U_low.grad - (U.grad - high_U @ U.grad)).abs().max() < 1e-9
    assert (delta.V_low.grad - (V.grad - V.grad @ high_V)).abs().max() < 1e-9
    assert (delta.S_low.grad - S.grad).abs().max() < 1e-9


@pytest.mark.parametrize("kept", [6, 40, 0.1])
def test_osf_keeps_at_least_one_triplet_and_trains_at_least_one(kept):
    with pytest.raises(AdapterError, match="at least one must be kept and one trained"):
        attach(layer(), named("osf", kept=kept))


@pytest.mark.parametrize(("method", "fields"), [("svft", {"rank": 7}), ("psoft", {"rank": 7})])
def test_more_triplets_than_there_are_is_an_error(method, fields):
    with pytest.raises(AdapterError, match="rank 7 is more than its 6 singular triplets"):
        attach(layer(), named(method, **fields))
