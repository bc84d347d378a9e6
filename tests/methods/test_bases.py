"""RandLoRA, VB-LoRA and Uni-LoRA, held to PEFT and to the papers' formulas."""

from __future__ import annotations

import copy
import json
import math
import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from deltune.adapters.attach import attach, trainable
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.errors import AdapterError
from deltune.training.state import load_moving_tensors, moving_tensors
from tests.methods.test_banks import LLAMA, attached, count, deltas, near, shaken, states
from tests.peft_twin import held_to_peft, ids, our_gradients, save_peft, their_gradients, with_peft
from tests.tiny import tiny_model

LAYERS = {"q_proj": (32, 32), "v_proj": (16, 32), "down_proj": (32, 64)}  # out, in; two of each
SHARING = {"randlora": {"rank": 6}, "vblora": {"rank": 3, "num_vectors": 7, "vector_length": 8}, "unilora": {"rank": 3, "length": 50}}
FILE = "adapter_model.safetensors"


# ---------------------------------------------------------------- RandLoRA


def pairs(delta):
    """(B_j [max, r], A [r, min]) of each base, as the formula has them."""
    A = delta.bases.randlora_A[:, 0, : delta.smallest]
    return [(delta.bases.randlora_B[: delta.largest, j], A) for j in range(delta.n)]


@pytest.mark.parametrize("bases", ["dense", "sparse", "very_sparse"])
def test_randlora_is_the_double_sum(bases):
    """ΔW = s·Σ_j B_j Λ_j A Γ_j, its transpose where out < in; s = α/(r√n), n = ⌈min/r⌉."""
    model = attached("randlora", rank=6, alpha=12.0, bases=bases)
    for _, delta, x, change in states(model):
        n_out, n_in = delta.site.n_out, delta.site.n_in
        n = math.ceil(min(n_out, n_in) / 6)
        scales, gates = delta.randlora_lambda, delta.randlora_gamma
        assert scales.shape == (6, n) and gates.shape == (n, min(n_out, n_in))
        expected = torch.zeros(max(n_out, n_in), min(n_out, n_in), dtype=torch.float64)
        for j, (B, A) in enumerate(pairs(delta)):
            for i in range(6):
                expected += torch.outer(B[:, i] * scales[i, j], A[i] * gates[j])
        expected = 12 / (6 * math.sqrt(n)) * (expected if n_in <= n_out else expected.T)
        assert near(delta.delta(None), expected) and near(change, x @ expected.T)
    least = [min(shape) for shape in LAYERS.values()]
    assert count(model) == 2 * sum(math.ceil(m / 6) * (6 + m) for m in least)  # Σ n(r + min)


def test_randlora_starts_at_zero_with_bases_of_deviation_one():
    for bases, zeros in (("dense", 0), ("sparse", 2 / 3), ("very_sparse", 1 - 1 / math.sqrt(32))):
        model = attach(tiny_model(), named("randlora", rank=8, targets=LLAMA, bases=bases))
        delta = model.model.layers[0].self_attn.q_proj.adapters["default"]
        B = delta.bases.randlora_B
        assert B.shape == (64, 4, 8) and delta.bases.randlora_A.shape == (8, 1, 32)
        assert float(B.mean()) == pytest.approx(0, abs=0.1) and float(B.std()) == pytest.approx(1, rel=0.1)
        assert float((B == 0).float().mean()) == pytest.approx(zeros, abs=0.06)
        assert not delta.randlora_lambda.any() and (delta.randlora_gamma == 1 / 32).all()
        assert delta.scale == pytest.approx(64 / 8 / math.sqrt(4))
        model(ids(model)).logits.square().mean().backward()
        assert delta.randlora_lambda.grad.abs().max() > 0


@pytest.mark.parametrize("fields", [{}, {"sparse": True}, {"very_sparse": True, "r": 5}, {"r": 40}], ids=str)
def test_randlora_of_pefts_files_pairs_and_scales_as_peft_does(fields, tmp_path):
    config = peft.RandLoraConfig(**({"r": 8, "randlora_alpha": 24, "target_modules": LLAMA} | fields))
    theirs = with_peft(tiny_model().double(), config)
    save_peft(theirs, tmp_path / "theirs")
    ours = load_adapter(tiny_model().double(), tmp_path / "theirs", trainable=True)
    x = ids(ours)
    answer = ours(x).logits
    assert near(answer, theirs(x).logits) and not torch.allclose(answer, tiny_model().double()(x).logits, atol=1e-3)
    answer.square().mean().backward()
    theirs(x).logits.square().mean().backward()
    found, expected = our_gradients(ours), their_gradients(theirs)
    assert found.keys() == expected.keys() and all(near(found[key], expected[key]) for key in found)

    save_adapter(ours, tmp_path / "ours")
    written, read = (load_file(tmp_path / side / FILE) for side in ("ours", "theirs"))
    repeated = {key for key in read if "layers" in key and key.endswith(("randlora_A", "randlora_B"))}
    assert written.keys() == read.keys() - repeated and len(repeated) == 2 * 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT misses its copies of the bases, and has them all the same
        again = peft.PeftModel.from_pretrained(tiny_model().double(), tmp_path / "ours", autocast_adapter_dtype=False).eval()
    assert near(again(x).logits, answer)
    for delta in deltas(ours).values():
        assert delta.config.peft_compat
        paired = delta.scale * sum(B @ torch.diag(delta.randlora_lambda[:, j]) @ (A * delta.randlora_gamma[j]) for j, (B, A) in enumerate(pairs(delta)))
        if delta.n > 1:  # PEFT's is not the formula
            assert not torch.allclose(delta.delta(None), paired if delta.site.n_in <= delta.site.n_out else paired.T)


