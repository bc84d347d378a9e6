"""What every method that adapts a whole model owes: tests/test_adapters_methods.py for methods whose kind is `model`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltune.adapters.attach import (
    active,
    adapters,
    attach,
    detach,
    disabled,
    merge,
    merge_in_place,
    switch,
    trainable,
)
from deltune.adapters.config import METHODS, named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.methods.lora import LoraConfig
from deltune.adapters.wrapper import BESIDE, wrappers
from deltune.errors import AdapterError
from deltune.models.generation import GenerateOptions, context_window, generate
from deltune.training.loss import causal_lm_step
from tests.adapted import bits, same, shaken
from tests.synthetic import batch_of
from tests.tiny import tiny_model, tiny_tokenizer

ALL = [name for name in sorted(METHODS) if named(name).delta_class().kinds == ("model",)]
methods = pytest.mark.parametrize("method", ALL)
EXACT = {"dtype": torch.float64}


def model_of(dtype=torch.float32, **changes):
    """In float64 with norms in float64 as well: transformers computes them in float32, whatever the model's type is."""
    model = tiny_model(**changes).to(dtype)
    norms = [(parent, name) for parent in list(model.modules()) for name, module in parent.named_children() if type(module).__name__ == "LlamaRMSNorm"]
    for parent, name in norms if dtype == torch.float64 else ():
        setattr(parent, name, nn.RMSNorm(model.config.hidden_size, eps=model.config.rms_norm_eps, dtype=dtype))
    return model


def config_of(method, **changes):
    return named(method, **(dict(METHODS[method].small) | changes))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


IDS = torch.tensor([[5, 17, 200, 31, 90, 12, 44], [9, 250, 3, 77, 61, 101, 8]])
PAD = 258


def answer(model, ids=IDS, **inputs):
    return model(ids, **inputs).logits


def far(one, other):
    return float((one - other).detach().abs().max() / other.detach().abs().max())


def holders(model):
    return [holder for _, holder in wrappers(model)]


def test_the_suite_is_over_four_methods_at_least():
    assert {"prompt_tuning", "p_tuning", "prefix_tuning", "llama_adapter"} <= set(ALL)


@methods
def test_a_new_adapter_changes_nothing_or_no_more_than_it_says(method):
    model = model_of()
    before = answer(model)
    assert attach(model, config_of(method)) is model
    after = answer(model)
    if METHODS[method].start:
        assert after.shape == before.shape and 0 < far(after, before) <= METHODS[method].start
    else:
        assert torch.equal(after, before)


@methods
def test_gradients_reach_what_the_delta_declares_and_nothing_else(method):
    model = shaken(attach(model_of(), config_of(method)))
    expected = {name for name, _ in model.named_parameters() if f".{BESIDE}." in name}
    assert expected and set(trainable(model)) == expected
    answer(model).square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == expected
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable(model).values())


@methods
def test_gradients_equal_finite_differences(method):
    small = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"vocab_size": 16, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model = shaken(attach(model_of(torch.float64, **small, **ids), config_of(method, dtype="auto")))
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in trainable(model).items()), strict=True)
    ids = torch.tensor([[1, 5, 2]])

    def logits(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (ids,)).logits

    assert torch.autograd.gradcheck(logits, values, atol=1e-6)


@methods
def test_a_saved_adapter_is_read_back_exactly(method, tmp_path):
    model = shaken(attach(model_of(), config_of(method)))
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(model_of(), tmp_path / "adapter")
    assert torch.equal(answer(again), answer(model))
    assert not trainable(again)
    more = load_adapter(model_of(), tmp_path / "adapter", trainable=True)
    answer(more).square().sum().backward()
    assert trainable(more) and all(p.grad.abs().max() > 0 for p in trainable(more).values())
    save_adapter(more, tmp_path / "again")
    assert torch.equal(answer(load_adapter(model_of(), tmp_path / "again")), answer(model))
    assert adapters(again) == adapters(more)


