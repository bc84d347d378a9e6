"""What is told of a model's head, and its loss by that: the plain loss's value and gradients, for every head and adapter."""

from __future__ import annotations

import copy
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltune.adapters.attach import attach, disabled
from deltune.adapters.config import METHODS, named
from deltune.adapters.methods.lora import LoraConfig
from deltune.data.pack import join
from deltune.evaluation.lm import evaluate_by_source
from deltune.models import cross_entropy, head
from deltune.models.cross_entropy import Tail
from deltune.models.dry_run import dry_run
from deltune.models.head import describe, plain_linear
from deltune.training.loss import LossStep, causal_lm_step
from tests.adapted import shaken
from tests.synthetic import Rows
from tests.test_cost_dry_run import BATCH as BATCH_SIZE
from tests.test_cost_dry_run import SEQ, with_numbers
from tests.test_cost_dry_run import build as of
from tests.test_loss import Largest, distance
from tests.tiny import tiny_model

SHAPE = dict(vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
GATED = SHAPE | dict(intermediate_size=64, num_key_value_heads=2, head_dim=8, bos_token_id=256, eos_token_id=257, pad_token_id=258)


def configs():
    """name -> (config, tail, tied, bias)."""
    import transformers as hf

    learned = dict(vocab_size=264, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=256, eos_token_id=257)
    return {
        "llama": (hf.LlamaConfig(**GATED), Tail(), False, False),
        "llama tied": (hf.LlamaConfig(**GATED, tie_word_embeddings=True), Tail(), True, False),
        "gemma2": (hf.Gemma2Config(**GATED, final_logit_softcapping=5.0), Tail(1.0, 5.0), True, False),
        "cohere": (hf.CohereConfig(**GATED, logit_scale=0.3), Tail(0.3), True, False),
        "granite": (hf.GraniteConfig(**GATED, logits_scaling=7.0), Tail(1 / 7.0), False, False),
        "gpt2": (hf.GPT2Config(**learned), Tail(), True, False),
        "gptj": (hf.GPTJConfig(**learned, rotary_dim=4), Tail(), False, True),
        "opt": (hf.OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=16, bos_token_id=256, eos_token_id=257, pad_token_id=258), Tail(), True, False),
        "experts": (hf.Qwen3MoeConfig(**GATED, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2), Tail(), False, False),
        "mamba": (hf.MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2, state_size=4), Tail(), True, False),
    }


families = pytest.mark.parametrize("family", list(configs()))


def build(family, dtype=torch.float32, device="cpu"):
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configs()[family][0], dtype=dtype)
    if device == "cpu":
        with torch.no_grad():
            for p in model.get_output_embeddings().parameters():
                p.mul_(20)  # so that logits differ, and a softcap bends them
    return model


BATCH = Rows().batch(range(5))


def gradients_of(step, model, batch=BATCH, factor=1 / 37, dtype=None):
    model.zero_grad()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None), torch.random.fork_rng():
        torch.manual_seed(1)
        loss = step(model, batch)
    (loss * factor).backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def joined(gradients):
    return torch.cat([gradients[name].flatten().float() for name in sorted(gradients)])


def check(model, bound=1e-6, batch=BATCH):
    """The step without logits gives what the plain one gives, and never holds all logits."""
    described = describe(model)
    assert not described.why_not
    expected, plainly = gradients_of(causal_lm_step, model, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 7 * described.vocab * 4)
        patch.setattr(cross_entropy, "MIN_ROWS", 1)
        patch.setattr(head, "chunk_rows", lambda *_, **__: 7)
        loss, found = gradients_of(LossStep(described), model, batch)
    assert loss.dtype == torch.float32 and distance(loss, expected) <= bound
    assert found.keys() == plainly.keys()
    whole = joined(plainly)
    assert whole.norm() > 0 and distance(joined(found), whole) <= bound
    for name, gradient in plainly.items():
        # of a gradient that is nothing but rounding no more can be said than how small it is
        assert float((found[name] - gradient).norm()) <= 5 * bound * max(float(gradient.norm()), 1e-2 * float(whole.norm())), name
    return described


# -- what is told -----------------------------------------------------------------------------------------------


