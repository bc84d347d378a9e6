"""Where adapters go and how they come off again: targets, tied and shared layers, copies, several adapters."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltune.adapters.attach import (
    active,
    adapters,
    attach,
    detach,
    disabled,
    enable,
    merge,
    merge_in_place,
    switch,
    trainable,
    unmerge,
)
from deltune.adapters.methods.lora import LoraConfig
from deltune.adapters.wrapper import Wrapper, base_name, wrappers
from deltune.errors import AdapterError
from tests.tiny import tiny_model

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = torch.tensor([[1, 5, 2, 10, 7]])


def adapted(model):
    return [name for name, _ in wrappers(model)]


def lora(**changes):
    return LoraConfig(**({"rank": 2} | changes))


def moved(model, seed=0, name="default"):
    """Move one adapter off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if f".adapters.{name}." in parameter_name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# ---------------------------------------------------------------- targets


def test_all_linear_is_every_linear_layer_but_the_head():
    model = attach(tiny_model(), lora())
    assert len(adapted(model)) == 2 * len(PROJECTIONS)
    assert {name.rpartition(".")[2] for name in adapted(model)} == PROJECTIONS


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (["model.layers.0.mlp.up_proj", "lm_head"], ["model.layers.0.mlp.up_proj", "lm_head"]),
        (r".*layers\.1\..*(up|down)_proj", ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]),
        (r".*embed.*", ["model.embed_tokens"]),
    ],
)
def test_targets_are_name_endings_full_names_or_one_pattern(targets, expected):
    assert adapted(attach(tiny_model(), lora(targets=targets))) == expected


def test_an_ending_begins_at_a_dot():
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "big_proj": nn.Linear(2, 2)})
    assert adapted(attach(model, lora(targets=["proj"]))) == ["proj"]


def test_an_exclusion_takes_what_is_inside_it_too():
    model = attach(tiny_model(), lora(exclude=["layers.0", "o_proj"]))
    assert {name.split(".")[2] for name in adapted(model)} == {"1"}
    assert not any("o_proj" in name for name in adapted(model))