@methods
def test_what_peft_cannot_say_is_saved_in_a_type_of_our_own(method, tmp_path):
    model = shaken(attach(model_of(), config_of(method, dropout=0.25, modules_to_save=["lm_head"])), size=0.1)
    with torch.no_grad():
        model.get_parameter("lm_head.adapters.default.weight").mul_(1.5)
    save_adapter(model, tmp_path / "adapter")
    assert f'"DELTUNE_{method}"' in (tmp_path / "adapter" / "adapter_config.json").read_text()
    again = load_adapter(model_of(), tmp_path / "adapter")
    assert torch.equal(answer(again), answer(model))
    assert adapters(again)["default"].dropout == 0.25


@methods
def test_a_file_that_does_not_fit_leaves_the_model_as_it_is(method, tmp_path):
    save_adapter(attach(model_of(), config_of(method)), tmp_path / "adapter")
    other = model_of(hidden_size=16, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1)
    modules, before = dict(other.named_modules()), answer(other)
    with pytest.raises(AdapterError):
        load_adapter(other, tmp_path / "adapter", any_base=True)
    assert dict(other.named_modules()) == modules and torch.equal(answer(other), before)


@methods
def test_two_adapters_run_together_alone_and_not_at_all(method):
    model = model_of()
    for seed, name in enumerate(("one", "two")):
        attach(model, config_of(method), name=name, seed=seed)
        shaken(model, names=[name], seed=seed)
    alone = {name: answer(detach(copy.deepcopy(model), other)) for name, other in (("one", "two"), ("two", "one"))}
    for name in alone:
        switch(model, name)
        assert torch.equal(answer(model), alone[name])
        assert all(f".adapters.{name}." in parameter for parameter in trainable(model))
    switch(model, ["one", "two"])
    both = answer(model)
    assert both.shape == alone["one"].shape
    assert not torch.allclose(both, alone["one"]) and not torch.allclose(both, alone["two"])
    assert torch.equal(answer(copy.deepcopy(model)), both)
    switch(model, [])
    assert torch.equal(answer(model), answer(model_of()))
    assert not trainable(model)


@pytest.mark.parametrize("first", ALL)
@pytest.mark.parametrize("second", ALL)
def test_any_two_methods_run_together_and_with_a_cache(first, second):
    model = shaken(attach(model_of(**EXACT), config_of(first, dtype="auto"), name="one"), names=["one"])
    shaken(attach(model, config_of(second, dtype="auto"), name="two", seed=1), names=["two"])
    whole = answer(model)
    begun = model(IDS[:, :4], use_cache=True)
    rest = model(IDS[:, 4:], past_key_values=begun.past_key_values, use_cache=True).logits
    assert far(torch.cat([begun.logits, rest], dim=1), whole) < 1e-12


@methods
def test_lora_runs_beside_it_whichever_comes_first(method):
    lora = LoraConfig(rank=2, targets="all-linear")
    model = attach(attach(model_of(), lora, name="lora"), config_of(method), name="whole")
    other = attach(attach(model_of(), config_of(method), name="whole"), lora, name="lora")
    for one in (model, other):
        shaken(one, names=["lora"])
        shaken(one, names=["whole"], seed=1)
    assert torch.allclose(answer(model), answer(other), atol=1e-6)
    with pytest.raises(AdapterError, match=r"whole .* cannot be merged"):
        merge(model)
    both = answer(model)
    merge(model, "lora")
    assert active(model) == ["whole"] and torch.allclose(answer(model), both, atol=1e-5)
    assert not any("base_layer" in name for name, _ in model.named_modules())


@methods
def test_what_cannot_merge_says_why_and_stays_as_it_is(method):
    model = shaken(attach(model_of(), config_of(method)))
    before = answer(model)
    for call in (merge, merge_in_place):
        with pytest.raises(AdapterError, match="cannot be merged, for ") as caught:
            call(model)
        assert named(method).delta_class().why_not_mergeable in str(caught.value)
    assert torch.equal(answer(model), before)


@methods
def test_disabled_is_the_base(method):
    model = shaken(attach(model_of(), config_of(method)))
    before = answer(model)
    with disabled(model):
        assert torch.equal(answer(model), answer(model_of()))
    assert torch.equal(answer(model), before) and not torch.equal(before, answer(model_of()))


