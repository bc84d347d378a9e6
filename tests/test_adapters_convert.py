"""A plain LoRA that stands for any change that is a matrix: exact where it can be, and its error measured."""

from __future__ import annotations

import pytest
import torch

from deltune.adapters.attach import active, adapters, attach, detach, merge_in_place, switch, trainable
from deltune.adapters.config import METHODS, named
from deltune.adapters.convert import changes_bias, cut, cut_product, to_lora
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.methods.lora import Lora, LoraConfig
from deltune.cli import main
from deltune.errors import AdapterError
from tests.peft_twin import read_peft
from tests.test_adapters_methods import (
    IDS,
    PLACES,
    bits,
    config_of,
    deltas_of,
    far,
    mergeable,
    model_of,
    same,
    shaken,
)
from tests.tiny import save_tiny, tiny_model


def change(model, place, name="default"):
    """ΔW by what the layer computes, not by any formula: the merged weight less the plain one, [out, in] or as stored."""
    layer = getattr(model, place)
    before, running = layer.base_layer.weight.detach().clone(), active(model)
    switch(model, name)
    merge_in_place(model)
    after = layer.base_layer.weight.detach().clone()
    switch(model, running)  # which unmerges
    return after - before


def lora_places(method):
    kinds = [kind for kind in named(method).delta_class().kinds if kind in Lora.kinds]
    return [place for kind in kinds for place in PLACES[kind]]


@mergeable
def test_every_change_that_is_a_matrix_becomes_a_lora_that_answers_alike(method):
    places = lora_places(method)
    if not places:
        with pytest.raises(AdapterError, match="which LoRA does not"):
            to_lora(shaken(attach(model_of(), config_of(method))))
        return
    model = shaken(attach(model_of(torch.float64), config_of(method, dtype="auto", targets=places)))
    if any(changes_bias(getattr(model, place), delta) for place, delta in deltas_of(model).items()):
        with pytest.raises(AdapterError, match="changes the bias too"):
            to_lora(model)
        return
    before, answer = bits(model), model(IDS)
    made = to_lora(model, svd="full")
    assert active(model) == ["default"] and torch.equal(model(IDS), answer)
    assert made.ranks.keys() == made.errors.keys() == set(places) and made.error < 1e-5
    switch(model, "lora")
    assert far(model(IDS), answer) < 1e-5
    detach(model, "lora")
    assert same(bits(model), before)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_a_rank_that_is_too_low_gives_the_best_part_and_its_measured_error(method):
    model = shaken(attach(model_of(torch.float64), named(method, rank=4, targets=["linear", "conv"], dtype="auto")))
    made = to_lora(model, rank=3, svd="full", new_name="small")
    lost = whole = 0.0
    for place in ("linear", "conv"):
        dense = change(model, place)
        values = torch.linalg.svdvals(dense).square()
        assert made.ranks[place] == 3
        assert torch.dist(change(model, place, "small"), dense) == pytest.approx(float(values[3:].sum()) ** 0.5)
        assert made.errors[place] == pytest.approx(float(values[3:].sum() / values.sum()) ** 0.5)
        lost, whole = lost + float(values[3:].sum()), whole + float(values.sum())
    assert made.error == pytest.approx((lost / whole) ** 0.5) and made.error > 0.01


def test_a_product_of_that_rank_or_lower_keeps_its_very_factors_and_layers_their_ranks():
    config = LoraConfig(rank=2, targets=["linear", "conv", "embed"], alpha=2.0, rank_pattern={"conv": 5}, alpha_pattern={"conv": 5.0})
    model = shaken(attach(model_of(), config))
    made = to_lora(model, rank=6)
    assert dict(made.ranks) == {"linear": 2, "conv": 5, "embed": 2} and made.error < 1e-7
    for place in made.ranks:
        theirs, ours = getattr(model, place).adapters["default"], getattr(model, place).adapters["lora"]
        assert torch.equal(theirs.lora_A, ours.lora_A) and torch.equal(theirs.lora_B, ours.lora_B) and ours.scale == 1


