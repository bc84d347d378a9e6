"""Experts that a mixture keeps as one parameter: each is a layer of its own to every method that has a matrix."""

from __future__ import annotations

import copy
import functools
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file

import deltune
from deltune.adapters.attach import (
    attach,
    detach,
    disabled,
    merge,
    merge_in_place,
    switch,
    trainable,
    unmerge,
)
from deltune.adapters.config import METHODS, named
from deltune.adapters.experts import ExpertLora, Experts, PlusProduct
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.methods.lora import LoraConfig
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.peft_twin import TOLERANCE, bare, read_peft, save_peft, their_gradients, with_peft
from tests.test_adapters_methods import bits, far, same, shaken

SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def _mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))


def _qwen():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, moe_intermediate_size=20, num_experts=4, num_experts_per_tok=2, head_dim=8))


def _gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8))


def _llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    return Llama4ForCausalLM(
        Llama4TextConfig(**SIZES, intermediate_size_mlp=24, num_local_experts=4, num_experts_per_tok=1, head_dim=8, moe_layers=[0, 1])
    )


MAKE = {"mixtral": _mixtral, "qwen3_moe": _qwen, "gpt_oss": _gpt_oss, "llama4": _llama4}
TRANSPOSED = ("gpt_oss", "llama4")
OWNER = {name: "feed_forward" if name == "llama4" else "mlp" for name in MAKE}
every = pytest.mark.parametrize("kind", MAKE)
IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(3))


def made(kind="mixtral", dtype=torch.float64, way="eager"):
    """Random weights of a size that makes experts differ. torch's grouped product knows no float64."""
    return copy.deepcopy(_made(kind, dtype, way))


@functools.cache
def _made(kind, dtype, way):
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = MAKE[kind]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.2)
    model.config._experts_implementation = way
    return model.to(dtype)


def places(kind, leaves=("gate_up_proj", "down_proj")):
    return [f"model.layers.{i}.{OWNER[kind]}.experts.{leaf}" for i in (0, 1) for leaf in leaves]


def stored(model, place):
    return model.get_submodule(place.rpartition(".")[0])._parameters[place.rpartition(".")[2]]


def lora(**changes):
    return LoraConfig(**({"rank": 2, "alpha": 6.0, "targets": ["experts"], "dtype": "auto"} | changes))


def answers(model):
    return model(IDS, use_cache=False).logits


def with_dense_sums(model, kind, changes):
    """A model whose stacks are W + ΔW of each expert, put there entry by entry of what `changes(place, expert, W)` gives."""
    with torch.no_grad():
        for place in places(kind):
            stack = stored(model, place)
            for expert in range(4):
                own = stack[expert].T if kind in TRANSPOSED else stack[expert]
                own += changes(place, expert, own.clone())
    return model


@every
@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_each_experts_weight_is_its_own_with_its_own_change(kind, way):
    if kind == "llama4" and way != "eager":
        return  # which has a way of its own
    dtype = torch.float64 if way == "eager" else torch.float32
    model = shaken(attach(made(kind, dtype, way), lora()))
    deltas = {place: wrapper.adapters["default"] for place, wrapper in wrappers(model)}
    assert list(deltas) == places(kind) and all(isinstance(delta, ExpertLora) for delta in deltas.values())

    def change(place, expert, W):
        delta, found = deltas[place], torch.zeros_like(W)
        for r in range(2):
            found += 3.0 * torch.outer(delta.lora_B[expert, :, r], delta.lora_A[expert, r]).to(W)
        return found

    expected = answers(with_dense_sums(made(kind, dtype, way), kind, change))
    assert far(answers(model), expected) < (1e-12 if dtype == torch.float64 else 2e-5)
    assert far(expected, answers(made(kind, dtype, way))) > 0.05


@every
def test_a_new_adapter_changes_nothing_and_its_gradient_is_that_of_the_dense_sum(kind):
    model, plain = made(kind), made(kind)
    attach(model, lora())
    assert torch.equal(answers(model), answers(plain))
    shaken(model)
    answers(model).square().mean().backward()
    twin = made(kind).requires_grad_(True)
    with_dense_sums(twin, kind, lambda place, expert, W: dict(wrappers(model))[place].adapters["default"].delta(None)[expert].detach())
    answers(twin).square().mean().backward()
    assert {name.rpartition(".adapters.")[2] for name in trainable(model)} == {"default.lora_A", "default.lora_B"}
    for place, wrapper in wrappers(model):
        delta, G = wrapper.adapters["default"], stored(twin, place).grad
        G = G.mT if kind in TRANSPOSED else G  # ∂/∂W [experts, out, in]
        assert torch.allclose(delta.lora_A.grad, 3 * delta.lora_B.mT @ G, atol=1e-12)
        assert torch.allclose(delta.lora_B.grad, 3 * G @ delta.lora_A.mT, atol=1e-12)
        assert delta.lora_A.grad.abs().max() > 0