REFUSED = [
    (dict(targets=["q_prj"]), r"targets: 'q_prj' matches no module.*Nearest names: q_proj"),
    (dict(targets=["q_proj", "query"]), r"targets: 'query' matches no module"),
    (dict(targets=["attn.q_proj"]), r"Nearest names: self_attn\.q_proj"),
    (dict(targets="q_proj"), r"no layer's full name matches 'q_proj'.*give a list: \[q_proj\].*Nearest names: q_proj"),
    (dict(targets=r"layers\.\d+\.q_proj"), "no layer's full name matches"),
    (dict(targets="(("), "is no regular expression"),
    (dict(targets=[]), "targets is empty"),
    (dict(targets=["mlp"]), r"model\.layers\.0\.mlp is a LlamaMLP; adapters go on Linear, Conv1D and Embedding"),
    (dict(targets=["norm"]), r"model\.norm is a LlamaRMSNorm"),
    (dict(exclude=["oproj"]), r"exclude: 'oproj' matches no module of the model.*o_proj"),
    (dict(targets=["q_proj"], exclude=["self_attn"]), "'q_proj' matches no module that is left to adapt"),
    (dict(modules_to_save=["head"]), r"modules_to_save: 'head' matches no module.*lm_head"),
    (dict(targets=["lm_head"], modules_to_save=["lm_head"]), "'lm_head' matches no module that is left"),
    (dict(rank_pattern={"query": 4}), "rank_pattern: 'query' matches none of the adapted modules"),
    (dict(alpha_pattern={"((": 4.0}), "is no regular expression"),
    (dict(rank_pattern={"q_proj": 0}), "rank_pattern gives it rank 0"),
    (dict(rank=0), "rank is 0; it must be above 0"),
    (dict(rank="8"), "rank is '8'; it must be int"),
    (dict(rank=True), "rank is True"),
    (dict(alpha=float("nan")), "alpha is nan"),
    (dict(dropout=1.0), "dropout is 1.0; it must be below 1"),
    (dict(scaling="rs"), "scaling is 'rs'; it can be standard, rslora"),
    (dict(targets=("q_proj",)), "targets is"),
    (dict(dtype="float64"), "dtype is 'float64'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_a_config_that_does_not_fit_is_refused_and_the_model_left_alone(changes, message):
    model = tiny_model()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(AdapterError, match=message):
        attach(model, lora(**changes))
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert vars(model).keys() == vars(tiny_model()).keys()


def test_a_model_that_is_one_layer_says_what_to_do():
    with pytest.raises(AdapterError, match=r"the model itself is a single Linear.*torch\.nn\.Sequential"):
        attach(nn.Linear(3, 3), lora())
    assert adapted(attach(nn.Sequential(nn.Linear(3, 3)), lora())) == ["0"]


@pytest.mark.parametrize("name", ["", "a.b", "a b", "keys", "train", "ä"])
def test_adapter_names_are_plain_words(name):
    with pytest.raises(AdapterError, match="cannot be called"):
        attach(tiny_model(), lora(), name=name)


def test_a_layer_whose_weight_is_read_past_it_is_refused():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1)
    with pytest.raises(AdapterError, match=r"layers\.0\.linear1: its owner, a TransformerEncoderLayer, reads"):
        attach(encoder, lora(targets=["linear1"]))
    with pytest.raises(AdapterError, match=r"0\.out_proj: its owner, a MultiheadAttention"):
        attach(nn.Sequential(nn.MultiheadAttention(8, 2)), lora())


def test_a_linear_layer_with_a_forward_of_its_own_is_not_guessed_at():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Renamed(nn.Linear):
        pass

    assert adapted(attach(nn.Sequential(Renamed(3, 3)), lora())) == ["0"]
    with pytest.raises(AdapterError, match="1 is a Doubled"):
        attach(nn.Sequential(nn.Linear(3, 3), Doubled(3, 3)), lora())
    assert adapted(attach(nn.Sequential(nn.Linear(3, 3), Doubled(3, 3)), lora(exclude=["1"]))) == ["0"]


# ---------------------------------------------------------------- frozen, trained, named


def test_only_the_adapter_is_trained_and_detaching_gives_the_flags_back():
    model = tiny_model()
    model.model.norm.weight.requires_grad_(False)
    attach(model, lora(targets=["q_proj"]))
    assert set(trainable(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".adapters.default.lora_" in name for name in trainable(model))
    detach(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]


def test_base_names_are_those_of_the_plain_model():
    plain = tiny_model()
    model = attach(copy.deepcopy(plain), lora(targets=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]))
    names = {base_name(name) for name, _ in model.named_parameters() if ".adapters." not in name}
    assert names == dict(plain.named_parameters()).keys()


def test_models_find_on_an_adapted_layer_what_they_read_of_a_layer():
    model = attach(tiny_model(), lora(targets=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]))
    layer, table = model.model.layers[0].self_attn.q_proj, model.get_input_embeddings()
    assert (layer.in_features, layer.out_features, layer.bias) == (32, 32, None)
    assert layer.weight is layer.base_layer.weight
    assert (table.num_embeddings, table.padding_idx) == (264, 258)
    assert model.lm_head.weight is model.lm_head.adapters["default"].weight
    with pytest.raises(AttributeError):
        layer.no_such_thing  # noqa: B018


def test_an_adapted_model_can_be_copied():
    model = moved(attach(tiny_model(), lora(modules_to_save=["lm_head"])))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    detach(twin)
    assert torch.equal(logits(twin), logits(tiny_model()))
    assert adapters(model).keys() == {"default"}


def test_a_layer_in_two_places_is_adapted_in_both():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    before = model(x)
    moved(attach(model, lora()))
    assert model[0] is model[2] and isinstance(model[0], Wrapper)
    unmerged = model(x)
    merge(model)
    assert model[0] is model[2] is shared
    assert torch.allclose(model(x), unmerged, atol=1e-6) and not torch.allclose(model(x), before)


