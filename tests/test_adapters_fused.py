"""Layers computed together answer as the same layers one by one, in value and gradient, however they are called."""

from __future__ import annotations

import copy
import functools
import pickle
import re

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

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
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.forms import form_of
from deltune.adapters.fused import FeedForward, fuse, unfuse
from deltune.adapters.wrapper import wrappers
from deltune.recipe import recipe_of, set_recipe
from tests.adapted import shaken

IN_FORM = sorted(name for name in METHODS if named(name).delta_class().in_product_form)
IDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))
SHAPE = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def llama(dtype=torch.float32, **changes):
    settings = SHAPE | dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True, tie_word_embeddings=False) | changes
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**settings)), dtype)


def phi3(dtype=torch.float32):
    return seeded(lambda: Phi3ForCausalLM(Phi3Config(**SHAPE, num_key_value_heads=2)), dtype)


def gpt2(dtype=torch.float32):
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return seeded(lambda: GPT2LMHeadModel(config), dtype)


def seeded(make, dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().to(dtype)
        with torch.no_grad():  # larger than a start's, so that every term counts
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape).to(dtype))
    return model.train()


def config_of(method="lora", **changes):
    small = {key: value for key, value in METHODS[method].small.items() if not isinstance(value, list)}  # a list names modules of another model
    return named(method, **(small | changes))


def pair(make=llama, method="lora", base=torch.float32, moved=True, **changes):
    """The same adapted model twice: plain, and fused."""
    plain = attach(make(base), config_of(method, **({"dtype": "auto"} | changes)))
    if moved:
        shaken(plain, size=0.1)
    fast = copy.deepcopy(plain)
    fuse(fast)
    return plain, fast


