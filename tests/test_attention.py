"""Attention of our own against transformers' eager one: the same numbers and gradients, packed and not, and in generation."""

from __future__ import annotations

import pytest
import torch

from deltune.models.attention import keeps_documents_apart, packed_inputs, register
from tests.architectures import KINDS, small

LENGTHS = (9, 4, 1, 12)


@pytest.fixture(autouse=True, scope="module")
def known():
    register()


def near(one, other, tolerance=1e-6):
    """All tensors as one vector: some gradients, as that of a key's bias, are zero but for rounding."""
    one, other = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (one, other))
    assert (one - other).norm() <= tolerance * other.norm(), ((one - other).norm() / other.norm()).item()


def results(model, inputs, keep=None):
    """Logits, and gradients of a fixed function of them by all weights."""
    logits = model(**inputs).logits
    logits = logits if keep is None else logits * keep
    weights = torch.sin(torch.arange(logits.numel()).view_as(logits))
    gradients = torch.autograd.grad((logits * weights).sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return logits.detach(), [g for g in gradients if g is not None]


@pytest.mark.parametrize("name", KINDS)
def test_a_packed_row_is_its_documents_one_by_one(name):
    model = small(name)
    ids = torch.randint(3, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    alone = [model(input_ids=part, use_cache=False).logits for part in ids.split(LENGTHS, dim=1)]
    expected = torch.cat(alone, dim=1)
    weights = torch.sin(torch.arange(expected.numel()).view_as(expected))
    trained = list(model.parameters())
    slopes = [g for g in torch.autograd.grad((expected * weights).sum(), trained, allow_unused=True) if g is not None]
    model.set_attn_implementation("segment")
    assert keeps_documents_apart(model) == ""
    logits, gradients = results(model, packed_inputs(LENGTHS, torch.device("cpu")) | {"input_ids": ids})
    near([logits], [expected])
    near(gradients, slopes)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_padded_batches_are_as_eager(name, padding):
    model = small(name)
    ids = torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, slice(8, None) if padding == "right" else slice(0, 5)] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    expected = results(model, inputs, keep=mask[..., None])
    model.set_attn_implementation("segment")
    found = results(model, inputs, keep=mask[..., None])
    near([found[0]], [expected[0]])
    near(found[1], expected[1])


@pytest.mark.parametrize("name", KINDS)
def test_generation_is_as_eager(name):
    model = small(name)
    ids = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    settings = dict(attention_mask=mask, max_new_tokens=9, do_sample=False, output_logits=True, return_dict_in_generate=True)
    expected = model.generate(ids, **settings)
    model.set_attn_implementation("segment")
    found = model.generate(ids, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    near(found.logits, expected.logits)


# -- whether packing is safe --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("attention", ["segment", "sdpa", "eager"])
def test_the_answer_on_the_meta_device_is_that_of_the_weights(name, attention):
    if attention == "sdpa" and name in ("gpt_oss", "gemma2"):
        pytest.skip("transformers has no sdpa for it")
    with torch.device("meta"):
        empty = small(name, attention, move=False)
    answers = keeps_documents_apart(empty), keeps_documents_apart(small(name, attention))
    mixes = name == "gpt_oss" and attention == "eager"  # it does not give its positions to the function that makes the mask
    assert [bool(answer) for answer in answers] == [mixes, mixes], answers
    assert empty.config._attn_implementation == attention


def test_a_model_that_mixes_documents_is_told_with_the_reason():
    from transformers import BloomConfig, BloomForCausalLM, Lfm2Config, Lfm2ForCausalLM

    bloom = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    mixed = Lfm2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )  # fmt: skip
    for make in (lambda: BloomForCausalLM(bloom), lambda: Lfm2ForCausalLM._from_config(mixed, attn_implementation="segment")):
        with torch.device("meta"):
            assert keeps_documents_apart(make())
        assert keeps_documents_apart(make())


def test_attention_that_is_not_told_of_documents_is_found():
    model = small("llama", "segment")
    told = keeps_documents_apart(model)
    layer = model.model.layers[1].self_attn
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **{k: v for k, v in kwargs.items() if k not in ("attention_mask", "cu_seq_lens_q")}, attention_mask=None)
    assert told == ""
    assert "mixes the documents" in keeps_documents_apart(model)
