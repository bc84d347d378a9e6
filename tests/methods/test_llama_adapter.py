"""LLaMA-Adapter: held to PEFT, to the paper's formula written as loops, and its queries to those of the attentions."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltune.adapters.attach import attach, trainable
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.methods.llama_adapter import QUERIES, attentions, queries
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.peft_twin import held_to_peft, save_peft, with_peft
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 17, 200, 31, 90], [9, 250, 3, 77, 61]])


def shaken(model, by=0.5):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "plain"])
@pytest.mark.parametrize("layers", [1, 2])
def test_it_is_pefts(layers, heads, tmp_path, monkeypatch):
    """But for its softmax, which PEFT takes in float32 also in a float64 model; here in float64 as well."""
    monkeypatch.setattr("peft.tuners.adaption_prompt.layer.F", SimpleNamespace(softmax=lambda scores, dim, dtype: scores.softmax(dim)))

    def make():
        return tiny_model(num_key_value_heads=heads)

    held_to_peft(peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=layers, task_type="CAUSAL_LM"), tmp_path, make=make, merges=False)


def kind_of(name):
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[name](
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("kind", QUERIES)
def test_its_queries_are_those_of_the_attention(kind, monkeypatch):
    """Type by type: what an attention hands to its kernel is what the method makes of the attention's input."""
    model = kind_of(kind)
    seen, ours = {}, {}

    def kernel(module, query, key, value, mask, **settings):
        seen[module] = (query, settings["scaling"])
        return query.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "spy", kernel)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "spy", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "spy"

    def note(host, args, kwargs, output):
        ours[host] = queries(host, kwargs["hidden_states"], kwargs["position_embeddings"])

    for host in attentions(model).values():
        host.register_forward_hook(note, with_kwargs=True)
    model(torch.arange(14).view(2, 7))
    assert len(ours) == 3
    for host, found in ours.items():
        assert torch.equal(found, seen[host][0]) and host.scaling == seen[host][1]


@pytest.mark.parametrize("kind", QUERIES)
def test_a_closed_gate_is_no_change_in_any_of_them(kind):
    """Also where the output projection has a bias, which must not be added twice."""
    model = kind_of(kind)
    for host in attentions(model).values():
        if host.o_proj.bias is None:
            host.o_proj.bias = torch.nn.Parameter(torch.linspace(-1, 1, 32))
    before = model(IDS % 99).logits
    attach(model, named("llama_adapter", adapter_layers=3))
    assert torch.equal(model(IDS % 99).logits, before)
    assert (shaken(model)(IDS % 99).logits - before).abs().max() > 1e-3


def test_the_output_is_the_papers_formula():
    """Added to an attention's output: for each head of each position Σ_j g·softmax_j(q·k_j/√h)·v_j, through W_o."""
    plain, model = tiny_model().double(), shaken(attach(tiny_model().double(), named("llama_adapter", adapter_len=3, adapter_layers=1, dtype="auto")))
    delta = dict(wrappers(model))["model.layers.1.self_attn"].adapters["default"]
    attention = plain.model.layers[1].self_attn
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotary = plain.model.rotary_emb(x, torch.arange(5)[None])
    arguments = {"hidden_states": x, "position_embeddings": rotary, "attention_mask": None}
    base = attention(**arguments)[0]

    q = attention.q_proj(x).view(2, 5, 4, 8).transpose(1, 2)
    q = sys.modules[type(attention).__module__].apply_rotary_pos_emb(q, q, *rotary)[0]
    P, g = delta.adaption_prompt[0], delta.adaption_gate[0]
    added = torch.zeros(2, 5, 32, dtype=torch.float64)
    for row in range(2):
        for place in range(5):
            for head in range(4):
                own = slice(head // 2 * 8, head // 2 * 8 + 8)  # two query heads share one of keys and values
                k = [attention.k_proj.weight[own] @ P[j] for j in range(3)]
                v = [attention.v_proj.weight[own] @ P[j] for j in range(3)]
                scores = torch.stack([q[row, head, place] @ k[j] / math.sqrt(8) for j in range(3)])
                weights = g * torch.exp(scores) / torch.exp(scores).sum()
                added[row, place, head * 8 : head * 8 + 8] = sum(weights[j] * v[j] for j in range(3))
    expected = base + added @ attention.o_proj.weight.T
    found = model.model.layers[1].self_attn(**arguments)[0]
    assert (found - expected).abs().max() < 1e-9 and (found - base).abs().max() > 1e-3


def test_parameter_counts_are_the_papers():
    for layers, length in ((1, 10), (2, 4)):
        model = attach(tiny_model(), named("llama_adapter", adapter_layers=layers, adapter_len=length))
        assert sum(p.numel() for p in trainable(model).values()) == layers * (length * 32 + 1)


def test_it_goes_on_the_last_layers_by_default_on_all_but_two(tmp_path):
    model = attach(tiny_model(num_hidden_layers=5), named("llama_adapter"))
    assert [place for place, _ in wrappers(model)] == [f"model.layers.{i}.self_attn" for i in (2, 3, 4)]
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(tiny_model(num_hidden_layers=5), tmp_path / "adapter")
    assert [place for place, _ in wrappers(again)] == [place for place, _ in wrappers(model)]
    assert len(wrappers(attach(tiny_model(), named("llama_adapter")))) == 1


def test_models_that_it_does_not_know_are_refused(tmp_path):
    from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    with pytest.raises(AdapterError, match="q_proj, k_proj, v_proj, o_proj"):
        attach(gpt2, named("llama_adapter"))
    interleaved = CohereForCausalLM(CohereConfig(vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0))
    with pytest.raises(AdapterError, match=r"knows how queries are made in llama, .* this model is of type cohere"):
        attach(interleaved, named("llama_adapter"))
    with pytest.raises(AdapterError, match="adapter_layers is 3, and the model has 2 layers"):
        attach(tiny_model(), named("llama_adapter", adapter_layers=3))
    theirs = save_peft(with_peft(tiny_model(), peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")), tmp_path / "theirs")
    with pytest.raises(AdapterError, match="adapter_layers is 2"):
        load_adapter(tiny_model(num_hidden_layers=1), theirs)
