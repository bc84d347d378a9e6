"""Which parameters move, and how they are counted."""

from __future__ import annotations

import re

import pytest
from torch import nn

from deltune.errors import ModelError
from deltune.models.select import parameter_table, select_trainable
from tests.tiny import tiny_model


def trainable(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("enable", "disable", "expression"),
    [
        ([], [], r".*"),
        (["*"], ["*norm*"], r"^(?!.*norm).*"),
        (["model.layers.1.*"], [], r"model\.layers\.1\..*"),
        (["*.q_proj.weight", "lm_head.weight"], ["*layers.0*"], r"model\.layers\.1\.self_attn\.q_proj\.weight|lm_head\.weight"),
        (["*layers.?.mlp.*"], ["*.down_proj.*"], r".*mlp\.(gate|up)_proj\.weight"),
        ([], ["*layers*"], r"^(?!.*layers).*"),
    ],
)
def test_patterns_choose_what_a_regular_expression_would(enable, disable, expression):
    model = tiny_model()
    for number, parameter in enumerate(model.parameters()):  # earlier flags have no say
        parameter.requires_grad_(number % 2 == 0)
    expected = {name for name, _ in model.named_parameters() if re.fullmatch(expression, name)}
    chosen = select_trainable(model, enable, disable)
    assert set(chosen) == expected == trainable(model)
    assert len(chosen) == len(expected)


def test_a_pattern_that_matches_nothing_names_the_nearest():
    model = tiny_model()
    with pytest.raises(ModelError) as caught:
        select_trainable(model, ["*q_porj*"], [])
    assert "model.enable" in str(caught.value) and "q_proj" in str(caught.value)
    with pytest.raises(ModelError) as caught:
        select_trainable(model, [], ["q_proj"])
    assert "model.disable" in str(caught.value) and "*q_proj*" in str(caught.value)
    assert trainable(model) == {name for name, _ in model.named_parameters()}, "a refused call changed the model"


def test_an_empty_selection_is_refused():
    with pytest.raises(ModelError, match="no parameter to train"):
        select_trainable(tiny_model(), ["lm_head*"], ["*"])


def test_tied_weights_go_by_either_name():
    model = tiny_model(tie_word_embeddings=True)
    assert select_trainable(model, ["lm_head.weight"], []) == ["model.embed_tokens.weight"]
    chosen = select_trainable(model, [], ["lm_head.weight"])
    assert "model.embed_tokens.weight" not in chosen and len(chosen) == len(list(model.parameters())) - 1


def test_table_counts_every_parameter_once():
    model = tiny_model(tie_word_embeddings=True)
    select_trainable(model, ["*self_attn*"], [])
    rows = {row["module"]: row for row in parameter_table(model)}
    # by hand: width 32, 4 heads of 8, 2 key-value heads, feed-forward 64, 264 ids, two layers
    attention = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32)
    assert rows == {
        "embedding": {"module": "embedding", "tensors": 1, "trainable": 0, "total": 264 * 32},
        "attention": {"module": "attention", "tensors": 8, "trainable": attention, "total": attention},
        "mlp": {"module": "mlp", "tensors": 6, "trainable": 0, "total": 2 * 3 * 32 * 64},
        "norm": {"module": "norm", "tensors": 5, "trainable": 0, "total": 5 * 32},
    }
    assert [row["module"] for row in parameter_table(tiny_model())][-1] == "head"


def test_table_of_other_architectures():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    table = parameter_table(model)
    assert [row["module"] for row in table] == ["embedding", "attention", "mlp", "norm"]
    assert sum(row["total"] for row in table) == sum(p.numel() for p in model.parameters())
    plain = nn.Sequential(nn.Linear(2, 3), nn.Conv1d(1, 1, 1))
    assert {row["module"]: row["total"] for row in parameter_table(plain)} == {"Linear": 9, "Conv1d": 2}