@methods
def test_detaching_restores_every_bit_every_attribute_and_what_was_trainable(method):
    model = model_of()
    model.model.norm.weight.requires_grad_(False)
    before, modules, plain = bits(model), dict(model.named_modules()), answer(model)
    attributes = {name: dict(vars(module)) for name, module in modules.items()}
    copies = {name: {key: copy.copy(value) for key, value in own.items()} for name, own in attributes.items()}
    shaken(attach(model, config_of(method, modules_to_save=["lm_head"])))
    answer(model).sum().backward()
    model.generate(IDS, max_new_tokens=2, pad_token_id=PAD)
    detach(model)
    assert same(bits(model), before) and dict(model.named_modules()) == modules
    for name, module in modules.items():
        assert {key: id(value) for key, value in vars(module).items() if key not in ("config", "generation_config")} == {
            key: id(value) for key, value in attributes[name].items() if key not in ("config", "generation_config")
        }, name
        for key, value in vars(module).items():
            if isinstance(value, dict):
                assert value == copies[name][key], (name, key)
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["model.norm.weight"]
    assert torch.equal(answer(model), plain)


@methods
def test_a_bfloat16_base_takes_a_float32_adapter(method):
    model = shaken(attach(model_of(torch.bfloat16), config_of(method)), size=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in trainable(model).values())
    found = answer(model)
    assert found.dtype == torch.bfloat16
    exact = shaken(attach(model_of(torch.bfloat16).float(), config_of(method)), size=0.1)
    assert torch.allclose(found.float(), answer(exact), atol=0.05)
    found.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainable(model).values())


@methods
def test_auto_stores_the_adapter_in_float32_on_a_short_base(method):
    model = attach(model_of(torch.bfloat16), config_of(method))
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    assert answer(model).isfinite().all()


@methods
def test_a_float32_adapter_answers_no_worse_than_one_in_the_activations_type(method):
    base = model_of(torch.bfloat16)

    def far(dtype, stored):
        model = attach(copy.deepcopy(base).to(dtype), config_of(method, dtype=stored))
        with torch.no_grad():
            model.load_state_dict(start)
        found = answer(model).double()
        return found if dtype == torch.float64 else (found - exact).norm()

    start = shaken(attach(copy.deepcopy(base), config_of(method)), size=0.1).state_dict()
    exact = far(torch.float64, "auto")
    assert far(torch.bfloat16, "auto") <= 1.1 * far(torch.bfloat16, "bfloat16")


@methods
def test_a_layer_in_bfloat16_autocast_answers_in_bfloat16(method):
    model = shaken(attach(model_of(), config_of(method)), size=0.1)
    exact = answer(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = answer(model)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), exact, atol=0.06 * float(exact.detach().abs().max()))


@methods
def test_dropout_is_off_in_eval_and_for_frozen_adapters_and_on_in_training(method, tmp_path):
    dropping = config_of(method, dropout=0.5)
    plain, model = shaken(attach(model_of(), config_of(method))), shaken(attach(model_of(), dropping))
    assert torch.equal(answer(model), answer(plain))
    save_adapter(model, tmp_path / "adapter")
    model.train()
    frozen = load_adapter(model_of(), tmp_path / "adapter").train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.allclose(answer(model), answer(model))
        assert torch.equal(answer(frozen), answer(frozen))


@methods
def test_the_start_depends_on_the_seed_alone(method):
    base = model_of()

    def start(seed=0, noise=0):
        with torch.random.fork_rng():
            torch.manual_seed(noise)
            torch.rand(noise)
            model = attach(copy.deepcopy(base), config_of(method), seed=seed)
            return {name: tensor for name, tensor in bits(model).items() if BESIDE in name}

    first = start()
    assert same(first, start(noise=5)) and not same(first, start(seed=1))
    torch.set_default_dtype(torch.float64)
    try:
        assert same(first, start())
    finally:
        torch.set_default_dtype(torch.float32)


