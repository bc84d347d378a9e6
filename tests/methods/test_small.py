"""BitFit, BEFT, LN-tuning and SSF: held to PEFT where it has them, and to the papers' formulas."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from deltune.adapters.attach import attach, merge, merge_in_place, trainable, unmerge
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.layers import kind_of
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.peft_twin import held_to_peft
from tests.test_adapters_methods import bits, same, shaken
from tests.tiny import tiny_model


def gpt2(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms off 0 and 1
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return model.eval()


SMALL = dict(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)


def qwen2():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(Qwen2Config(**SMALL)).eval()


def gemma2():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8)).eval()


IDS = torch.tensor([[1, 7, 3, 4, 9]])


def test_beft_is_pefts_on_layers_without_a_bias(tmp_path):
    held_to_peft(peft.BeftConfig(target_modules=["v_proj", "down_proj"]), tmp_path, merges=False)


def test_beft_is_pefts_on_layers_with_a_bias(tmp_path):
    held_to_peft(peft.BeftConfig(target_modules=["v_proj"]), tmp_path, make=qwen2)


@pytest.mark.parametrize("make", [tiny_model, gpt2, gemma2], ids=["rms", "layernorm", "one-plus"])
def test_ln_tuning_is_pefts(make, tmp_path):
    norms = [name for name, module in make().named_modules() if type(module).__name__.endswith("Norm")]
    held_to_peft(peft.LNTuningConfig(target_modules=norms, task_type="CAUSAL_LM"), tmp_path, make=make)


@pytest.mark.parametrize("make", [tiny_model, gpt2, gemma2])
def test_every_norm_of_a_model_is_found_and_nothing_else(make):
    model = make()
    norms = {name for name, module in model.named_modules() if "norm" in name.lower() or ".ln_" in name}
    assert {name for name, module in model.named_modules() if kind_of(module) == "norm"} == norms
    attach(model, named("ln_tuning"))
    assert {place for place, _ in wrappers(model)} == norms


def test_what_is_no_plain_norm_is_none():
    class GatedNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x, gate):
            return x * gate * self.weight

    for module in (nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.LayerNorm((2, 4)), nn.LayerNorm(4, elementwise_affine=False), GatedNorm()):
        assert kind_of(module) is None
    assert kind_of(nn.LayerNorm(4)) == kind_of(nn.LayerNorm(4, bias=False)) == kind_of(nn.RMSNorm(4)) == "norm"


def test_an_expression_that_matches_norms_too_means_the_linear_layers():
    model = attach(gpt2(), named("lora", targets=r".*h\.0\..*", rank=2))
    assert all(kind_of(wrapper.base_layer) == "conv1d" for _, wrapper in wrappers(model))


@pytest.mark.parametrize("make", [tiny_model, gpt2])
def test_ln_tuning_counts_as_the_norms_do_and_equals_a_model_with_these_norms(make, tmp_path):
    model = attach(make().double(), named("ln_tuning", dtype="auto"))
    plain = make().double()
    norms = {name: module for name, module in plain.named_modules() if kind_of(module) == "norm"}
    assert sum(p.numel() for p in trainable(model).values()) == sum(p.numel() for m in norms.values() for p in m.parameters())
    shaken(model)
    with torch.no_grad():
        for place, wrapper in wrappers(model):
            norms[place].weight.copy_(wrapper.adapters["default"].weight)
            if norms[place]._parameters.get("bias") is not None:
                norms[place].bias.copy_(wrapper.adapters["default"].bias)
    assert (model(IDS).logits - plain(IDS).logits).abs().max() < 1e-9


def test_a_norm_in_bfloat16_is_unchanged_at_the_start_and_merges_to_what_was_trained():
    model = gpt2().bfloat16()
    before = model(IDS).logits
    attach(model, named("ln_tuning"))
    assert torch.equal(model(IDS).logits, before)
    shaken(model)
    adapted, trained = model(IDS).logits, wrappers(model)[0][1].adapters["default"].weight.detach()
    merge_in_place(model)
    assert torch.equal(model(IDS).logits, adapted)
    assert torch.equal(wrappers(model)[0][1].base_layer.weight, trained.bfloat16())
    unmerge(model)
    assert same(bits(model), bits(shaken(attach(gpt2().bfloat16(), named("ln_tuning")))))


def test_bitfit_trains_every_bias_there_is_and_equals_a_model_with_these_biases():
    model = attach(gpt2().double(), named("bitfit", dtype="auto"))
    plain = gpt2().double()
    biases = {name: p for name, p in plain.named_parameters() if name.endswith(".bias")}
    assert sum(p.numel() for p in trainable(model).values()) == sum(p.numel() for p in biases.values())
    shaken(model)
    with torch.no_grad():
        for place, wrapper in wrappers(model):
            biases.pop(f"{place}.bias").add_(wrapper.adapters["default"].bias)
    assert not biases
    assert (model(IDS).logits - plain(IDS).logits).abs().max() < 1e-9
    adapted = model(IDS).logits
    assert (merge(model)(IDS).logits - adapted).abs().max() < 1e-9


def test_bitfit_without_a_bias_says_what_to_do():
    with pytest.raises(AdapterError, match="no layer of the model that is left to adapt has a bias"):
        attach(tiny_model(), named("bitfit"))
    with pytest.raises(AdapterError, match=r"q_proj has no bias to train. add=true gives it one"):
        attach(tiny_model(), named("bitfit", targets=["q_proj"]))
    model = shaken(attach(tiny_model(), named("bitfit", targets="all-linear", add=True)))
    with pytest.raises(AdapterError, match="changes the bias, and this layer has none to merge into"):
        merge(model)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_ssf_is_its_formula_and_merges_where_a_bias_is(bias, shift):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=bias), nn.LayerNorm(4, bias=bias)).double()
    linear, norm = ({name: p.detach().clone() for name, p in layer.named_parameters()} for layer in model)
    shaken(attach(model, named("ssf", shift=shift, dtype="auto")))
    x = torch.randn(3, 5, dtype=torch.float64)
    deltas = [wrapper.adapters["default"] for _, wrapper in wrappers(model)]
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for row in range(3):
        h = [sum(linear["weight"][i, j] * x[row, j] for j in range(5)) + (linear["bias"][i] if bias else 0) for i in range(4)]
        h = [deltas[0].scale[i] * h[i] + (deltas[0].shift[i] if shift else 0) for i in range(4)]
        mean = sum(h) / 4
        variance = sum((value - mean) ** 2 for value in h) / 4
        for i in range(4):
            y = (h[i] - mean) / (variance + 1e-5).sqrt() * norm["weight"][i] + (norm["bias"][i] if bias else 0)
            expected[row, i] = deltas[1].scale[i] * y + (deltas[1].shift[i] if shift else 0)
    assert (model(x) - expected).abs().max() < 1e-9
    assert sum(p.numel() for p in trainable(model).values()) == (2 if shift else 1) * (4 + 4)
    if shift and not bias:
        with pytest.raises(AdapterError, match="changes the bias, and this layer has none"):
            merge(model)
    else:
        assert (merge(model)(x) - expected).abs().max() < 1e-9


def test_ssf_can_start_as_its_authors_have_it():
    model = attach(nn.Sequential(nn.Linear(64, 512)), named("ssf", targets=["0"], init="normal"))
    delta = wrappers(model)[0][1].adapters["default"]
    assert abs(delta.scale.mean() - 1) < 0.005 and abs(delta.scale.std() - 0.02) < 0.003 and abs(delta.shift.std() - 0.02) < 0.003


@pytest.mark.parametrize("method", ["bitfit", "beft", "ln_tuning", "ssf"])
def test_settings_without_effect_are_refused(method):
    assert any("dropout has no effect" in problem for problem in named(method, dropout=0.1).problems())
    with pytest.raises(AdapterError, match="magnitude is True"):
        attach(gpt2(), named(method, magnitude=True))


def test_a_norms_file_holds_the_norms_own_values(tmp_path):
    from safetensors.torch import load_file

    model = shaken(attach(gpt2(), named("ln_tuning")))
    save_adapter(model, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")
    merged = dict(merge(load_adapter(gpt2(), tmp_path)).named_parameters())
    for key, value in written.items():
        name = key.removeprefix("base_model.model.").replace(".ln_tuning_layers", "")
        assert torch.allclose(merged[name], value, atol=1e-6)