def step(model, **inputs):
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.grad = None
    loss = model(**({"input_ids": IDS, "labels": IDS} | inputs)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def far(one, other):
    return float((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30))


def check_same(plain, fast, tolerance=2e-6, **inputs):
    loss, grads = step(plain, **inputs)
    fast_loss, fast_grads = step(fast, **inputs)
    assert far(fast_loss, loss) <= tolerance
    assert grads.keys() == fast_grads.keys()
    assert all(far(fast_grads[name], grads[name]) <= tolerance for name in grads), {n: far(fast_grads[n], grads[n]) for n in grads}


def nodes_of(tensor):
    """Names of the autograd nodes behind a tensor."""
    names, pending, seen = [], [tensor.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        names.append(node.name())
        pending += [next_node for next_node, _ in node.next_functions]
    return names


@pytest.mark.parametrize("make", [llama, phi3, gpt2], ids=lambda make: make.__name__)
def test_a_step_is_the_plain_one(make):
    plain, fast = pair(make, base=torch.float64)
    check_same(plain, fast, 1e-12)
    check_same(*pair(make), 2e-6)


@pytest.mark.parametrize("make,linear_nodes", [(llama, 2), (phi3, 2), (gpt2, 2)])
def test_a_block_is_as_many_nodes_as_it_has_inputs(make, linear_nodes):
    _, fast = pair(make)
    names = nodes_of(fast(IDS).logits)
    assert names.count("LinearNodeBackward") == linear_nodes * 2  # of two layers: q, k, v together, and o
    assert names.count("FeedForwardNodeBackward") == 2


@pytest.mark.parametrize("method", IN_FORM)
def test_every_method_in_product_form_is_fused_and_the_same(method):
    plain, fast = pair(method=method, base=torch.float64)
    names = nodes_of(fast(IDS).logits)
    assert names.count("LinearNodeBackward") == 4 and names.count("FeedForwardNodeBackward") == 2
    check_same(plain, fast, 1e-10)


def test_what_is_a_product_where_there_is_no_bias_is_fused_there_and_the_same():
    bare = functools.partial(llama, attention_bias=False, mlp_bias=False)
    plain, fast = pair(bare, "adamss", torch.float64)
    assert nodes_of(fast(IDS).logits).count("FeedForwardNodeBackward") == 2
    check_same(plain, fast, 1e-10)


@pytest.mark.parametrize("method", IN_FORM)
def test_a_fused_start_changes_nothing_or_no_more_than_the_plain_one(method):
    for dtype in (torch.float32, torch.bfloat16):
        _, fast = pair(method=method, base=dtype, moved=False)
        before = llama(dtype)(IDS).logits
        if not METHODS[method].start:
            assert torch.equal(fast(IDS).logits, before)


@pytest.mark.parametrize(("blocks", "dtype", "formed"), [(2, torch.float32, True), (8, torch.float32, False), (8, torch.bfloat16, True)])
def test_blocks_with_many_zeros_between_them_are_computed_apart(blocks, dtype, formed):
    for method, rank in (("melora", 8), ("gralora", 8)):
        plain, fast = pair(method=method, base=dtype, blocks=blocks, rank=rank)
        assert ("FeedForwardNodeBackward" in nodes_of(fast(IDS).logits)) == formed
        check_same(plain, fast, 2e-6 if dtype == torch.float32 else 0.05)


def test_reflections_of_a_text_that_is_generated_are_made_by_themselves():
    plain, fast = pair(method="hra", base=torch.float64)
    assert "FeedForwardNodeBackward" in nodes_of(fast(IDS).logits)
    with torch.no_grad():
        assert torch.equal(fast(IDS[:, :1]).logits, plain(IDS[:, :1]).logits)


@pytest.mark.parametrize("method", ["lora", "pissa", "dora", "dude"])
def test_in_bfloat16_it_is_no_farther_from_float32_than_the_plain_step(method):
    plain, fast = pair(method=method, base=torch.bfloat16)
    exact = copy.deepcopy(plain).float()
    loss, grads = step(exact)
    (plain_loss, plain_grads), (fast_loss, fast_grads) = step(plain), step(fast)
    assert nodes_of(fast(IDS).logits).count("FeedForwardNodeBackward") == 2
    error = {name: (far(plain_grads[name], grads[name]), far(fast_grads[name], grads[name])) for name in grads}
    assert sum(f for _, f in error.values()) <= 1.1 * sum(p for p, _ in error.values())
    assert abs(fast_loss.float() - loss) <= 1.1 * abs(plain_loss.float() - loss) + 0.01


@pytest.mark.parametrize("changes", [
    {"rank_pattern": {"k_proj": 3, "up_proj": 1}}, {"train": "B"}, {"train": "A"}, {"targets": ["q_proj", "v_proj", "gate_proj"]},
    {"targets": ["k_proj", "down_proj"]}, {"targets": ["up_proj", "o_proj"]}, {"alpha": 5.0, "scaling": "rslora"}, {"dropout": 0.3},
    {"dropout": 0.3, "magnitude": True}, {"targets": ["o_proj", "gate_proj"], "magnitude": True}, {"dtype": "float32"},
], ids=str)  # fmt: skip
def test_unequal_ranks_frozen_factors_bare_members_and_dropout(changes):
    plain, fast = pair(base=torch.float64, **changes)
    assert "FeedForwardNodeBackward" in nodes_of(fast(IDS).logits) or changes.get("targets") == ["k_proj", "v_proj"]
    check_same(plain, fast, 1e-7 if changes.get("dtype") == "float32" else 1e-11)


def test_dropout_draws_what_the_plain_twin_draws_and_leaves_the_random_numbers_where_they_are():
    plain, fast = pair(dropout=0.5)
    for model in (plain, fast):
        torch.manual_seed(0)
        loss = model(input_ids=IDS, labels=IDS).loss
        between = torch.rand(3)
        loss.backward()
        model.seen = loss.detach(), between, torch.rand(3)
    assert torch.allclose(plain.seen[0], fast.seen[0], rtol=1e-6)
    assert torch.equal(plain.seen[1], fast.seen[1]) and torch.equal(plain.seen[2], fast.seen[2])
    states = [t.numel() for t in saved_by(fast) if t.dtype is torch.bool]
    assert not states


def saved_by(model, **inputs):
    """Tensors that a forward pass keeps for backward and that are no parameters."""
    kept = []
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(**({"input_ids": IDS, "labels": IDS} | inputs))
    unique = {t.untyped_storage().data_ptr(): t for t in kept if t.untyped_storage().data_ptr() not in own}
    return list(unique.values())


def test_it_keeps_less():
    plain, fast = pair()
    width = SHAPE["intermediate_size"]

    def wide(model):
        return sum(t.shape[-1:] == (width,) for t in saved_by(model))

    assert wide(fast) == 2 * 2 and wide(plain) >= 4 * 2  # gate and up of two layers; and act(gate), the product


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_activations_changes_nothing(reentrant, dropout):
    plain, fast = pair(dropout=dropout)
    loss, grads = step(plain)
    for model in (plain, fast):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    for model in (plain, fast):
        again, same_grads = step(model)
        assert far(again, loss) <= 2e-6 and all(far(same_grads[name], grads[name]) <= 3e-6 for name in grads)


def test_gradients_add_up_over_micro_batches():
    plain, fast = pair(base=torch.float64)
    for model in (plain, fast):
        for ids in (IDS, IDS.flip(1)):
            model(input_ids=ids, labels=ids).loss.backward()
    for (name, p), (_, q) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or far(q.grad, p.grad) < 1e-12), name


def test_autocast_computes_in_its_type():
    plain, fast = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = plain(IDS).logits, fast(IDS).logits
        names = nodes_of(b)
        assert a.dtype == b.dtype and names.count("FeedForwardNodeBackward") == 2
        (_, plain_grads), (_, fast_grads) = step(plain), step(fast)
    _, exact = step(copy.deepcopy(plain))
    assert all(p.grad.dtype == torch.float32 for p in trainable(fast).values())
    assert sum(far(fast_grads[n], exact[n]) for n in exact) <= 1.1 * sum(far(plain_grads[n], exact[n]) for n in exact)
    assert any(far(fast_grads[n], exact[n]) > 1e-4 for n in exact)  # it did compute in the shorter type


def attention_of(model):
    return model.model.layers[0].self_attn


@pytest.mark.parametrize("order", ["q", "k", "kqv", "vkq", "qq", "qkk", "qkqv", "qvkqkv"])
def test_members_called_alone_out_of_order_or_twice(order):
    plain, fast = pair(base=torch.float64)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for model in (plain, fast):
        outputs = [getattr(attention_of(model), f"{name}_proj")(x) for name in order]
        loss = sum((i + 1) * y.square().sum() for i, y in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(loss, [x, *attention_of(model).q_proj.adapters.parameters()], allow_unused=True)])
    assert all((a is None and b is None) or torch.allclose(a, b, rtol=1e-12) for a, b in zip(*results, strict=True))