def test_the_fast_and_the_full_way_agree_where_the_change_is_of_low_rank():
    generator = torch.Generator().manual_seed(0)
    B, A = (torch.randn(shape, generator=generator) for shape in ((200, 5), (5, 300)))
    for rank in (3, 5, 9):
        best = torch.linalg.svdvals(B @ A)[rank:].square().sum().sqrt()
        for left, right in (cut_product(B, A, rank), cut(B @ A, rank, "fast", generator), cut(B @ A, rank, "full", generator)):
            assert left.shape[1] <= rank
            assert float(torch.dist(left @ right, B @ A)) == pytest.approx(float(best), rel=1e-3, abs=1e-2)
    left, right = cut(B @ A, None, "full", generator)
    assert left.shape[1] == 5 and torch.allclose(left @ right, B @ A, atol=1e-4)
    assert [tuple(t.shape) for t in cut(torch.zeros(4, 6), None, "full", generator)] == [(4, 1), (1, 6)]


def test_modules_trained_in_full_go_along_and_training_can_go_on():
    model = shaken(attach(model_of(), named("dora", rank=2, targets=["linear"], modules_to_save=["lm_head"])))
    answer = model(IDS)
    to_lora(model, trainable=True)
    assert not any(".adapters.lora." in name for name in trainable(model))
    switch(model, "lora")
    assert far(model(IDS), answer) < 1e-5
    assert {name.partition(".adapters.lora.")[0] for name in trainable(model)} == {"linear", "lm_head"}
    attach(model_of(), LoraConfig(targets=["linear"]))


def test_a_converted_adapter_is_a_file_that_peft_reads(tmp_path):
    model = shaken(attach(tiny_model().double(), named("dora", rank=2, targets=["q_proj", "down_proj"], dtype="auto")), size=0.05)
    ids = torch.arange(9).unsqueeze(0)
    answer = model(ids).logits
    to_lora(model, svd="full")
    save_adapter(model, tmp_path, name="lora")
    for again in (load_adapter(tiny_model().double(), tmp_path), read_peft(tiny_model().double(), tmp_path)):
        assert (again(ids).logits - answer).abs().max() < 1e-6


def test_one_name_that_ends_another_is_told_apart():
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(4, 4), "x": torch.nn.ModuleDict({"linear": torch.nn.Linear(4, 4)})})
    attach(model, LoraConfig(targets="linear", rank=3))
    attach(model, LoraConfig(targets=r"x\.linear", rank=2), name="other")
    assert dict(to_lora(model, "default").ranks) == {"linear": 3}
    assert dict(to_lora(model, "other", new_name="lora2").ranks) == {"x.linear": 2}


def test_what_cannot_be_converted_says_why_and_leaves_the_model():
    for method in sorted(METHODS):
        config = named(method)
        if not config.delta_class().mergeable and config.delta_class().kinds != ("model",):
            model = shaken(attach(model_of(), config_of(method)))
            with pytest.raises(AdapterError, match="cannot be a LoRA, for "):
                to_lora(model)
            assert list(adapters(model)) == ["default"]
    model = attach(model_of(), LoraConfig(targets=["linear"]))
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        to_lora(model, "x")
    with pytest.raises(AdapterError, match="rank is 0"):
        to_lora(model, rank=0)
    with pytest.raises(AdapterError, match="has an adapter 'default' already"):
        to_lora(model, new_name="default")
    with pytest.raises(AdapterError, match="cannot be called"):
        to_lora(model, new_name="a.b")
    assert active(model) == ["default"]


def test_the_verb_writes_a_lora_and_says_what_is_lost(tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    model = shaken(attach(tiny_model(), named("dora", rank=2, targets=["q_proj", "down_proj"])), size=0.05)
    save_adapter(model, tmp_path / "dora")
    words = ["convert", f"model={base}", f"adapter={tmp_path / 'dora'}"]
    assert main([*words, f"out={tmp_path / 'whole'}"]) == 0
    assert "the change is the same, up to rounding" in capsys.readouterr().out
    ids = torch.arange(9).unsqueeze(0)
    assert far(load_adapter(tiny_model(), tmp_path / "whole")(ids).logits, model(ids).logits) < 1e-4
    assert main([*words, f"out={tmp_path / 'small'}", "rank=2"]) == 0
    said = capsys.readouterr().out
    assert "LoRA of rank 2 on 4 layers" in said and "is lost" in said and "down_proj (" in said
    assert main([*words, f"out={tmp_path / 'small'}"]) == 2 and "something is there already" in capsys.readouterr().err
    assert main([*words, "out=x", "svd=full"]) == 2 and "has no effect without rank" in capsys.readouterr().err
    assert main([*words[:2], "out=x"]) == 2 and "must name the adapter" in capsys.readouterr().err