@methods
def test_attaching_on_the_meta_device_touches_no_weight(method):
    with torch.device("meta"):
        model = tiny_model()
    attach(model, config_of(method))
    real = attach(model_of(), config_of(method))
    assert {n: p.shape for n, p in trainable(model).items()} == {n: p.shape for n, p in trainable(real).items()}
    assert all(parameter.is_meta for parameter in model.parameters())


@methods
def test_a_batch_of_one_answers_as_within_a_batch(method):
    model = shaken(attach(model_of(), config_of(method)))
    assert torch.allclose(answer(model, IDS[:1]), answer(model)[:1], atol=1e-5)


@methods
def test_padding_on_either_side_changes_no_answer(method):
    model = shaken(attach(model_of(**EXACT), config_of(method, dtype="auto")))
    expected = answer(model, IDS[:1])
    pad, ones = torch.full((1, 3), PAD), torch.ones_like(IDS[:1])
    right = answer(model, torch.cat([IDS[:1], pad], 1), attention_mask=torch.cat([ones, pad * 0], 1))[:, :7]
    mixed = torch.cat([torch.cat([pad, IDS[:1]], 1), torch.arange(10)[None]])
    mask = torch.cat([torch.cat([pad * 0, ones], 1), torch.ones(1, 10, dtype=torch.long)])
    # a prompt sets the positions itself; LLaMA-Adapter, whose keys have none, takes those that it is given, as `generate` does
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if method == "llama_adapter" else {}
    left = answer(model, mixed, attention_mask=mask, **positions)[:1, 3:]
    assert far(right, expected) < 1e-12 and far(left, expected) < 1e-12