def test_what_has_changed_since_the_first_call_is_not_answered_from_it():
    plain, fast = pair(base=torch.float64)
    x = torch.randn(2, 5, 16, dtype=torch.float64)

    def answers(model, change):
        attention, own = attention_of(model), x.clone()
        attention.q_proj(own)
        change(model, attention, own)
        return attention.k_proj(own).detach()

    changes = [
        lambda model, attention, own: own.mul_(2),
        lambda model, attention, own: attention.k_proj.adapters["default"].lora_B.data.zero_() and None,
        lambda model, attention, own: torch.nn.init.zeros_(attention.k_proj.adapters["default"].lora_B),
        lambda model, attention, own: switch(model, []),
        lambda model, attention, own: merge_in_place(model.eval()),
    ]
    for i, change in enumerate(changes):
        if i != 1:  # a change through `.data` goes unseen, as it does by autograd
            assert torch.allclose(answers(copy.deepcopy(fast), change), answers(copy.deepcopy(plain), change), rtol=1e-12), i
    fast_attention = attention_of(fast)
    fast_attention.q_proj(x)
    with torch.no_grad():
        assert not fast_attention.k_proj(x).requires_grad


def test_what_cannot_be_says_why_and_is_computed_plainly():
    plain, fast = pair(method="loha", base=torch.float64)
    records = fuse(fast)
    assert all("loha" in record.why_not for record in records) and len(records) == 2 * (7 + 1)
    names = nodes_of(fast(IDS).logits)
    assert "LinearNodeBackward" not in names and names.count("GatedNodeBackward") == 2
    check_same(plain, fast, 1e-12)

    plain, fast = pair(base=torch.float64)
    for model in (plain, fast):
        shaken(attach(model, config_of(targets=["q_proj", "down_proj"]), name="other"), names=("other",))
    assert {r.where for r in fuse(fast) if "2 adapters" in r.why_not} >= {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp"}
    check_same(plain, fast, 1e-12)
    seen = []
    for model in (plain, fast):
        detach(model, "other")
        model.model.layers[0].mlp.up_proj.base_layer.register_forward_hook(lambda m, args, y: seen.append(1) or 2 * y)
        model.model.layers[1].mlp.down_proj.register_forward_hook(lambda m, args, y: seen.append(1) or 3 * y)
        attention_of(model).v_proj.base_layer.register_forward_hook(lambda m, args, y: seen.append(1) or 4 * y)
    check_same(plain, fast, 1e-12)
    assert len(seen) == 6
    assert any("hooks" in record.why_not for record in fuse(fast))


def test_records_name_blocks_groups_and_layers():
    _, fast = pair()
    records = fuse(fast)
    assert {(record.where, record.what) for record in records if "layers.1" in record.where} == {
        ("model.layers.1.mlp", "feed-forward block: gate_proj, up_proj, down_proj"),
        ("model.layers.1.self_attn", "q_proj, k_proj, v_proj"), ("model.layers.1.self_attn.o_proj", "one layer"),
    }  # fmt: skip
    assert not any(record.why_not for record in records)


def test_a_model_is_handled_as_before(tmp_path):
    plain, fast = pair(base=torch.float64)
    assert plain.state_dict().keys() == fast.state_dict().keys()
    attention_of(fast).q_proj(torch.randn(1, 2, 16, dtype=torch.float64))  # shares of k and v wait to be fetched, and are no part of it
    for same in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        check_same(plain, same, 1e-12)
        assert "FeedForwardNodeBackward" in nodes_of(same(IDS).logits)
        mlp = same.model.layers[0].mlp
        assert mlp.forward.parent is mlp  # of the copy, and not of the model that it is a copy of
        assert all(layer in set(same.modules()) for layer in attention_of(same).q_proj.fused.layers)
    save_adapter(fast, tmp_path)
    other = load_adapter(llama(torch.float64), tmp_path)
    assert torch.allclose(other(IDS).logits, plain(IDS).logits)
    with disabled(fast):
        assert torch.equal(fast(IDS).logits, llama(torch.float64)(IDS).logits)
    fast.eval(), plain.eval()
    adapted = fast(IDS).logits
    merge_in_place(fast)
    assert torch.allclose(fast(IDS).logits, adapted, rtol=1e-10)
    unmerge(fast)
    assert torch.equal(fast(IDS).logits, adapted)
    assert torch.equal(fast.generate(IDS, max_new_tokens=4, do_sample=False), plain.generate(IDS, max_new_tokens=4, do_sample=False))
    with torch.inference_mode():
        assert torch.allclose(fast(IDS).logits, adapted)
    changed = {name: p.detach() * 2 for name, p in trainable(fast).items()}
    twice = [torch.func.functional_call(model, changed, (IDS,)).logits for model in (plain, fast)]
    assert torch.allclose(*twice) and not torch.allclose(twice[0], adapted)
    unfuse(fast)
    assert torch.equal(fast(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("leave", [detach, merge])
def test_nothing_is_left_when_the_last_adapter_goes(leave):
    _, fast = pair(base=torch.float64)
    leave(fast)
    before = llama(torch.float64)
    assert [vars(module).keys() for module in fast.modules()] == [vars(module).keys() for module in before.modules()]


def test_on_the_meta_device_there_are_the_same_groups():
    _, real = pair(dropout=0.1)
    with torch.device("meta"):
        model = LlamaForCausalLM(real.config).train()
    attach(model, config_of(dropout=0.1))
    assert fuse(model) == fuse(real)
    with torch.device("meta"):
        model(torch.zeros(2, 7, dtype=torch.long)).logits.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trainable(model).values())


def test_there_is_no_gradient_below_the_lowest_adapter():
    plain, fast = pair(targets=r".*layers\.1\.mlp\..*", base=torch.float64)
    check_same(plain, fast, 1e-12)
    names = nodes_of(fast(IDS).logits)
    assert names.count("FeedForwardNodeBackward") == 1 and not any("Softmax" in name or "Attention" in name for name in names)


class Norm(nn.Module):
    """A norm whose output says how it is made again."""

    def forward(self, x):
        return set_recipe(torch.sin(x), torch.sin, x)  # whose own backward keeps x, and not its output


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"], ["down_proj"]], ids=str)
def test_what_can_be_made_again_is_not_kept(targets):
    plain, fast = pair(targets=targets, base=torch.float64)
    made = []
    for model in (plain, fast):
        for layer in model.model.layers:
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(layer, name, Norm())
    for layer in fast.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: made.append(args[0]))
        layer.self_attn.register_forward_pre_hook(lambda module, args, kwargs: made.append(kwargs["hidden_states"]), with_kwargs=True)
    check_same(plain, fast, 1e-12)
    assert all(recipe_of(x) is not None for x in made)
    made.clear()
    kept = {t.untyped_storage().data_ptr() for t in saved_by(fast)}
    assert len(made) == 4 and not kept & {x.untyped_storage().data_ptr() for x in made}


class Gated(nn.Module):
    def __init__(self, act, form):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.act, self.form, self.drop = act, form, nn.Dropout(0.5)

    def forward(self, x):
        if self.form == "gated":
            return self.c(self.b(x) * self.act(self.a(x)))
        if self.form == "tail":
            return self.drop(self.c(self.act(self.a(x))))
        if self.form == "residual":
            return x + self.c(self.act(self.a(x)))
        if self.form == "dropout":
            return self.c(self.drop(self.act(self.a(x))))
        if self.form == "three":
            return self.c(self.act(self.a(x)) * self.b(x) * 2)
        if self.form == "besides":
            self.b(x)
            return self.c(self.act(self.a(x)))
        return self.c(self.a(x) * self.b(x))


class Root(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x)


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.Tanh(), nn.Softplus(), torch.sigmoid], ids=lambda act: getattr(act, "__name__", str(act)))
@pytest.mark.parametrize("form", ["gated", "tail"])
def test_any_activation(act, form):
    torch.manual_seed(0)
    model = shaken(attach(Root(Gated(act, form)).double(), config_of(targets=["a", "b", "c"] if form == "gated" else ["a", "c"])))
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    fast = copy.deepcopy(model)
    fuse(fast)
    assert isinstance(fast.block.forward, FeedForward)

    def gradients(model):
        torch.manual_seed(1)
        y = model(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *trainable(model).values()])]

    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(gradients(model), gradients(fast), strict=True))
    fast.eval()  # without the tail's dropout
    parameters = list(trainable(fast).values())

    def answer(x, *values):
        return torch.func.functional_call(fast, dict(zip(trainable(fast), values, strict=True)), (x,))

    assert torch.autograd.gradcheck(answer, (x, *parameters))