def test_a_file_whose_layers_disagree_on_the_shared_bases_is_refused(tmp_path):
    save_peft(with_peft(tiny_model(), peft.RandLoraConfig(r=8, target_modules=LLAMA)), tmp_path)
    tensors = load_file(tmp_path / FILE)
    key = "base_model.model.model.layers.1.self_attn.q_proj.randlora_A"
    save_file(tensors | {key: tensors[key] + 1}, tmp_path / FILE)
    with pytest.raises(AdapterError, match=r"q_proj\.randlora_A: the layers share this tensor, and base_model\.randlora_A is another"):
        load_adapter(tiny_model(), tmp_path)


@pytest.mark.filterwarnings("ignore:Specified to not save")
def test_randlora_without_its_bases_is_read_only_where_they_can_be_drawn_again(tmp_path):
    save_peft(with_peft(tiny_model(), peft.RandLoraConfig(r=8, target_modules=LLAMA, save_projection=False)), tmp_path / "theirs")
    with pytest.raises(AdapterError, match=r"save_projection is false: .* number type that depends on the machine"):
        load_adapter(tiny_model(), tmp_path / "theirs")
    model = attached("randlora", rank=8, save_projection=False, projection_seed=4)
    save_adapter(model, tmp_path / "ours")
    assert not any("randlora_A" in key or "randlora_B" in key for key in load_file(tmp_path / "ours" / FILE))
    again = load_adapter(tiny_model().double(), tmp_path / "ours")
    assert torch.equal(again(ids(again)).logits, model(ids(model)).logits)


def test_projections_are_drawn_as_ever():
    """Checkpoints, and files without the projection, rely on it: what a seed gives must never change."""
    delta = attach(tiny_model(), named("randlora", rank=8, targets=LLAMA)).model.layers[0].self_attn.q_proj.adapters["default"]
    assert delta.bases.randlora_B[0, 0, :3].tolist() == [-1.7167192697525024, 0.7818372845649719, -0.8318411111831665]
    delta = attach(tiny_model(), named("vera", rank=4, targets=LLAMA)).model.layers[0].self_attn.q_proj.adapters["default"]
    assert delta.shared.vera_B[-1, :3].tolist() == [1.089026689529419, -0.31361183524131775, 0.5388903021812439]


# ---------------------------------------------------------------- VB-LoRA


@pytest.mark.parametrize("fields", [{}, {"topk": 3, "target_modules": "all-linear"}], ids=str)
def test_vblora_is_pefts(fields, tmp_path):
    held_to_peft(peft.VBLoRAConfig(**({"r": 3, "num_vectors": 7, "vector_length": 8, "target_modules": LLAMA} | fields)), tmp_path)