# ---------------------------------------------------------------- several adapters


def test_adapters_add_up_in_any_company():
    plain = tiny_model()
    one = moved(attach(tiny_model(), lora(targets=["lm_head"]), name="one"), 1, "one")
    two = moved(attach(tiny_model(), lora(targets=["lm_head"]), name="two"), 2, "two")
    both = attach(attach(tiny_model(), lora(targets=["lm_head"]), name="one"), lora(targets=["lm_head"]), name="two")
    moved(moved(both, 1, "one"), 2, "two")
    assert active(both) == ["one", "two"]
    # on the last layer the changes of the logits add up exactly
    assert torch.allclose(logits(both) - logits(plain), logits(one) + logits(two) - 2 * logits(plain), atol=1e-5)
    switch(both, "two")
    assert torch.equal(logits(both), logits(two))
    enable(both, "one")
    assert active(both) == ["two", "one"]


def test_adapters_on_different_layers_keep_their_order():
    model = attach(tiny_model(), lora(targets=["1.self_attn.q_proj"]), name="b")
    attach(model, lora(targets=["q_proj"]), name="a")
    assert active(model) == ["b", "a"]
    switch(model, ["a", "b"])
    assert active(model) == ["a", "b"]
    assert model.model.layers[1].self_attn.q_proj.running == ["a", "b"]
    detach(model, "a")
    assert active(model) == ["b"] and adapted(model) == ["model.layers.1.self_attn.q_proj"]


def test_unknown_and_repeated_names_are_refused():
    model = attach(tiny_model(), lora(), name="one")
    with pytest.raises(AdapterError, match="has an adapter 'one' already"):
        attach(model, lora(), name="one")
    for call in (switch, enable, detach, merge, merge_in_place):
        with pytest.raises(AdapterError, match="no adapter 'two'; it has one"):
            call(model, "two")
    for call in (merge, detach):
        with pytest.raises(AdapterError, match="no adapter to"):
            call(tiny_model())


def test_merging_all_asks_about_adapters_that_are_off():
    model = attach(attach(tiny_model(), lora(), name="one"), lora(), name="two")
    moved(moved(model, 1, "one"), 2, "two")
    switch(model, "one")
    only_one = logits(model)
    with pytest.raises(AdapterError, match="adapters two are switched off"):
        merge(model)
    with pytest.raises(AdapterError, match="'two' is switched off"):
        merge_in_place(model, "two")
    merge(model, "one")
    assert adapters(model).keys() == {"two"}
    detach(model)
    assert torch.allclose(logits(model), only_one, atol=1e-5)


def test_one_of_two_adapters_can_be_merged_in_place():
    model = attach(attach(tiny_model(), lora(), name="one"), lora(targets=["q_proj"]), name="two")
    moved(moved(model, 1, "one"), 2, "two")
    before, unmerged = {k: v.clone() for k, v in model.state_dict().items()}, logits(model)
    merge_in_place(model, "one")
    assert torch.allclose(logits(model), unmerged, atol=1e-5)
    switch(model, "two")  # unmerges
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_training_a_merged_adapter_is_refused():
    model = moved(attach(tiny_model(), lora()))
    merge_in_place(model)
    model.train()
    with pytest.raises(AdapterError, match="are merged and would not be trained"):
        model(IDS)
    with torch.no_grad():
        model(IDS)
    unmerge(model)
    model(IDS).logits.sum().backward()


def test_disabled_ends_with_the_block_also_when_it_raises():
    model = moved(attach(tiny_model(), lora(modules_to_save=["lm_head"])))
    before = logits(model)
    with pytest.raises(RuntimeError, match="mine"), disabled(model):
        assert torch.equal(logits(model), logits(tiny_model()))
        raise RuntimeError("mine")
    assert torch.equal(logits(model), before)


# ---------------------------------------------------------------- modules trained in full


