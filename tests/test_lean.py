"""Norms and rotary embeddings as nodes, against the modules' own code and torch's gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltune.models import lean
from deltune.models.attention import register
from deltune.models.lean import LeanNorm, make_lean, undo
from deltune.recipe import recipe_of
from tests.architectures import KINDS, small
from tests.test_attention import near, results

HALF_ROTATED = ("llama", "mistral_window", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_neox", "phi3", "granite", "olmo2", "mixtral")
WITHOUT_NORMS = ("gpt2", "gpt_neox", "cohere")


@pytest.fixture(autouse=True, scope="module")
def known():
    register()


def distance(one, other):
    one, other = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (one, other))
    return (one - other).norm() / other.norm()


@pytest.mark.parametrize("name", KINDS)
def test_a_lean_model_is_the_model(name):
    model = small(name)
    inputs = {"input_ids": torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1)), "use_cache": False}
    logits, gradients = results(model, inputs)
    found = make_lean(model)
    assert any(x.what == "rotary embedding" and not x.why_not for x in found) == (name in HALF_ROTATED)
    assert any(x.what.endswith("Norm") and not x.why_not for x in found) == (name not in WITHOUT_NORMS)
    lean_logits, lean_gradients = results(model, inputs)
    near([lean_logits], [logits])
    near(lean_gradients, gradients)  # of the norms' own weights too
    make_lean(model)
    undo(model)
    assert not any("forward" in vars(module) for module in model.modules())
    again = results(model, inputs)
    assert torch.equal(again[0], logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_bfloat16_is_no_farther_from_float32_than_the_modules_own(name):
    model = small(name)
    inputs = {"input_ids": torch.randint(3, 97, (4, 40), generator=torch.Generator().manual_seed(1)), "use_cache": False}
    model.bfloat16().float()  # weights that both types hold
    exact = results(model, inputs)
    model.bfloat16()
    plain = results(model, inputs)
    make_lean(model)
    ours = results(model, inputs)
    for i in (0, 1):
        wanted = [exact[i]] if i == 0 else exact[i]
        plainly, leanly = ([plain[0]], [ours[0]]) if i == 0 else (plain[1], ours[1])
        assert distance(leanly, wanted) <= 1.1 * distance(plainly, wanted)


@pytest.mark.parametrize("form", [lean.Form(1e-6, offset, first) for offset in (0.0, 1.0) for first in (True, False)])
def test_a_norm_has_the_gradients_of_finite_differences(form):
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def norm(x, weight):
        return lean._Norm.apply(x, weight, lean._inverse_rms(x.detach(), form.eps), form)

    assert torch.autograd.gradcheck(norm, (x, weight))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("first", [True, False])
def test_a_norm_in_bfloat16_is_rounded_where_its_form_says_however_many_rows_at_a_time(monkeypatch, offset, first):
    form = lean.Form(1e-6, offset, first)
    x, weight = torch.randn(5, 3, 7).bfloat16().transpose(0, 1), torch.randn(7).bfloat16()
    inverse = lean._inverse_rms(x, form.eps)
    unit = x.float() * inverse
    wanted = unit.bfloat16() * (offset + weight) if first else (unit * (offset + weight.float())).bfloat16()
    for room in (1, 2 * 7, 1 << 17):
        monkeypatch.setattr(lean, "ROOM", room)
        assert torch.equal(lean._normed(x, weight, inverse, form=form), wanted)


def test_rotation_has_the_gradients_of_finite_differences():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 2, 1, 5, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: lean._Rotary.apply(x, cos, sin), (x,))


def test_a_norms_output_can_be_made_again():
    model = small("gemma2").bfloat16()
    make_lean(model)
    norm = model.model.layers[0].input_layernorm
    out = norm(torch.randn(2, 5, 32, dtype=torch.bfloat16, requires_grad=True))
    recipe = recipe_of(out)
    assert torch.equal(recipe.make(recipe.saved), out)


def test_what_is_no_rms_norm_is_left_alone_with_the_reason():
    class ShiftedNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-5

        def forward(self, x):
            return self.weight * (x - x.mean(-1, keepdim=True)) / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    holder = nn.Sequential(ShiftedNorm(), nn.LayerNorm(8))
    (record,) = make_lean(holder)
    assert record.where == "0" and "does not compute" in record.why_not
    assert "forward" not in vars(holder[0])


def test_a_copy_of_a_lean_model_reads_its_own_weights():
    model = small("llama")
    make_lean(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0)
    assert not twin(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.any()
    assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.any()


def test_other_types_than_the_weights_own_go_through_the_modules_code():
    model = small("llama")
    make_lean(model)
    norm = model.model.norm
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    assert torch.equal(norm(x), type(norm).forward(norm, x))
    ids = torch.arange(12)[None]
    undone = copy.deepcopy(model)
    undo(undone)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = model(input_ids=ids).logits, undone(input_ids=ids).logits
    assert ours.dtype == plain.dtype
    assert distance([ours], [undone(input_ids=ids).logits]) <= 1.1 * distance([plain], [undone(input_ids=ids).logits])


def test_transforms_of_functions_go_through_the_modules_code():
    model = small("llama")
    make_lean(model)
    norm = model.model.norm
    x = torch.randn(4, 32)
    each = torch.func.vmap(torch.func.grad(lambda x: norm(x).sin().sum()))(x)
    y = x.clone().requires_grad_()
    torch.testing.assert_close(each, torch.autograd.grad(norm(y).sin().sum(), y)[0])
    replaced = torch.func.functional_call(norm, {"weight": torch.zeros(32)}, (x,))
    assert isinstance(vars(norm)["forward"], LeanNorm) and not replaced.any()


def test_recomputation_gives_the_same_gradients():
    model = small("qwen3", attention_dropout=0.0)
    model.set_attn_implementation("segment")
    make_lean(model)
    inputs = {"input_ids": torch.arange(9)[None], "use_cache": False}
    plain = results(model.train(), inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = results(model, inputs)
    assert torch.equal(plain[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], again[1], strict=True))


def test_an_adapter_on_a_norm_is_as_without(tmp_path):
    from deltune.adapters.attach import attach
    from deltune.adapters.config import ADAPTERS

    models = []
    for fast in (False, True):
        model = small("llama")
        attach(model, ADAPTERS.resolve("ln_tuning")())
        if fast:
            assert any(not x.why_not and x.what.endswith("Norm") for x in make_lean(model))
        models.append(results(model, {"input_ids": torch.arange(9)[None], "use_cache": False}))
    near([models[1][0]], [models[0][0]])
    near(models[1][1], models[0][1])


def test_on_the_meta_device_shapes_go_through():
    with torch.device("meta"):
        model = small("gemma2", "segment", move=False)
        assert all(not x.why_not for x in make_lean(model))
        model(input_ids=torch.ones(1, 9, dtype=torch.long)).logits.sum().backward()
    assert model.model.norm.weight.grad.shape == model.model.norm.weight.shape
