"""Trainable tokens, held to PEFT: rows of the embedding, and of a head that is tied to it."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deltune.adapters.attach import attach, detach, merge, merge_in_place, trainable, unmerge
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.peft_twin import held_to_peft, ids
from tests.test_adapters_methods import bits, same, shaken
from tests.tiny import tiny_model

TOKENS = [3, 250, 17, 258]  # 258 is the padding token, whose row an embedding does not train


def tied():
    return tiny_model(tie_word_embeddings=True)


@pytest.mark.parametrize("make", [tiny_model, tied], ids=["alone", "with a tied head"])
def test_trainable_tokens_are_pefts(make, tmp_path):
    held_to_peft(peft.TrainableTokensConfig(token_indices=[*range(0, 264, 2)]), tmp_path, make=make)


def test_a_head_with_rows_of_its_own_is_pefts(tmp_path):
    held_to_peft(peft.TrainableTokensConfig(token_indices=TOKENS[:3], target_modules=["lm_head"]), tmp_path)


def test_rows_of_an_untied_head_do_not_go_into_a_tied_model(tmp_path):
    model = attach(tiny_model(), named("trainable_tokens", token_indices=TOKENS, targets=["embed_tokens", "lm_head"]))
    assert len(trainable(model)) == 2
    save_adapter(shaken(model), tmp_path)
    with pytest.raises(AdapterError, match=r"lm_head: its rows differ from those of model.embed_tokens"):
        load_adapter(tied(), tmp_path, any_base=True)


@pytest.mark.parametrize("make", [tiny_model, tied], ids=["alone", "with a tied head"])
def test_it_equals_a_model_with_these_rows(make):
    model = shaken(attach(make().double(), named("trainable_tokens", token_indices=TOKENS, dtype="auto")))
    rows = wrappers(model)[0][1].adapters["default"].shared.rows.detach()
    assert rows.shape == (len(TOKENS), 32) and sum(p.numel() for p in trainable(model).values()) == len(TOKENS) * 32
    plain = make().double()
    with torch.no_grad():
        for place, token in enumerate(TOKENS):
            for column in range(32):
                plain.model.embed_tokens.weight[token, column] = rows[place, column]
    x = torch.tensor([[3, 4, 17, 250, 258]])
    assert (model(x).logits - plain(x).logits).abs().max() < 1e-9


def test_an_embeddings_padding_row_gets_no_gradient():
    model = attach(tiny_model(), named("trainable_tokens", token_indices=TOKENS))
    x = torch.tensor([[3, 258, 17, 250, 258]])
    model(x).logits.square().sum().backward()
    gradient = next(iter(trainable(model).values())).grad
    assert torch.equal(gradient.abs().sum(1) > 0, torch.tensor([True, True, True, False]))


def test_tied_layers_stay_tied_through_merging_and_files(tmp_path):
    model = attach(tied(), named("trainable_tokens", token_indices=TOKENS))
    assert [place for place, _ in wrappers(model)] == ["model.embed_tokens", "lm_head"]
    assert len(trainable(model)) == 1
    before = bits(shaken(model))
    answer = model(ids(model)).logits
    merge_in_place(model)
    assert torch.allclose(model(ids(model)).logits, answer, atol=1e-5)
    unmerge(model)
    assert same(bits(model), before)
    save_adapter(model, tmp_path)
    written = load_file(tmp_path / "adapter_model.safetensors")  # as PEFT, the rows for each of the layers
    one, other = (written[f"base_model.model.{place}.trainable_tokens_delta"] for place in ("model.embed_tokens", "lm_head"))
    assert torch.equal(one, other) and len(written) == 2
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["embed_tokens"]
    assert torch.equal(load_adapter(tied(), tmp_path)(ids(model)).logits, answer)
    merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert torch.allclose(model(ids(model)).logits, answer, atol=1e-5)


def test_a_tied_head_of_another_adapter_is_untied_when_merged():
    model = attach(tied(), named("trainable_tokens", token_indices=TOKENS), name="tokens")
    attach(model, named("lora", targets=["lm_head"], rank=2), name="head")
    answer = shaken(model, names=("tokens", "head"))(ids(model)).logits
    merge(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight and not model.config.tie_word_embeddings
    assert torch.allclose(model(ids(model)).logits, answer, atol=1e-5)


def test_detaching_leaves_the_tie_as_it_was():
    model = attach(tied(), named("trainable_tokens", token_indices=TOKENS))
    detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "token_indices is empty"),
        ({"token_indices": [3, 264, -1]}, "has rows 0 to 263, and none for 264, -1"),
        ({"token_indices": [3, 4, 3]}, "token_indices: 3 is given twice"),
        ({"token_indices": [3], "dropout": 0.1}, "dropout has no effect"),
        ({"token_indices": [3], "magnitude": True}, "magnitude is True"),
        ({"token_indices": [3], "modules_to_save": ["lm_head"]}, "lm_head holds the same weight as model.embed_tokens"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(AdapterError, match=message):
        attach(tied(), named("trainable_tokens", **changes))


def test_a_model_that_does_not_name_its_input_must_name_the_layer():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Embedding(5, 4), nn.Embedding(6, 4)

    with pytest.raises(AdapterError, match="does not say which Embedding"):
        attach(Two(), named("trainable_tokens", token_indices=[1]))
    model = attach(Two(), named("trainable_tokens", token_indices=[1], targets=["one", "other"]))
    assert len(trainable(model)) == 2