MATRICES = sorted(
    name for name in METHODS
    if "linear" in named(name).delta_class().kinds and not named(name).delta_class().no_matrix(named(name)) and not named(name).delta_class().banks(named(name))
)


def config_of(method, **changes):
    return named(method, **({"targets": ["experts"], "dtype": "auto"} | dict(METHODS[method].small) | changes))


@pytest.mark.parametrize("method", MATRICES)
def test_every_method_that_has_a_matrix_is_on_each_expert(method, tmp_path):
    kind = "mixtral"
    try:
        model = attach(made(kind), config_of(method, exclude=["layers.1"], **({"strict": False} if method == "bd_lora" else {})))
    except AdapterError as refused:  # those of the bias
        assert "bias" in str(refused)
        return
    if not METHODS[method].start:
        assert far(answers(model), answers(made(kind))) < 1e-12
    shaken(model, size=0.1)
    answer, before = answers(model), bits(model)
    deltas = {place: wrapper.adapters["default"] for place, wrapper in wrappers(model)}
    with torch.no_grad():
        expected = answers(with_dense_sums(made(kind), kind, lambda place, expert, W: deltas[place].of(expert, W) if place in deltas else 0))
    assert far(answer, expected) < 1e-10
    answer.square().mean().backward()
    assert sum(p.grad is not None for p in trainable(model).values()) > len(trainable(model)) / 3  # not of experts that no token went to
    merge_in_place(model)
    assert far(answers(model), answer) < 1e-10 and not same(bits(model), before)
    unmerge(model)
    assert same(bits(model), before)
    save_adapter(model, tmp_path)
    assert torch.equal(answers(load_adapter(made(kind), tmp_path)), answer)
    assert far(answers(merge(model)), answer) < 1e-10 and bits(model).keys() == bits(made(kind)).keys()


@every
def test_adapters_are_switched_copied_and_taken_off(kind):
    model, plain = made(kind), made(kind)
    before = bits(model)
    attach(model, lora(), name="one")
    attach(model, named("hira" if "hira" in METHODS else "dora", rank=2, targets=["experts.down_proj"], dtype="auto"), name="two")
    shaken(model, names=("one", "two"), size=0.1)
    both = answers(model)
    copied = copy.deepcopy(model)
    switch(model, "one")
    one = answers(model)
    assert far(one, both) > 1e-4
    assert torch.equal(answers(copied), both)  # which has hooks of its own
    with disabled(model):
        assert torch.equal(answers(model), answers(plain))
    switch(model, ["one", "two"])
    merge_in_place(model)
    assert far(answers(model), both) < 1e-10
    detach(model, "two")
    assert torch.equal(answers(model), one)
    detach(model)
    assert same(bits(model), before) and [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert not any(vars(m).keys() & {"gate_up_proj", "down_proj"} for m in model.modules())
    assert torch.equal(answers(model), answers(plain))


def test_all_linear_takes_experts_and_names_choose_among_them():
    model = made()
    attach(model, LoraConfig(rank=2))
    assert {f"model.layers.0.{part}" for part in ("mlp.experts.down_proj", "mlp.experts.gate_up_proj", "self_attn.q_proj")} <= dict(wrappers(model)).keys()

    def chosen(**changes):
        return [place for place, _ in wrappers(attach(made(), LoraConfig(rank=2, **changes)))]

    assert chosen(targets=["experts.down_proj"]) == places("mixtral", ["down_proj"])
    assert chosen(targets=["gate_up_proj"]) == places("mixtral", ["gate_up_proj"])
    assert chosen(targets=r".*layers\.1\..*experts\..*") == places("mixtral")[2:]
    assert chosen(targets=["experts"], exclude=["layers.0"]) == places("mixtral")[2:]
    assert chosen(targets=["experts"], exclude=["down_proj"]) == places("mixtral", ["gate_up_proj"])
    assert not any("experts" in place for place in chosen(exclude=["experts"]))
    model = attach(made(), lora(rank_pattern={"experts.down_proj": 3}))
    assert [wrapper.adapters["default"].rank for _, wrapper in wrappers(model)] == [2, 3, 2, 3]


def test_what_cannot_be_on_experts_says_why_and_leaves_the_model():
    for changes, why in (
        (lora(dropout=0.1), "their inputs cannot be reached by dropout"),
        (named("loda", targets=["experts"]), "cannot be on experts that are one parameter, for "),
        (named("vera", targets=["experts"]), "its layers share tensors"),
    ):
        model = made()
        with pytest.raises(AdapterError, match=f"{why}.*Put experts into exclude"):
            attach(model, changes)
        assert same(bits(model), bits(made()))
    with pytest.raises(AdapterError, match="it changes the layer's bias too"):
        attach(made("gpt_oss"), config_of("ia3", targets=["experts"]))
    with pytest.raises(AdapterError, match="kind experts"):
        attach(made(), named("ln_tuning", targets=["experts"]))
    model = attach(made(), lora())
    with pytest.raises(AdapterError, match="holds, a layer with an adapter"):
        attach(model, LoraConfig(targets=["q_proj"], modules_to_save=["experts"]), name="other")


def test_other_three_dimensional_parameters_are_no_experts(caplog):
    class ParallelExperts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4, 3, 2))

    attach(torch.nn.ModuleDict({"own": ParallelExperts(), "linear": torch.nn.Linear(4, 4)}), LoraConfig(rank=2))
    assert "passes over the experts in own" in caplog.text
    model = torch.nn.ModuleDict({"conv": torch.nn.Conv1d(4, 4, 3), "linear": torch.nn.Linear(4, 4)})
    assert [place for place, _ in wrappers(attach(model, LoraConfig(rank=2)))] == ["linear"]