@pytest.mark.parametrize("form,why", [("residual", "not a linear layer"), ("dropout", "each number"), ("three", "neither|activation"), ("bilinear", "neither"), ("besides", "something else besides")])
def test_other_forms_are_told(form, why):
    model = attach(Root(Gated(nn.SiLU(), form)), config_of(targets=["a", "c"]))
    records = {record.where: record for record in fuse(model)}
    assert re.search(why, records["block"].why_not), records["block"]
    assert "forward" not in vars(model.block)


def test_a_stochastic_activation_is_none():
    assert isinstance(form_of(Gated(nn.RReLU(), "gated")), str)
    assert isinstance(form_of(Gated(nn.PReLU(), "gated")), str)
    assert isinstance(form_of(Gated(nn.Softmax(-1), "gated")), str)


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_gradients_equal_finite_differences(method):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    model = shaken(attach(Root(block), config_of(method, targets=["0", "2"], dtype="auto")))
    fuse(model)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    chosen = {name: p for name, p in trainable(model).items() if method != "dora" or "magnitude" in name}  # its norm is held fixed

    def answer(x, *values):
        return torch.func.functional_call(model, dict(zip(chosen, values, strict=True)), (x,))

    assert "FeedForwardNodeBackward" in nodes_of(answer(x, *chosen.values()))
    assert torch.autograd.gradcheck(answer, (x, *chosen.values()))


def test_a_gain_of_zero_has_no_gradient():
    model = llama(torch.float64, attention_bias=False)  # where h is zero to the bit, for it is divided by a norm that is next to zero
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[3] = 0
    attach(model, config_of("dora", dtype="auto"))
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.adapters["default"].magnitude[3] = 0
    fast = copy.deepcopy(model)
    fuse(fast)
    check_same(model, fast, 1e-10)
    assert all(torch.isfinite(p.grad).all() for p in trainable(fast).values())


def test_wrappers_know_what_computes_them():
    _, fast = pair()
    assert all(holder.fused is not None for _, holder in wrappers(fast))
    unfuse(fast)
    assert all(holder.fused is None for _, holder in wrappers(fast)) and "forward" not in vars(fast.model.layers[0].mlp)
