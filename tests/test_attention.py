"""Attention of our own against transformers' eager one: the same numbers and gradients, packed and not, and in generation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.overrides import TorchFunctionMode

from deltune.models import causal
from deltune.models.attention import (
    _causal,
    _on_cuda,
    dense_attention,
    keeps_documents_apart,
    packed_inputs,
    register,
)
from deltune.weights import scratch
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


@pytest.mark.parametrize("length", [4, 5, 6, 7])
@pytest.mark.parametrize("name", ["mistral_window", "gemma2", "gpt_oss"])
def test_a_window_begins_where_the_models_own_does(name, length):
    model = small(name)
    ids = torch.randint(3, 97, (2, 2 * length), generator=torch.Generator().manual_seed(1))
    for inputs in ({"input_ids": ids[:, :length]}, packed_inputs((length, length), ids.device) | {"input_ids": ids[:1]}):
        parts = inputs["input_ids"].split(length, dim=1)
        model.set_attn_implementation("eager")
        expected = torch.cat([model(input_ids=part, use_cache=False).logits for part in parts], 1)
        model.set_attn_implementation("segment")
        near([model(**inputs | {"use_cache": False}).logits], [expected])


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


# -- the node -----------------------------------------------------------------------------------------------------


def drawn(dtype, heads=(4, 2), length=33, rows=1, head=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, length, h, head, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_() for h in (*heads, heads[1])]


def exactly(q, k, v, starts, scale):
    """Each document by the formula, in float64."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    out = [dense_attention(*(t[:, :, a:b] for t in (q, k, v)), _causal(q[:, :, a:b], k[:, :, a:b]), scale)[0] for a, b in itertools.pairwise(starts)]
    return torch.cat(out, 1), (q, k, v)


def slopes_of(out, inputs):
    return torch.autograd.grad((out * torch.cos(torch.arange(out.numel()).view_as(out)).to(out.dtype)).sum(), inputs)


@pytest.mark.parametrize("starts", [(0, 33), (0, 5, 6, 30, 33)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize(("longest", "room"), [(0, 1), (10, 1), (64, 3000), (64, 1 << 20)])  # a head at a time, some heads, all rows
def test_the_node_is_the_formula(monkeypatch, starts, heads, block, longest, room):
    monkeypatch.setattr(causal, "BLOCK", block)
    monkeypatch.setattr(causal, "ROOM", room)
    monkeypatch.setattr(causal, "LONGEST", {torch.float64: longest, torch.bfloat16: longest, torch.float32: longest})
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        inputs = drawn(dtype, heads, rows=2 if len(starts) == 2 else 1)
        out = causal.attend(*inputs, starts, 0.3)
        wanted, exact = exactly(*inputs, starts, 0.3)
        near([out], [wanted], tolerance)
        near(slopes_of(out, inputs), slopes_of(wanted, exact), tolerance)


def test_the_node_is_no_farther_from_the_formula_in_bfloat16_than_torchs_kernel():
    inputs = drawn(torch.bfloat16, heads=(4, 4), length=200, head=64)
    wanted, exact = exactly(*inputs, (0, 200), 0.125)
    wanted = slopes_of(wanted, exact)
    plain = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.125).transpose(1, 2)
    assert causal.quicker(*inputs, (0, 200))

    def distance(found):
        one, other = (torch.cat([t.double().flatten() for t in ts]) for ts in (found, wanted))
        return (one - other).norm()

    assert distance(slopes_of(causal.attend(*inputs, (0, 200), 0.125), inputs)) <= 1.1 * distance(slopes_of(plain, inputs))


def test_under_autocast_attention_is_in_the_short_type():
    model = small("llama", "segment")
    inputs = packed_inputs(LENGTHS, torch.device("cpu"))
    exact = results(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        short = results(model, inputs)
        model.set_attn_implementation("sdpa")
        plain = results(model, inputs)
    for ours, theirs, wanted in ((short[0], plain[0], exact[0]),):
        assert (ours - wanted).norm() <= 1.1 * (theirs - wanted).norm()


def test_long_documents_and_other_types_are_left_to_torch():
    q, k, v = drawn(torch.float32)
    assert not causal.quicker(q, k, v, (0, 33))
    assert causal.quicker(q, k, v, (0, 9, 33))
    with torch.no_grad():
        assert not causal.quicker(q, k, v, (0, 9, 33))
    q, k, v = drawn(torch.bfloat16, length=600)
    assert not causal.quicker(q, k, v, (0, 600))


def test_a_packed_batch_with_a_cache_is_refused():
    from deltune.errors import ModelError

    model = small("llama", "segment")
    with pytest.raises(ModelError, match="one row"):
        model(**packed_inputs(LENGTHS, torch.device("cpu")) | {"input_ids": torch.ones(2, 26, dtype=torch.long), "position_ids": None})


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal_rows", [True, False])
def test_torchs_kernel_for_packed_rows_on_cuda_is_called_as_it_documents(monkeypatch, window, causal_rows):
    """Its arguments as its documentation has them, computed by the formula: the kernel itself wants a GPU."""
    from torch.nn.attention import varlen

    def by_the_documentation(q, k, v, bounds_q, bounds_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa and bounds_q.dtype == torch.int32 and max_q == max_k == 20 and torch.equal(bounds_q, bounds_k)
        out = []
        for a, b in itertools.pairwise(bounds_q.tolist()):
            at = torch.arange(b - a)
            back = at[:, None] - at
            left, right = (float("inf") if side < 0 else side for side in window_size)
            mask = (back <= left) & (-back <= right)
            one = [t[a:b].transpose(0, 1)[None] for t in (q, k, v)]
            out.append(dense_attention(*one, mask, scale)[0][0])
        return torch.cat(out)

    monkeypatch.setattr(varlen, "varlen_attn", by_the_documentation)
    window = window if causal_rows else None
    q, k, v = (t.detach() for t in drawn(torch.float64))
    bounds = (0, 5, 6, 26, 33)
    found = _on_cuda(q, k, v, torch.tensor(bounds), 20, 0.3, causal_rows, window)
    parts = [[t[:, :, a:b] for t in (q, k, v)] for a, b in itertools.pairwise(bounds)]
    wanted = [dense_attention(*part, _causal(*part[:2], window) if causal_rows else None, 0.3)[0] for part in parts]
    near([found], [torch.cat(wanted, 1)], 1e-12)


def test_a_packed_batch_goes_through_the_meta_device():
    class RestartingPositions(TorchFunctionMode):
        """Answers transformers' one question about numbers, as a dry run does."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            return False if func is torch.Tensor.__bool__ else func(*args, **(kwargs or {}))

    with torch.device("meta"):
        model = small("llama", "segment", move=False).bfloat16()
        with RestartingPositions():
            model(**packed_inputs(LENGTHS, torch.device("meta"))).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.shape == (32, 32)
    assert not any(t.is_meta for t in vars(scratch._HELD).values())