def test_vblora_is_its_formula():
    """Piece (p, q) of A is Σ_{k of the topk} softmax_k(logits[p, q])·bank[k]; B likewise, its pieces running down columns."""
    model = attached("vblora", **SHARING["vblora"])
    for _, delta, x, change in states(model):
        bank = delta.vectors.vblora_vector_bank

        def piece(logits, bank=bank):
            order = sorted(range(7), key=lambda h: -float(logits[h]))[:2]
            total = sum(math.exp(float(logits[h])) for h in order)
            return sum(math.exp(float(logits[h])) / total * bank[h] for h in order)

        A = torch.stack([torch.cat([piece(logits) for logits in row]) for row in delta.vblora_logits_A])
        B = torch.cat([torch.stack([piece(logits) for logits in block], 1) for block in delta.vblora_logits_B])
        assert near(delta.delta(None), B @ A) and near(change, x @ (B @ A).T)
    logits = 2 * sum(3 * (n_in + n_out) // 8 * 7 for n_out, n_in in LAYERS.values())
    assert count(model) == 7 * 8 + logits  # h·b + Σ r·h(in + out)/b


def test_vblora_learns_its_logits_ten_times_as_fast():
    """1e-2 for the logits, 1e-3 for the vectors."""
    delta = attached("vblora", **SHARING["vblora"]).model.layers[0].self_attn.q_proj.adapters["default"]
    assert delta.lr_ratios() == {"vblora_logits_A": 10.0, "vblora_logits_B": 10.0}


def test_vblora_says_which_lengths_fit():
    with pytest.raises(AdapterError, match=r"vector_length is 256, and does not divide its in dimension 32; .* can be 1, 2, 4, 8, 16$"):
        attach(tiny_model(), named("vblora", targets=["v_proj"]))
    with pytest.raises(AdapterError, match="topk is 9; there are 8 vectors"):
        attach(tiny_model(), named("vblora", topk=9, num_vectors=8))


@pytest.mark.parametrize("num_vectors", [7, 300])
def test_vblora_of_chosen_vectors_only_is_read_both_ways(num_vectors, tmp_path):
    """In float32: PEFT reads such files of no other type."""
    config = peft.VBLoRAConfig(r=2, num_vectors=num_vectors, vector_length=8, target_modules=LLAMA, save_only_topk_weights=True)
    theirs = with_peft(tiny_model(), config)
    save_peft(theirs, tmp_path / "theirs")
    ours = load_adapter(tiny_model(), tmp_path / "theirs")
    x = ids(ours)
    assert torch.allclose(ours(x).logits, theirs(x).logits, atol=1e-6)
    assert not torch.allclose(ours(x).logits, tiny_model()(x).logits, atol=1e-4)
    assert all(torch.isfinite(tensor).all() for tensor in ours.state_dict().values())
    save_adapter(ours, tmp_path / "ours")
    written, read = (load_file(tmp_path / side / FILE) for side in ("ours", "theirs"))
    assert {key: (t.shape, t.dtype) for key, t in written.items()} == {key: (t.shape, t.dtype) for key, t in read.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "ours").eval()
    assert torch.allclose(again(x).logits, ours(x).logits, atol=1e-6)


# ---------------------------------------------------------------- Uni-LoRA


@pytest.mark.parametrize("fields", [{}, {"proj_seed": 3, "theta_d_length": 2000}, {"target_modules": "all-linear"}], ids=str)
def test_unilora_is_pefts(fields, tmp_path):
    held_to_peft(peft.UniLoraConfig(**({"r": 3, "theta_d_length": 50, "target_modules": LLAMA} | fields)), tmp_path)


def test_unilora_is_its_formula_in_the_models_order():
    """Each entry of every A and B is θ[p]/√(uses of p); the uses of all places differ by one at most."""
    one, other = (attached("unilora", targets=targets, **SHARING["unilora"]) for targets in (LLAMA, LLAMA[::-1]))
    assert torch.equal(one(ids(one)).logits, other(ids(other)).logits)
    places = np.concatenate([delta.places.numpy() for delta in deltas(one).values()])
    uses = np.bincount(places, minlength=50)
    assert uses.max() - uses.min() <= 1 and len(places) == 2 * 3 * sum(n_in + n_out for n_out, n_in in LAYERS.values())
    for _, delta, x, change in states(one):
        theta, n_in, n_out = delta.theta.unilora_theta_d, delta.site.n_in, delta.site.n_out
        # the roots are float32 numbers, as PEFT has them
        entries = torch.stack([theta[p] * float(np.float32(1) / np.sqrt(np.float32(uses[p]))) for p in delta.places.tolist()])
        A, B = entries[: 3 * n_in].reshape(3, n_in), entries[3 * n_in :].reshape(n_out, 3)
        assert near(delta.delta(None), B @ A) and near(change, x @ (B @ A).T)
    assert count(one) == 50  # d


def test_unilora_writes_its_vector_alone(tmp_path):
    save_adapter(attached("unilora", **SHARING["unilora"]), tmp_path)
    assert {key: tuple(t.shape) for key, t in load_file(tmp_path / FILE).items()} == {"base_model.unilora_theta_d": (50,)}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["proj_seed"] == 42


# ---------------------------------------------------------------- shared tensors


@pytest.mark.parametrize("method", SHARING)
def test_checkpoints_leave_out_what_a_seed_gives_and_put_the_rest_back(method):
    model = attached(method, **SHARING[method])
    answer = model(ids(model)).logits
    saved = {name: tensor.clone() for name, tensor in moving_tensors(model).items()}
    assert saved.keys() == trainable(model).keys()
    twin = shaken(copy.deepcopy(model), seed=4)
    assert torch.equal(model(ids(model)).logits, answer) and not torch.equal(twin(ids(twin)).logits, answer)
    again = shaken(attached(method, **SHARING[method]), seed=5)
    for other in (twin, again):
        load_moving_tensors(other, saved)
        assert torch.equal(other(ids(other)).logits, answer)


@pytest.mark.parametrize("method", SHARING)
def test_shared_bases_have_the_configs_type(method):
    model = attach(tiny_model().half(), named(method, targets=LLAMA, dtype="bfloat16", **SHARING[method]))
    tensors = [t for delta in deltas(model).values() for t in [*delta.parameters(), *delta.buffers()]]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.bfloat16}