def test_a_saved_module_is_trained_beside_the_frozen_one():
    model = attach(tiny_model(), lora(modules_to_save=["lm_head", "model.norm"]))
    assert {base_name(name) for name in trainable(model) if "lora" not in name} == {
        "lm_head.adapters.default.weight",
        "model.norm.adapters.default.weight",
    }
    original = model.lm_head.base_layer.weight.clone()
    model(IDS).logits.sum().backward()
    assert model.lm_head.base_layer.weight.grad is None
    moved(model)
    assert torch.equal(model.lm_head.base_layer.weight, original)
    answer = logits(model)
    merge(model)
    assert type(model.lm_head) is nn.Linear and not torch.equal(model.lm_head.weight, original)
    assert torch.allclose(logits(model), answer, atol=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_only_one_copy_of_a_module_can_answer():
    model = attach(tiny_model(), lora(targets=["q_proj"], modules_to_save=["lm_head"]), name="one")
    with pytest.raises(AdapterError, match="lm_head is trained in full by adapter one, which is active"):
        attach(model, lora(targets=["q_proj"], modules_to_save=["lm_head"]), name="two")
    with pytest.raises(AdapterError, match="lm_head is trained in full by adapter one; it cannot be adapted"):
        attach(model, lora(targets=["lm_head"]), name="two")
    switch(model, [])
    attach(model, lora(targets=["q_proj"], modules_to_save=["lm_head"]), name="two")
    with pytest.raises(AdapterError, match="one and two each train a copy"):
        switch(model, ["one", "two"])
    assert active(model) == ["two"]
    with pytest.raises(AdapterError, match="trained in full by adapter one as well"):
        merge(model, "two")


def test_a_module_with_an_adapter_inside_is_not_copied():
    model = attach(tiny_model(), lora(targets=["q_proj"]), name="one")
    with pytest.raises(AdapterError, match="is, or holds, a layer with an adapter"):
        attach(model, lora(targets=["o_proj"], modules_to_save=["model.layers.0"]), name="two")


# ---------------------------------------------------------------- tied weights


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merging_one_of_two_tied_layers_unties_them(target, tmp_path):
    from transformers import AutoModelForCausalLM

    plain = tiny_model(tie_word_embeddings=True)
    model = moved(attach(tiny_model(tie_word_embeddings=True), lora(targets=[target])))
    other = "lm_head" if target == "embed_tokens" else "embed_tokens"
    before = logits(model)
    merge_in_place(model)
    assert torch.allclose(logits(model), before, atol=1e-5)
    unmerge(model)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    merge(model)
    assert torch.allclose(logits(model), before, atol=1e-5)
    tables = {"embed_tokens": model.get_input_embeddings().weight, "lm_head": model.get_output_embeddings().weight}
    assert torch.equal(tables[other], plain.get_input_embeddings().weight)
    assert not torch.equal(tables[target], tables[other])
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_detaching_leaves_tied_layers_tied():
    model = detach(moved(attach(tiny_model(tie_word_embeddings=True), lora(targets=["embed_tokens"], modules_to_save=["lm_head"]))))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_merging_elsewhere_leaves_tied_layers_tied(tmp_path):
    model = merge(moved(attach(tiny_model(tie_word_embeddings=True), lora())))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True


# ---------------------------------------------------------------- other models


def test_any_module_takes_adapters():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 6), Conv1D(4, 6)])
            self.table = nn.Embedding(5, 4)

        def forward(self, ids):
            return self.layers[1](torch.tanh(self.layers[0](self.table(ids))))

    model = Plain()
    attach(model, lora())
    assert adapted(model) == ["layers.0", "layers.1"]
    ids = torch.tensor([0, 4, 2])
    moved(model)
    before = model(ids)
    merge(model)
    assert torch.allclose(model(ids), before, atol=1e-6)


def test_generation_and_gradient_checkpointing_work_on_an_adapted_model():
    model = moved(attach(tiny_model(), lora()))
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 8)
    model.train()
    model(IDS).logits.square().mean().backward()
    straight = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(IDS).logits.square().mean().backward()
    for name, parameter in trainable(model).items():
        assert torch.allclose(parameter.grad, straight[name], atol=1e-6)