# ---------------------------------------------------------------- PEFT


def peft_config(kind, leaves=("gate_up_proj", "down_proj"), **changes):
    parameters = [f"{OWNER[kind]}.experts.{leaf}" for leaf in leaves]
    return peft.LoraConfig(**({"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "target_parameters": parameters} | changes))


@every
@pytest.mark.parametrize(
    "changes", [{}, {"leaves": ["down_proj"]}, {"leaves": ["gate_up_proj"], "target_modules": []}, {"use_rslora": True}, {"rank_pattern": {"experts.down_proj": 3}}],
    ids=str,
)
def test_peft_has_the_same_adapter_for_target_parameters(kind, changes, tmp_path):
    theirs = with_peft(made(kind), peft_config(kind, **changes))
    save_peft(theirs, tmp_path / "theirs")
    ours = load_adapter(made(kind), tmp_path / "theirs", trainable=True)
    answer, expected = answers(ours), answers(theirs)
    assert (answer - expected).abs().max() < TOLERANCE and far(answer, answers(made(kind))) > 1e-3
    answer.square().mean().backward()
    expected.square().mean().backward()
    gradients = their_gradients(theirs)
    for place, wrapper in wrappers(ours):
        delta = wrapper.adapters["default"]
        if not isinstance(delta, ExpertLora):
            continue
        twin = copy.deepcopy(delta)
        with torch.no_grad():
            twin.lora_A.copy_(delta.lora_A.grad)
            twin.lora_B.copy_(delta.lora_B.grad)
        for key, tensor in twin.to_file().items():
            assert (tensor - gradients[bare(key)]).abs().max() < TOLERANCE, place
    save_adapter(ours, tmp_path / "ours")
    assert (answers(read_peft(made(kind), tmp_path / "ours")) - answer).abs().max() < TOLERANCE
    assert torch.equal(answers(load_adapter(made(kind), tmp_path / "ours")), answer)
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys() == load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys()
    merge(ours)
    merged = dict(theirs.merge_and_unload().named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter - merged[name]).abs().max() < TOLERANCE, name


def test_a_start_taken_out_is_a_file_of_twice_the_rank(tmp_path):
    model = shaken(attach(made(), named("pissa", rank=2, targets=["experts"], dtype="auto")), size=0.1)
    assert all(isinstance(wrapper.adapters["default"], ExpertLora) for _, wrapper in wrappers(model))
    answer = answers(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    assert far(answers(read_peft(made(), tmp_path)), answer) < 1e-9
    again = load_adapter(made(), tmp_path, trainable=True)
    assert torch.equal(answers(again), answer) and trainable(again).keys() == trainable(model).keys()


def test_other_methods_are_in_a_container_of_our_own(tmp_path):
    model = shaken(attach(made(), named("dora", rank=2, targets=["experts.down_proj", "q_proj"], dtype="auto")), size=0.1)
    assert isinstance(dict(wrappers(model))["model.layers.0.mlp.experts.down_proj"].adapters["default"], Experts)
    save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["peft_type"] == "DELTUNE_dora" and "target_parameters" not in fields
    assert torch.equal(answers(load_adapter(made(), tmp_path)), answers(model))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(fields | {"target_parameters": ["experts.down_proj"]}))
    with pytest.raises(AdapterError, match="target_parameters"):
        load_adapter(made(), tmp_path)


def test_training_moves_experts_and_leaves_the_base_alone():
    model = made(dtype=torch.float32, way="grouped_mm").train()
    base = bits(model)
    deltune.attach(model, LoraConfig(rank=2))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.02)
    losses = []
    for _ in range(15):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    detach(model)
    assert same(bits(model), base)


def test_rules_over_pairs_reach_each_expert():
    from deltune.adapters.rules import gradient_rules, lr_ratios

    model = attach(made(), named("lora_fa", rank=2, targets=["experts"], dtype="auto"))
    answers(model).square().mean().backward()
    deltas = [wrapper.adapters["default"] for _, wrapper in wrappers(model)]
    before = [delta.lora_B.grad.clone() for delta in deltas]
    for rule in gradient_rules(model, "lora_fa"):
        rule()
    for delta, gradient in zip(deltas, before, strict=True):
        for expert in range(4):
            A = delta.lora_A[expert]
            expected = gradient[expert] @ torch.linalg.inv(A @ A.T + 1e-8 * torch.eye(2, dtype=torch.float64)) / delta.scale**2
            assert torch.allclose(delta.lora_B.grad[expert], expected, atol=1e-12)
    model = attach(made(), lora())
    assert set(lr_ratios(model, "lora_plus", 16.0)) == {name for name in trainable(model) if name.endswith("lora_B")}


def test_a_merge_over_time_and_a_conversion_go_to_each_expert():
    from deltune.adapters.combine import combine
    from deltune.adapters.config import OverTime
    from deltune.adapters.convert import to_lora
    from deltune.adapters.schedules import over_time

    model = shaken(attach(made(), lora(schedule=OverTime(name="relora", every=2))), size=0.1)
    answer, time = answers(model), over_time(model)
    time.after_step(2)
    assert far(answers(model), answer) < 1e-11 and set(time.tensors()) == set(places("mixtral"))
    model = shaken(attach(made(), lora(schedule=OverTime(name="delta_lora", begin=0, ratio=2.0))), size=0.1)
    delta, stack = dict(wrappers(model))[places("mixtral")[1]].adapters["default"], stored(model, places("mixtral")[1])
    W, before = stack.clone(), delta.delta(None).detach()
    time = over_time(model)
    time.before_update(1)
    with torch.no_grad():
        delta.lora_B.mul_(1.5)
    time.after_step(1)
    assert torch.allclose(stack, W + before, atol=1e-12)  # 2 · (1.5 - 1) · ΔW

    model = shaken(attach(made(), named("dora", rank=2, targets=["experts"], dtype="auto")), size=0.1)
    answer = answers(model)
    to_lora(model, svd="full")
    attach(model, lora(rank=3), name="second")
    shaken(model, names=("second",), size=0.1)
    switch(model, "lora")
    assert far(answers(model), answer) < 1e-5
    assert to_lora(model, rank=4, new_name="small", svd="full").error > 0.01
    switch(model, ["lora", "second"])
    both = answers(model)
    combine(model, ["lora", "second"], None, "cat", "both")
    combine(model, ["default", "second"], None, "linear", "dense")
    for name in ("both", "dense"):
        switch(model, name)
        assert far(answers(model), both) < 1e-5


@every
@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_lora_never_makes_a_weight_of_an_experts_size(kind, way, monkeypatch):
    def refused(self):
        raise AssertionError("the sum was made")

    monkeypatch.setattr(PlusProduct, "dense", refused)
    model = attach(attach(made(kind, torch.float32, way), lora(targets=["experts"])), lora(rank=3), name="second")
    answers(model).sum().square().backward()
    assert all(p.grad is not None for p in trainable(model).values())
