"""FRoD: the joint basis by its definition, W' = W at the start, and PEFT's adapter in float64."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deltune.adapters.attach import attach, trainable
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.methods.joint import joint_basis, off_diagonal
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from deltune.training.state import load_moving_tensors, moving_tensors
from tests.methods.test_banks import LLAMA, count, deltas, near, shaken, states
from tests.peft_twin import held_to_peft, ids, our_gradients, save_peft, their_gradients, with_peft
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:Specified to not save")
FILE = "adapter_model.safetensors"
FROD = {"progressbar": False, "sparse_rate": 0.05}


def frod():
    return shaken(attach(tiny_model().double(), named("frod", targets=LLAMA, dtype="auto", sparse_rate=0.05)))


def weights_of(count=3, rows=7, columns=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_the_joint_basis_is_what_the_paper_defines():
    """V = RᵀE with E orthogonal and diagonal in T = mean (Q_iᵀQ_i + αI)⁻¹. So VVᵀ = Σ W_iᵀW_i, and in V's terms
    Q_iᵀQ_i is V⁻¹·W_iᵀW_i·V⁻ᵀ, of which that mean must be diagonal."""
    weights = weights_of()
    V = joint_basis(weights, 0.01)
    assert near(V @ V.T, sum(W.T @ W for W in weights))
    inverse = torch.linalg.inv(V)
    T = torch.stack([torch.linalg.inv(inverse @ W.T @ W @ inverse.T + 0.01 * torch.eye(6, dtype=torch.float64)) for W in weights]).mean(0)
    assert near(T, torch.diag(torch.diagonal(T)))
    V = joint_basis(weights_of(2, rows=2), 0.01)  # fewer rows than columns: the right singular vectors
    assert near(V @ V.T, torch.eye(6, dtype=torch.float64))


def test_the_positions_are_distinct_off_the_diagonal_and_all_alike():
    generator = torch.Generator().manual_seed(0)
    tally = torch.zeros(5, 5)
    for _ in range(500):
        for count_ in (4, 15):
            rows, columns = off_diagonal(5, count_, generator)
            assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == count_
            tally[rows, columns] += 1
    assert not torch.diagonal(tally).any()
    off = tally[~torch.eye(5, dtype=torch.bool)]
    assert off.min() > 0.8 * 475 and off.max() < 1.2 * 475  # 500·(4 + 15)/20


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_the_weight_at_the_start_is_w(dtype):
    """Neither 2W, as in the released code, nor W with the errors of its decomposition."""
    model = attach(tiny_model().double(), named("frod", targets=LLAMA, dtype=dtype))
    for _, wrapper in wrappers(model):
        delta = wrapper.adapters["default"]
        assert not delta.delta(None).any()
        if dtype == "auto":
            assert near(delta.U @ torch.diag(delta.frod_lambda_l) @ delta.joint.frod_V.T, wrapper.base_layer.weight)
            assert near(torch.linalg.vector_norm(delta.U, dim=0), torch.ones(delta.site.n_in, dtype=torch.float64))
    assert torch.equal(model(ids(model)).logits, tiny_model().double()(ids(model)).logits)
    model(ids(model)).logits.square().mean().backward()
    assert all(delta.frod_lambda_l.grad.any() and delta.frod_lambda_s_values.grad.any() for delta in deltas(model).values())


def test_frod_is_its_formula():
    """W' = U(diag(λ) + S)Vᵀ with W = U·diag(λ at the start)·Vᵀ."""
    model = frod()
    fresh = attach(tiny_model().double(), named("frod", targets=LLAMA, dtype="auto", sparse_rate=0.05))
    for (place, delta, x, change), old in zip(states(model), deltas(fresh).values(), strict=True):
        W = tiny_model().double().get_submodule(place).weight
        V, width = delta.joint.frod_V, delta.site.n_in
        scaled = W @ torch.linalg.inv(V).T
        U = scaled / scaled.norm(dim=0)
        middle = torch.diag(delta.frod_lambda_l)
        for place_, value in zip(delta.joint.frod_s_indices.T.tolist(), delta.frod_lambda_s_values, strict=True):
            middle[place_[0], place_[1]] += value
        expected = U @ middle @ V.T - W
        assert near(delta.delta(None), expected) and near(change, x @ expected.T)
        assert near(old.frod_lambda_l, scaled.norm(dim=0)) and len(delta.frod_lambda_s_values) == int(0.05 * width * width)
    assert count(model) == 2 * sum(width + int(0.05 * width**2) for width in (32, 32, 64))  # Σ in + ⌊rate·in²⌋