@families
def test_the_head_is_told_by_what_the_model_does_with_and_without_numbers(family):
    _, tail, tied, bias = configs()[family]
    found, without_numbers = describe(build(family)), describe(build(family, device="meta"))
    assert (found.why_not, found.tied, found.bias, found.state) == ("", tied, bias, "trained")
    assert found.vocab == 264 and found.width == (16 if family == "opt" else 32)
    assert found.tail.scale == pytest.approx(tail.scale, rel=1e-12) and found.tail.softcap == tail.softcap
    if family != "experts":  # which rows an expert gets depends on numbers
        assert without_numbers == found
    for dtype in (torch.bfloat16, *([torch.float64] if family != "experts" else [])):  # whose kernel has no float64
        assert describe(build(family, dtype)) == found


def test_the_description_reads_as_a_sentence():
    assert str(describe(build("gemma2"))) == "no logits beyond a chunk (trained head 264 x 32, tied, softcap 5)"
    assert str(describe(build("gptj").requires_grad_(False))) == "no logits beyond a chunk (frozen head 264 x 32, bias)"
    assert str(describe(attach(build("granite"), LoraConfig(targets=["lm_head"])))) == "no logits beyond a chunk (adapted head 264 x 32, scale 0.142857)"


def test_looking_leaves_no_trace():
    model = tiny_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    attach(model, LoraConfig(dropout=0.5))
    before = [(name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    random = torch.get_rng_state()
    describe(model)
    assert torch.equal(random, torch.get_rng_state())
    assert before == [(name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    assert all(p.grad is None for p in model.parameters())


class Changed(nn.Module):
    """A model that does something else to its logits."""

    def __init__(self, change):
        super().__init__()
        self.inner, self.change = tiny_model(), change
        self.config = self.inner.config

    def get_output_embeddings(self):
        return self.inner.lm_head

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        out = self.inner(input_ids, attention_mask=attention_mask, use_cache=use_cache)
        out.logits = self.change(out.logits, self)
        return out


def masked(logits, _):
    logits[:, :, 3] = -1e4
    return logits


CHANGES = {
    "masked in place": (masked, "writes into its logits by fill_"),
    "added to": (lambda z, _: z + 1.0, "more .* than to scale it and cap it"),
    "bent twice": (lambda z, _: z.tanh().tanh(), "more .* than to scale it and cap it"),
    "cut": (lambda z, _: z[..., :200], "more .* than to scale it and cap it"),
    "scaled by a tensor": (lambda z, m: z * m.inner.model.norm.weight[0], "more .* than to scale it and cap it"),
    "called twice": (lambda z, m: z + 0 * m.inner.lm_head(torch.zeros(1, 1, 32)), "calls its output layer 2 times"),
    "masked unseen": (lambda z, _: (z.detach().numpy()[..., 3].fill(-1e4), z)[1], "does not give the logits that it returns"),
    "negated in place": (lambda z, _: z[:, 1:].neg_() is z or z, "writes into its logits by neg_"),
    "scaled in place": (lambda z, _: z.mul_(2.0).div_(8.0).tanh().mul(3.0), ""),
    "made elsewhere": (lambda z, _: torch.ones_like(z), "more .* than to scale it and cap it"),
    "needed": (lambda z, _: z * (1.0 + 0.0 * float(z.shape[1] and z[0, 0, 0] - z[0, 0, 0])) if z.shape[1] else z.flatten()[:1], ""),
    "asked for rows": (lambda z, _: z * float(z[0, 0, 0].isfinite()), "cannot do without its output layer's rows"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_told_is_computed_plainly_and_says_why(name):
    change, reason = CHANGES[name]
    model = Changed(change)
    found = describe(model)
    if reason:
        assert re.search(reason, found.why_not)
        assert str(found).startswith("whole logits: ")
    else:
        assert not found.why_not
    if name not in ("cut", "made elsewhere"):  # some targets lie beyond, or there is no gradient
        expected, plainly = gradients_of(causal_lm_step, model)
        loss, gradients = gradients_of(LossStep(found), model)
        assert torch.allclose(loss, expected, rtol=1e-6)
        assert all(torch.allclose(gradients[n], g, rtol=1e-3, atol=1e-6) for n, g in plainly.items())


def test_a_model_without_a_head_or_with_one_of_another_kind_says_so():
    class Bare(nn.Module):
        def forward(self, input_ids):
            return input_ids

    assert "names no output layer" in describe(Bare()).why_not

    model = tiny_model()
    model.get_output_embeddings = lambda: None
    assert "names no output layer" in describe(model).why_not
    model = tiny_model()
    model.get_output_embeddings = lambda: nn.Linear(32, 264)  # one that is never called
    assert "0 times" in describe(model).why_not


def test_a_layer_that_does_more_than_multiply_is_called_itself():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, hooked, own = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(3, 5)
    hooked.register_forward_hook(lambda module, args, out: 2 * out)
    own.forward = lambda x: x
    assert plain_linear(plain) is plain
    assert plain_linear(hooked) is plain_linear(own) is plain_linear(Doubled(3, 5)) is plain_linear(nn.Identity()) is None
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    assert check(model).state == "adapted"


# -- the same loss ----------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("frozen", [False, True])
def test_the_step_is_the_plain_step(family, frozen):
    model = build(family)
    if frozen:
        model = shaken(attach(model, LoraConfig(rank=4)), size=0.1)
    assert check(model).state == ("frozen" if frozen else "trained")


@pytest.mark.parametrize("family", ["llama", "llama tied", "gemma2", "gptj"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", dict(rank=4, targets=["lm_head"])), ("lora", dict(rank=4, targets=["lm_head"], dropout=0.5)), ("dora", dict(rank=4, targets=["lm_head"])),
        ("ia3", dict(targets=["lm_head"])), ("lora", dict(rank=4, modules_to_save=["lm_head"])),
        ("trainable_tokens", dict(token_indices=[3, 7, 41, 99])), ("vera", dict(rank=4, targets=["lm_head"])),
    ],
    ids=str,
)  # fmt: skip
def test_an_adapted_head_gives_the_plain_step(family, method, settings):
    model = build(family)
    if method == "trainable_tokens":
        settings = settings | {"targets": [{"gptj": "wte", "gemma2": "lm_head"}.get(family, "embed_tokens")]}
    shaken(attach(model, named(method, **settings)), size=0.1).train()
    described = check(model)
    layer = model.get_output_embeddings()
    assert described.state == ("adapted" if plain_linear(layer) is None else "trained" if "modules_to_save" in settings else "frozen")
    if "modules_to_save" in settings:
        assert plain_linear(layer) is layer.adapters["default"]
        hook = layer.register_forward_hook(lambda module, args, out: out)
        assert plain_linear(layer) is None
        hook.remove()
        with disabled(model):
            assert plain_linear(layer) is layer.base_layer
            assert distance(LossStep(described)(model, BATCH), causal_lm_step(model, BATCH)) <= 1e-6


@pytest.mark.parametrize("method", [name for name in sorted(METHODS) if named(name).delta_class().kinds == ("model",)])
def test_adapters_of_the_whole_model_give_the_plain_step(method):
    model = shaken(attach(tiny_model(), named(method, **METHODS[method].small)), size=0.1)
    assert check(model).state == "frozen"


def test_a_packed_row_is_the_plain_step():
    check(tiny_model(), batch=join([Rows()[i] for i in range(5)]))


def test_rounding_to_bfloat16_costs_no_more_than_it_did():
    """Distance to the float32 step of every gradient together, summed over models."""
    errors = {"plain": 0.0, "chunks": 0.0}
    for family in ("llama", "gemma2", "granite", "gptj"):
        for adapter in (None, LoraConfig(rank=4)):
            exact = build(family)
            exact = exact if adapter is None else shaken(attach(exact, adapter), size=0.1)
            _, expected = gradients_of(causal_lm_step, exact)
            short = copy.deepcopy(exact).bfloat16()
            for name, step in (("plain", causal_lm_step), ("chunks", LossStep(describe(short)))):
                _, found = gradients_of(step, short)
                errors[name] += distance(joined(found), joined(expected))
    assert 0.01 < errors["chunks"] <= 1.1 * errors["plain"]


def test_under_autocast_the_step_is_the_plain_step_in_its_type():
    for adapter in (None, LoraConfig(rank=4), LoraConfig(rank=4, targets=["lm_head"])):
        model = tiny_model() if adapter is None else shaken(attach(tiny_model(), adapter), size=0.1)
        _, exact = gradients_of(causal_lm_step, model)
        errors = []
        for step in (causal_lm_step, LossStep(describe(model))):
            _, found = gradients_of(step, model, dtype=torch.bfloat16)
            assert all(g.dtype == torch.float32 for g in found.values())
            errors.append(distance(joined(found), joined(exact)))
        assert 1e-4 < errors[1] <= 1.1 * errors[0]


def test_recomputed_activations_change_nothing():
    model = tiny_model().train()
    expected = gradients_of(causal_lm_step, model)[1]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients_of(LossStep(describe(model)), model)[1]
    assert all(torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-7) for name, gradient in expected.items())


def test_a_batch_without_trained_tokens_is_a_loss_of_zero_that_reaches_every_weight():
    from dataclasses import replace

    batch = replace(BATCH, labels=torch.full_like(BATCH.labels, -100))
    for adapter in (None, LoraConfig(rank=4), LoraConfig(rank=4, targets=["lm_head"])):
        model = tiny_model() if adapter is None else attach(tiny_model(), adapter)
        loss, found = gradients_of(LossStep(describe(model)), model, batch)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert loss == 0 and found.keys() == trained and not any(g.any() for g in found.values())


@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"]])
def test_no_tensor_holds_all_logits(targets, monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 8 * 5000 * 4)
    monkeypatch.setattr(cross_entropy, "MIN_ROWS", 1)
    model = attach(tiny_model(vocab_size=5000), LoraConfig(rank=2, targets=targets)).requires_grad_(True)
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_("adapters" in name)
    described, rows = describe(model), len(head.trained_rows(BATCH.labels)[0])
    assert rows > 40
    with Largest() as seen:
        LossStep(described)(model, BATCH).backward()
    assert seen.numel <= max(8 * 5000, 5000 * 32) < rows * 5000
    with Largest() as seen:
        evaluate_by_source(model, [BATCH], head=described)
    assert seen.numel <= max(8 * 5000, 5000 * 32)


@pytest.mark.parametrize("settings", [dict(targets=["lm_head"]), dict(modules_to_save=["lm_head"])], ids=str)
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_a_step_without_numbers_accounts_for_an_adapted_head(settings, dtype, autocast):
    found, real = (
        account(attach(of("llama", dtype, False, device), LoraConfig(rank=4, **settings)), autocast=autocast)
        for device, account in (("meta", partial(dry_run, batch=BATCH_SIZE, seq=SEQ)), ("cpu", with_numbers))
    )
    assert found.peak_bytes == pytest.approx(sum(real.at_peak.values()), abs=4 * 8 * BATCH_SIZE * SEQ)  # tensors of indices
    assert found.flops == sum(kernel.flops for kernel in real.kernels)


@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"]])
def test_what_is_held_of_logits_does_not_grow_with_the_rows(targets, monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(cross_entropy, "MIN_ROWS", 8)
    with torch.device("meta"):
        model = attach(tiny_model(vocab_size=5000), LoraConfig(rank=2, targets=targets))
    few, many = (dry_run(model, batch=1, seq=65, trained=trained).peak_bytes for trained in (16, 64))
    assert many - few < 8 * 5000 * 4  # not even one chunk


# -- evaluation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gptj"])
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"]])
def test_measures_are_those_of_whole_logits(family, targets):
    model = shaken(attach(build(family), LoraConfig(rank=4, targets=targets)), size=0.1)
    with torch.no_grad():  # targets that are right now and then
        batch = Rows().batch(range(8))
        best = model(batch.input_ids, attention_mask=batch.attention_mask).logits.argmax(-1)[:, :-1]
        batch.labels[:, 1:][:, ::3] = torch.where(batch.labels[:, 1:] == -100, -100, best)[:, ::3]
    expected, by_row = evaluate_by_source(model, [batch])
    found, rows = evaluate_by_source(model, [batch], head=describe(model))
    assert 0.2 < found["token_accuracy"] < 0.9
    assert found == pytest.approx(expected, rel=1e-6) and rows.keys() == by_row.keys()
    packed = join([Rows()[i] for i in range(8)])
    assert evaluate_by_source(model, [packed], head=describe(model))[0]["num_tokens"] == packed.num_trained_tokens


def test_the_plain_loss_is_transformers_own():
    model = tiny_model()
    own = model(input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask, labels=BATCH.labels).loss * BATCH.num_trained_tokens
    assert distance(LossStep(describe(model))(model, BATCH), own) < 1e-6
    rows, targets = head.trained_rows(BATCH.labels)
    assert len(rows) == BATCH.num_trained_tokens and torch.equal(targets, BATCH.input_ids.flatten()[rows + 1])
    logits = head.logits_of(model, BATCH.inputs(), rows)
    assert F.cross_entropy(logits, targets, reduction="sum").item() == pytest.approx(own.item(), rel=1e-6)
