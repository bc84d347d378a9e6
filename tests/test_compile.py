"""engine.compile: the same numbers as without, state untouched, and no graph for a length, a document or a layer of its own."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch._dynamo as dynamo
from torch._dynamo.utils import counters

from deltune.adapters.attach import attach
from deltune.adapters.config import METHODS
from deltune.adapters.named import method
from deltune.commands.batching import cannot_pack
from deltune.data.dataset import Example
from deltune.data.pack import Batch, join, pad
from deltune.errors import EngineError, ModelError
from deltune.models import compiled
from deltune.models.compiled import compile_blocks
from deltune.training.loss import causal_lm_step
from tests.tiny import tiny_config, tiny_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.version_info >= (3, 15), reason="torch.compile does not know this Python")


@pytest.fixture(autouse=True)
def fresh():
    dynamo.reset()
    counters.clear()
    yield
    dynamo.reset()


def batch(lengths, make=join) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = [torch.randint(3, 250, (n,), generator=generator).int().numpy() for n in lengths]
    found = [Example(one, one, f"rows.jsonl:{i}") for i, one in enumerate(ids)]
    return join(found) if make is join else pad(found, 258)


def adapted(name="lora", **changes):
    from transformers import LlamaForCausalLM

    from deltune.models import attention

    attention.register()
    torch.manual_seed(0)
    changes = {"attention_bias": name == "bitfit", **changes}  # which trains biases that are there
    model = LlamaForCausalLM(tiny_config(**{"attn_implementation": "segment", "num_hidden_layers": 2, **changes}))
    if name is not None:
        attach(model, method(name, **METHODS[name].small, **({"strict": False} if name == "bd_lora" else {})))
        with torch.no_grad():  # away from a start that is zero
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model.train()


def step(model, one):
    torch.manual_seed(0)  # of methods that draw noise
    loss = causal_lm_step(model, one)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def agree(model, plain, one):
    loss, gradients = step(model, one)
    expected, wanted = step(plain, one)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5 * max(1.0, wanted[name].abs().max().item()))


def test_blocks_that_are_alike_share_one_graph_for_all_lengths():
    from torch import nn

    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.SiLU()) for _ in range(3))
    attach(model, method("lora"))
    compile_blocks(model.train(), CPU, backend="eager")
    for length in (5, 9, 33):
        x = torch.randn(2, length, 8, requires_grad=True)
        y = x
        for block in model.layers:
            y = block(y)
        y.sum().backward()
        for block in model.layers:
            x = block._call_impl(x)
        torch.testing.assert_close(y, x)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("make", [join, pad], ids=["packed", "padded"])
def test_lengths_documents_and_layers_share_their_graphs(make):
    model = adapted()
    plain = copy.deepcopy(model)
    keys = list(model.state_dict())
    assert "2 blocks" in compile_blocks(model, CPU, backend="eager")
    assert list(model.state_dict()) == keys
    counts = []
    for lengths in ([30, 20], [10, 40, 25], [33, 31, 17, 20]):
        agree(model, plain, batch(lengths, make))
        counts.append(counters["stats"]["unique_graphs"])
    assert counts[0] > 0 and counts[-1] == counts[0]  # dynamic from the start: nothing is compiled anew
    parts = counts[0]
    agree(model, plain, batch([64], make))
    assert counters["stats"]["unique_graphs"] <= 2 * parts  # a row of one document has another mask


@pytest.mark.slow
def test_evaluation_and_generation_run_the_blocks_as_they_are():
    model = adapted()
    compile_blocks(model, CPU, backend="eager")
    model.eval()
    with torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.int64))
    model.generate(torch.full((1, 4), 7), max_new_tokens=3, do_sample=False, pad_token_id=258)
    assert counters["stats"]["unique_graphs"] == 0
    model.train()
    step(model, batch([9, 8]))
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_run_compiled(name):
    """Traced, not turned into machine code: a method's forward is one that torch.compile can follow, or leaves to Python."""
    model = adapted(name)
    plain = copy.deepcopy(model)
    compile_blocks(model, CPU, backend="eager")
    make = pad if cannot_pack(model) else join
    # the second may show that a number is not always the same, the others that few tokens go another way
    for lengths in ([30, 20], [10, 40], [7, 13], [22, 11]):
        agree(model, plain, batch(lengths, make))
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for lengths in ([19, 50], [9, 9], [16, 17]):
        agree(model, plain, batch(lengths, make))
    assert counters["stats"]["unique_graphs"] == graphs  # no length is compiled anew


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["lora", "dora", "oft"])
def test_machine_code_gives_the_same_numbers(name, recompute):
    model = adapted(name)
    plain = copy.deepcopy(model)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compile_blocks(model, CPU)
    for lengths in ([30, 20], [10, 40, 25], [64]):
        agree(model, plain, batch(lengths))


def test_without_a_compiler_or_blocks_it_is_said(monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none():
        raise InvalidCxxCompiler

    with pytest.raises(ModelError, match="no list of blocks"):
        compile_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2)), CPU, backend="eager")
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(EngineError, match=r"C\+\+ compiler"):
        compile_blocks(tiny_model(), CPU)
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(EngineError, match="triton"):
        compile_blocks(tiny_model(), torch.device("cuda"))
    assert all(block._compiled_call_impl is None for block in compiled.repeated(tiny_model()))