def test_s_learns_at_a_tenth():
    assert next(iter(deltas(frod()).values())).lr_ratios() == {"frod_lambda_s_values": 0.1}


def test_layers_of_a_category_share_their_basis_and_positions():
    by_place = deltas(frod())
    first, second = (by_place[f"model.layers.{block}.self_attn.q_proj"] for block in (0, 1))
    assert first.joint is second.joint is not by_place["model.layers.0.self_attn.v_proj"].joint
    assert not torch.equal(first.U, second.U)
    model = nn.Sequential(*(nn.ModuleDict({"fc": nn.Linear(width, 4)}) for width in (8, 6)))
    with pytest.raises(AdapterError, match=r"layers called fc must have one input width, and these differ: 0\.fc 8, 1\.fc 6"):
        attach(model, named("frod"))


@pytest.mark.parametrize("fields", [{}, {"sparse_rate": 0.0}, {"target_modules": "all-linear"}], ids=str)
def test_frod_is_pefts_as_far_as_pefts_rounding_goes(fields, tmp_path):
    """PEFT rounds U and λ to float32 whatever the model's type; with U's own digits it is the same adapter to 1e-9."""
    config = peft.FrodConfig(**({"target_modules": LLAMA} | FROD | fields))
    held_to_peft(config, tmp_path, tolerance=1e-5, gradients=config.sparse_rate > 0)

    theirs = with_peft(tiny_model().double(), config)
    save_peft(theirs, tmp_path / "again")
    ours = load_adapter(tiny_model().double(), tmp_path / "again", trainable=True)
    for place, delta in deltas(ours).items():
        layer = theirs.base_model.model.get_submodule(place)
        assert torch.allclose(layer.frod_U["default"], delta.U, atol=1e-6)
        layer.frod_U["default"] = delta.U.clone()
    x = ids(ours)
    assert near(ours(x).logits, theirs(x).logits)
    ours(x).logits.square().mean().backward()
    theirs(x).logits.square().mean().backward()
    found, expected = our_gradients(ours), their_gradients(theirs)
    assert found.keys() == expected.keys()
    assert all(near(found[key], expected[key]) for key in found if found[key].numel())


def test_files_without_the_basis_or_with_places_outside_are_refused(tmp_path):
    save_peft(with_peft(tiny_model(), peft.FrodConfig(target_modules=LLAMA, save_projection=False, **FROD)), tmp_path / "without")
    with pytest.raises(AdapterError, match="save_projection is false: the file lacks the joint basis"):
        load_adapter(tiny_model(), tmp_path / "without")
    save_peft(with_peft(tiny_model(), peft.FrodConfig(target_modules=LLAMA, **FROD)), tmp_path / "outside")
    tensors = load_file(tmp_path / "outside" / FILE)
    tensors["base_model.frod_s_indices.self_attn_q_proj"][0, 0] = 32
    save_file(tensors, tmp_path / "outside" / FILE)
    with pytest.raises(AdapterError, match=r"frod_s_indices\.self_attn_q_proj: places outside of 32×32"):
        load_adapter(tiny_model(), tmp_path / "outside")


def test_a_checkpoint_brings_back_the_decomposition_too():
    """Another machine's decomposition may differ in every sign: U and V must come back together."""
    model = frod()
    answer = model(ids(model)).logits
    saved = {name: tensor.clone() for name, tensor in moving_tensors(model).items()}
    other = shaken(attach(tiny_model(seed=5).double(), named("frod", targets=LLAMA, dtype="auto", sparse_rate=0.05), seed=9), seed=3)
    base = tiny_model().double().state_dict()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".adapters." not in name:
                parameter.copy_(base[name.replace(".base_layer", "")])
    load_moving_tensors(other, saved)
    assert torch.equal(other(ids(other)).logits, answer)


def test_files_and_copies_keep_the_function(tmp_path):
    model = frod()
    save_adapter(model, tmp_path)
    again = load_adapter(tiny_model().double(), tmp_path, trainable=True)
    assert torch.equal(again(ids(again)).logits, model(ids(model)).logits) and trainable(again).keys() == trainable(model).keys()
    assert not any(key.endswith((".U", "lambda_0")) for key in load_file(tmp_path / FILE))
    twin = copy.deepcopy(model)
    assert torch.equal(shaken(twin, seed=2)(ids(twin)).logits, shaken(model, seed=2)(ids(model)).logits)


def test_inputs_that_no_layer_uses_do_no_harm():
    model = tiny_model().double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[:, 3] = 0
    bare = copy.deepcopy(model)
    attach(model, named("frod", targets=["q_proj"], dtype="auto"))
    assert torch.equal(model(ids(model)).logits, bare(ids(bare)).logits)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