@methods
def test_generating_with_a_cache_is_generating_without_one(method):
    model = shaken(attach(model_of(**EXACT), config_of(method, dtype="auto")))
    pad = torch.full((2, 2), PAD)
    padded, mask = torch.cat([pad, IDS], 1), torch.cat([pad * 0, torch.ones_like(IDS)], 1)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    with_cache = model.generate(padded, attention_mask=mask, **settings)
    assert torch.equal(with_cache, model.generate(padded, attention_mask=mask, use_cache=False, **settings))
    alone = model.generate(IDS[:1], attention_mask=torch.ones_like(IDS[:1]), **settings)
    assert torch.equal(with_cache[:1, 2:], alone)
    by_hand = IDS[:1]
    for _ in range(8):
        by_hand = torch.cat([by_hand, answer(model, by_hand)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(alone, by_hand)
    assert not torch.equal(alone, model_of(**EXACT).generate(IDS[:1], **settings))
    beams = model.generate(padded, attention_mask=mask, num_beams=2, **settings)
    assert torch.equal(beams, model.generate(padded, attention_mask=mask, num_beams=2, use_cache=False, **settings))


@methods
def test_the_trainers_own_step_sees_the_same_loss_and_drops_positions_before_the_head(method):
    model = shaken(attach(model_of(**EXACT), config_of(method, dtype="auto")))
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    batch = batch_of(IDS, labels, mask)
    logits = answer(model, attention_mask=mask)
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    assert torch.allclose(causal_lm_step(model, batch).double(), expected, rtol=1e-5)
    whole = model(IDS, attention_mask=mask, labels=labels).loss * (labels[:, 1:] != -100).sum()
    assert torch.allclose(whole.double(), expected, rtol=1e-5)
    last = model(IDS, attention_mask=mask, logits_to_keep=1).logits
    assert far(last, logits[:, -1:]) < 1e-12
    states = model(IDS, output_hidden_states=True).hidden_states
    assert {state.shape[1] for state in states} == {IDS.shape[1]}


@methods
def test_training_lowers_the_loss_and_leaves_the_base_alone(method):
    model = model_of().train()
    base = bits(model)
    attach(model, config_of(method))
    batch = batch_of(IDS, IDS, torch.ones_like(IDS))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = causal_lm_step(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    detach(model)
    assert same(bits(model), base)


@methods
def test_gradients_with_recomputed_activations_are_the_same_or_refused(method):
    def gradients(recompute):
        model = shaken(attach(model_of(**EXACT), config_of(method, dtype="auto"))).train()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        answer(model, use_cache=False).square().sum().backward()
        return {name: parameter.grad for name, parameter in trainable(model).items()}

    if method == "prefix_tuning":
        with pytest.raises(AdapterError, match="recomputed"):
            gradients(True)
        model = model_of()
        model.activation_checkpointing_enable()
        with pytest.raises(AdapterError, match="recomputed"):
            attach(model, config_of(method))
    else:
        found, expected = gradients(True), gradients(False)
        assert all(torch.allclose(found[name], expected[name], rtol=1e-10) for name in expected)


@methods
def test_a_model_that_is_no_decoder_is_refused(method):
    from transformers import T5Config, T5ForConditionalGeneration

    small = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    for model in (nn.Sequential(nn.Linear(2, 2)), T5ForConditionalGeneration(small)):
        with pytest.raises(AdapterError, match="adapts a Hugging Face decoder"):
            attach(model, config_of(method))


@methods
def test_choices_without_effect_are_refused(method):
    for field, value in (("targets", ["q_proj"]), ("exclude", ["lm_head"]), ("magnitude", True)):
        with pytest.raises(AdapterError, match=field):
            attach(model_of(), config_of(method, **{field: value}))


@methods
def test_a_module_around_the_host_is_not_trained_in_full(method):
    with pytest.raises(AdapterError, match="modules_to_save"):
        attach(model_of(), config_of(method, modules_to_save=["model"]))
    model = attach(model_of(), config_of(method))
    with pytest.raises(AdapterError, match="modules_to_save"):
        attach(model, LoraConfig(modules_to_save=["model"], targets=["lm_head"]), name="other")


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_learned_positions_are_shifted(method):
    """GPT-2 adds a learned vector for each position, and hands its arguments on by place."""
    model = shaken(attach(gpt2().double(), config_of(method, dtype="auto")))
    whole = answer(model)
    begun = model(IDS[:, :4], use_cache=True)
    rest = model(IDS[:, 4:], past_key_values=begun.past_key_values, use_cache=True).logits
    assert far(torch.cat([begun.logits, rest], dim=1), whole) < 1e-12
    pad, ones = torch.full((2, 3), 0), torch.ones_like(IDS)
    left = answer(model, torch.cat([pad, IDS], 1), attention_mask=torch.cat([pad, ones], 1))[:, 3:]
    assert far(left, whole) < 1e-12
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **settings), model.generate(IDS, use_cache=False, **settings))


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_prompt_takes_room_from_the_window(method):
    ids = torch.arange(64)[None]
    model = gpt2()
    assert context_window(model) == 64
    attach(model, config_of(method))
    assert context_window(model) == 61
    answer(model, ids[:, :61])
    for asked in (62, 64):
        with pytest.raises(AdapterError, match=rf"text of {asked} tokens are more than the model's window of 64.*at most 61"):
            answer(model, ids[:, :asked])
    found = generate(model, tiny_tokenizer(), [list(range(55))], GenerateOptions(max_new_tokens=20))[0]
    assert found.stopped_by == "context" and len(found.ids) == 6
    with disabled(model):
        assert context_window(model) == 64


@methods
def test_embeddings_given_instead_of_ids_are_the_same(method):
    model = shaken(attach(model_of(), config_of(method)))
    embeds = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeds).logits, answer(model))


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_what_says_something_of_each_position_is_not_ignored(method):
    model = attach(model_of(), config_of(method))
    with pytest.raises(AdapterError, match="batch, seq"):
        answer(model, attention_mask=torch.ones(2, 1, 7, 7))
    with pytest.raises(AdapterError, match="has one size"):
        model.generate(IDS, max_new_tokens=2, pad_token_id=PAD, cache_implementation="static")
    with pytest.raises(AdapterError, match="token_type_ids"):
        attach(gpt2(), config_of(method))(IDS, token_type_ids=IDS * 0)
    assert holders(model)
