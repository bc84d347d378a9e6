"""VeRA, PVeRA, Tied-LoRA and ShareLoRA, held to PEFT or to the papers' formulas; and what holds for shared tensors at all."""

from __future__ import annotations

import copy
import dataclasses
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deltune.adapters.attach import attach, detach, merge, trainable
from deltune.adapters.bank import block_key, category_key, type_key
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from deltune.training.state import load_moving_tensors, moving_tensors
from tests.peft_twin import held_to_peft, ids
from tests.tiny import tiny_model

LLAMA = ["q_proj", "v_proj", "down_proj"]  # 32×32, 16×32, 32×64 in two blocks
SHARING = ["vera", "pvera", "tied_lora", "sharelora"]


def attached(method, seed=0, **fields):
    """The method on the tiny Llama in float64, every trained tensor moved off its start."""
    model = attach(tiny_model().double(), named(method, **({"rank": 4, "targets": LLAMA, "dtype": "auto"} | fields)), seed=seed)
    return shaken(model)


def shaken(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def deltas(model):
    return {place: wrapper.adapters["default"] for place, wrapper in wrappers(model)}


def states(model):
    """The change as a matrix and the layer's answer, to be held to a formula."""
    for place, wrapper in wrappers(model):
        x = torch.randn(3, wrapper.site.n_in, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        yield place, wrapper.adapters["default"], x, wrapper(x) - wrapper.base_layer(x)


def near(one, other):
    return float((one - other).detach().abs().max()) < 1e-9


def count(model):
    return sum(parameter.numel() for parameter in trainable(model).values())


# ---------------------------------------------------------------- PEFT


@pytest.mark.parametrize("fields", [{}, {"save_projection": False, "projection_prng_key": 7}, {"target_modules": "all-linear"}], ids=str)
@pytest.mark.filterwarnings("ignore:Specified to not save")
@pytest.mark.parametrize("make", [peft.VeraConfig, peft.PveraConfig])
def test_vera_and_pvera_are_pefts(make, fields, tmp_path):
    held_to_peft(make(**({"r": 5, "target_modules": LLAMA} | fields)), tmp_path)


def test_a_file_without_the_projection_has_only_the_vectors(tmp_path):
    save_adapter(attached("vera", save_projection=False), tmp_path)
    assert {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")} == {"vera_lambda_b", "vera_lambda_d"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["projection_prng_key"] == 0


def test_pvera_that_samples_at_inference_says_that_it_cannot_merge(tmp_path):
    with pytest.raises(AdapterError, match="cannot be merged, for with sample_at_inference"):
        merge(attached("pvera", sample_at_inference=True))
    with pytest.raises(AdapterError, match=r"magnitude cannot go around pvera: .*drawn anew"):
        attached("pvera", sample_at_inference=True, magnitude=True)
    save_adapter(attached("pvera", sample_at_inference=True), tmp_path)
    assert load_adapter(tiny_model().double(), tmp_path).model.layers[0].self_attn.q_proj.adapters["default"].samples


# ---------------------------------------------------------------- the papers


def test_vera_is_its_formula_and_trains_from_its_start():
    """ΔW[o, i] = b[o]·Σ_k B[o, k]·d[k]·A[k, i]; b = 0 and d = 0.1 at the start, with B not zero, so that b has a gradient."""
    model = attached("vera")
    for _, delta, x, change in states(model):
        A, B = delta.shared.vera_A, delta.shared.vera_B
        b, d = delta.vera_lambda_b, delta.vera_lambda_d
        expected = torch.zeros(delta.site.n_out, delta.site.n_in, dtype=torch.float64)
        for k in range(4):
            expected += torch.outer(b * B[: len(b), k], d[k] * A[k, : delta.site.n_in])
        assert near(delta.delta(None), expected) and near(change, x @ expected.T)
    assert count(model) == sum(d.site.n_out + 4 for d in deltas(model).values())  # Σ (out + r)

    fresh = attach(tiny_model(), named("vera", rank=4, targets=LLAMA))
    fresh(ids(fresh)).logits.square().mean().backward()
    for delta in deltas(fresh).values():
        assert not delta.vera_lambda_b.any() and (delta.vera_lambda_d == 0.1).all()
        assert delta.vera_lambda_b.grad.abs().min() > 0


def test_the_projection_depends_on_its_own_seed_alone():
    one, other = (deltas(attach(tiny_model(), named("vera", rank=4, targets=LLAMA), seed=seed)) for seed in (0, 1))
    third = deltas(attach(tiny_model(), named("vera", rank=4, targets=LLAMA, projection_seed=1)))
    first = [next(iter(found.values())).shared.vera_A for found in (one, other, third)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert len({id(delta.shared) for delta in one.values()}) == 1


def test_pvera_is_its_formula_with_noise_in_training_only():
    model = attached("pvera")
    for _, delta, x, change in states(model):
        n_out, n_in = delta.site.n_out, delta.site.n_in
        A, B, b, d = delta.shared.pvera_A[:, :n_in], delta.shared.pvera_B[:n_out], delta.pvera_lambda_b, delta.pvera_lambda_d
        mean, log_variance = torch.einsum("k,ki,ti->tk", d[:4], A[:4], x), torch.einsum("k,ki,ti->tk", d[4:], A[4:], x)
        assert near(change, torch.einsum("o,ok,tk->to", b, B, mean)) and near(change, x @ delta.delta(None).T)
        delta.train()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            drawn = delta.out(x, None)
            torch.manual_seed(5)  # the global generator, which a checkpoint restores
            noise = torch.randn(mean.shape, dtype=torch.float64)
        assert near(drawn, torch.einsum("o,ok,tk->to", b, B, mean + noise * torch.exp(log_variance / 2)))
        delta.requires_grad_(False)  # as for an adapter that is not the one in training
        assert near(delta.out(x, None), change)
        delta.requires_grad_(True).eval()
    assert count(model) == sum(d.site.n_out + 2 * 4 for d in deltas(model).values())  # Σ (out + 2r)


@pytest.mark.parametrize("train", [["A", "B", "u", "v"], ["u", "v"], ["A", "B"], ["A"], ["B", "u"]], ids=str)
def test_tied_lora_is_its_formula_whatever_is_trained(train):
    """ΔW = s·diag(v)·B·diag(u)·A; only what is named trains, and at the start all of it can begin to move."""
    model = attached("tied_lora", train=train, alpha=6.0)
    for _, delta, x, change in states(model):
        A, B, n_out = delta.tied.A, delta.tied.B, delta.site.n_out
        u = torch.ones(4, dtype=torch.float64) if delta.u is None else delta.u
        v = torch.ones(n_out, dtype=torch.float64) if delta.v is None else delta.v
        expected = 6 / 4 * torch.einsum("o,or,r,ri->oi", v, B, u, A)
        assert near(delta.delta(None), expected) and near(change, x @ expected.T)
    kinds = {type_key(place): d.site for place, d in deltas(model).items()}
    per_type = sum(4 * (s.n_in * ("A" in train) + s.n_out * ("B" in train)) for s in kinds.values())
    per_layer = sum(4 * ("u" in train) + d.site.n_out * ("v" in train) for d in deltas(model).values())
    assert count(model) == per_type + per_layer  # Σ_types r(in + out) + Σ_layers (r + out)

    fresh = attach(tiny_model().double(), named("tied_lora", rank=4, targets=LLAMA, train=train, dtype="auto"))
    assert torch.equal(fresh(ids(fresh)).logits, tiny_model().double()(ids(fresh)).logits)
    fresh(ids(fresh)).logits.square().mean().backward()
    moving = [name.rpartition(".")[2] for name, p in trainable(fresh).items() if p.grad is not None and p.grad.any()]
    assert set(moving) == {fresh.model.layers[0].self_attn.q_proj.adapters["default"].config.zero}


@pytest.mark.parametrize("scope", ["type", "model"])
@pytest.mark.parametrize("part", ["A", "B", "AB"])
def test_sharelora_is_its_formula(part, scope):
    """ΔW = s·B[:out]·A[:, :in]; what is shared is one tensor for the layers of a type, or for all."""
    model = attached("sharelora", part=part, scope=scope, alpha=2.0)
    for _, delta, x, change in states(model):
        A = (delta.shared.A if "A" in part else delta.A)[:, : delta.site.n_in]
        B = (delta.shared.B if "B" in part else delta.B)[: delta.site.n_out]
        expected = 2 / 4 * torch.einsum("or,ri->oi", B, A)
        assert near(delta.delta(None), expected) and near(change, x @ expected.T)
    if scope == "type":
        by_type = {type_key(place): delta for place, delta in deltas(model).items()}
        shared = sum(4 * (d.site.n_in * ("A" in part) + d.site.n_out * ("B" in part)) for d in by_type.values())
    else:
        shared = 4 * (64 * ("A" in part) + 32 * ("B" in part))
    own = sum(4 * (d.site.n_in * ("A" not in part) + d.site.n_out * ("B" not in part)) for d in deltas(model).values())
    assert count(model) == shared + own


def test_sharelora_that_shares_both_gives_all_layers_of_a_type_one_change():
    model = attached("sharelora", part="AB")
    first, second = (layer.self_attn.q_proj.adapters["default"] for layer in model.model.layers)
    assert torch.equal(first.delta(None), second.delta(None))
    assert not torch.equal(first.delta(None), model.model.layers[0].mlp.down_proj.adapters["default"].delta(None)[:, :32])
    apart = attached("sharelora", part="A")
    first, second = (layer.self_attn.q_proj.adapters["default"] for layer in apart.model.layers)
    assert first.shared is second.shared and not torch.equal(first.delta(None), second.delta(None))


# ---------------------------------------------------------------- shared tensors at all


def test_scopes_keys():
    assert type_key("model.layers.3.self_attn.q_proj") == "self_attn.q_proj" and type_key("head") == "head"
    assert block_key("model.layers.3.self_attn.q_proj") == "model.layers.3" and block_key("head") == ""
    assert category_key("model.layers.3.self_attn.q_proj") == "self_attn_q_proj" and category_key("head") == "head"
    assert category_key("bert.layer.0.attention.output.dense") == "attention_output" != category_key("bert.layer.0.output.dense")


def test_layers_that_share_must_have_one_shape_and_one_rank():
    model = nn.Sequential(*(nn.ModuleDict({"fc": nn.Linear(8, width)}) for width in (4, 6)))
    for method in ("tied_lora", "sharelora"):
        with pytest.raises(AdapterError, match=r"must have one shape, and these differ: 0\.fc 4×8, 1\.fc 6×8"):
            attach(model, named(method, rank=2))
        with pytest.raises(AdapterError, match=r"rank_pattern cannot go with .*: its layers share tensors"):
            attach(tiny_model(), named(method, rank=2, rank_pattern={"q_proj": 3}))
    attach(model, named("sharelora", rank=2, scope="model"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", SHARING)
def test_shared_tensors_have_the_configs_type(method, dtype):
    model = attach(tiny_model().half(), named(method, rank=2, targets=LLAMA, dtype=dtype))
    for delta in deltas(model).values():
        tensors = [*delta.parameters(), *delta.buffers()]
        assert tensors and {tensor.dtype for tensor in tensors} == {getattr(torch, dtype)}


@pytest.mark.parametrize("method", SHARING)
def test_a_checkpoint_holds_shared_tensors_once_and_puts_them_back(method):
    model = attached(method)
    before = model(ids(model)).logits
    saved = {name: tensor.clone() for name, tensor in moving_tensors(model).items()}
    assert not any(name.endswith(("vera_A", "vera_B")) for name in saved)  # drawn again from their own seed
    again = shaken(attached(method), seed=3)
    assert not torch.equal(again(ids(again)).logits, before)
    load_moving_tensors(again, saved)
    assert torch.equal(again(ids(again)).logits, before)


@pytest.mark.parametrize("method", SHARING)
def test_copies_share_among_themselves_only(method):
    model = attached(method)
    twin = copy.deepcopy(model)
    for one, other in zip(deltas(model).values(), deltas(twin).values(), strict=True):
        name = one.bank_names()[0]
        assert getattr(one, name) is not getattr(other, name)
    by_place = deltas(twin)
    first, second = (by_place[f"model.layers.{block}.self_attn.q_proj"] for block in (0, 1))
    assert getattr(first, first.bank_names()[0]) is getattr(second, second.bank_names()[0])
    detach(twin)
    assert torch.equal(twin(ids(twin)).logits, tiny_model().double()(ids(twin)).logits)


@pytest.mark.parametrize("method", SHARING)
def test_files_hold_each_shared_tensor_once_and_restore_it(method, tmp_path):
    model = attached(method)
    save_adapter(model, tmp_path)
    again = load_adapter(tiny_model().double(), tmp_path)
    assert torch.equal(again(ids(again)).logits, model(ids(model)).logits)
    config = next(iter(deltas(again).values())).config
    assert dataclasses.replace(config, targets=LLAMA) == next(iter(deltas(model).values())).config
