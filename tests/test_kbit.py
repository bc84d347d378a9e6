"""A quantised base before training: what is counted, what stays wide, and that recomputing asks nothing of the embeddings."""

from __future__ import annotations

import json

import pytest
import torch

import deltune
from deltune.adapters.attach import attach
from deltune.adapters.methods.lora import LoraConfig
from deltune.commands import plan
from deltune.models import kbit
from deltune.models.config import ModelConfig, QuantConfig
from deltune.models.lean import make_lean
from deltune.models.load import empty, load
from deltune.models.recompute import KINDS, apply
from deltune.models.select import is_norm, parameter_table
from deltune.settings import run_from
from deltune.training.loss import causal_lm_step
from deltune.weights import is_quantised, store_as
from tests.encoded import write_rows
from tests.synthetic import batch_of
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

RANK = 64
PER_RANK = 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # LLaMA-7B: 32 blocks of q, k, v, o and gate, up, down
LINEAR = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
OTHERS = 2 * 32000 * 4096 + 65 * 4096  # embeddings, head, norms


def quantised(name="nf4") -> QuantConfig:
    return run_from([f"quant={name}", "adapter=lora"]).quant


def test_the_table_counts_a_4_bit_weight_as_one_parameter_a_value(tmp_path):
    tiny_config(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
    ).save_pretrained(tmp_path)
    model = attach(empty(ModelConfig(path=str(tmp_path), start="random"), quant=quantised()), LoraConfig(rank=RANK, alpha=16.0))
    rows = parameter_table(model)
    trainable, total = (sum(row[key] for row in rows) for key in ("trainable", "total"))
    assert trainable == RANK * PER_RANK == 159_907_840
    assert total == LINEAR + OTHERS + trainable == 6_898_323_456
    # QLoRA's README has 79,953,920 of 3,660,320,768: its code halves the adapter, and counts two 4-bit weights as one
    assert trainable // 2 == 79_953_920 and LINEAR // 2 + OTHERS + trainable == 3_660_320_768


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request, tmp_path):
    tiny_config(num_hidden_layers=4).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = load(ModelConfig(path=str(tmp_path), start="random"), device="cpu", seed=0, quant=quantised())
    store_as(found, request.param)
    kbit.prepare(found)
    return found


def test_norms_are_float32_and_embeddings_and_head_stay_as_the_base_is(model):
    stored = model.get_input_embeddings().weight.dtype
    norms = [module for module in model.modules() if is_norm(module)]
    assert len(norms) == 9 and {norm.weight.dtype for norm in norms} == {torch.float32}
    assert model.get_output_embeddings().weight.dtype == stored == model.dtype
    assert sum(is_quantised(p) for p in model.parameters()) == 4 * 7 and not is_quantised(model.get_output_embeddings().weight)
    attach(model, LoraConfig(rank=4))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    lines = "\n".join(kbit.told(model))
    assert "base: 28 linear layers in nf4" in lines and "norms: float32" in lines and "trained: 56 tensors in float32" in lines
    assert f"embeddings and head: {str(stored).removeprefix('torch.')}\n" in lines


def test_a_base_without_codes_is_left_alone():
    model = tiny_model().to(torch.bfloat16)
    kbit.prepare(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not list(kbit.told(model))


def test_a_norm_computes_in_float32_and_is_rounded_once(model):
    (norm, *_), stored = [module for module in model.modules() if is_norm(module)], model.dtype
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(stored)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(32, generator=torch.Generator().manual_seed(2)))  # not what bfloat16 can hold
        wide = x.double()
        exact = wide / (wide.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()
        for put in (lambda: None, lambda: make_lean(model)):
            put()
            out = norm(x)
            assert out.dtype == stored and (out != exact.to(stored)).float().mean() < (0.5 if stored == torch.float32 else 0.02)
            assert torch.allclose(out.double(), exact, rtol=1e-6 if stored == torch.float32 else 2**-8)


def test_recomputing_on_codes_gives_the_same_bits_and_asks_no_gradient_of_the_embeddings(model):
    attach(model, LoraConfig(rank=4, dropout=0.1)).train()
    ids = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    batch, found = batch_of(ids, ids, torch.ones_like(ids)), []
    for kind in KINDS:
        apply(model, kind)
        assert not model.get_input_embeddings()(ids).requires_grad
        torch.manual_seed(3)
        loss = causal_lm_step(model, batch)
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for loss, gradients in found:
        assert loss == found[0][0] and gradients.keys() == trained
        assert all(torch.equal(gradient, found[0][1][name]) for name, gradient in gradients.items())


def test_plan_prints_the_rule_and_counts_what_training_counts(tmp_path, tiny_folder):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"say {i}", "completion": str(i)} for i in range(9)])
    stated = {
        "name": "r", "output": str(tmp_path), "model": str(tiny_folder), "data.train": [data], "quant": "nf4", "adapter": "lora", "train.steps": 2,
        "train.micro_batch": 2, "log.progress": "off", "log.report": False, "log.sinks": [], "optim": "paged_adamw",
    }  # fmt: skip
    planned = plan.make(run_from(stated))
    outcome = deltune.train(stated)
    start = json.loads((outcome.folder / "metrics.jsonl").read_text().splitlines()[0])
    lines = start["description"]["quantised"]
    assert lines[0].startswith("base: 14 linear layers in nf4") and len(lines) == 5
    assert "\n".join(f"  {line}" for line in lines) in "\n".join(plan.page(planned))
    assert parameter_table(planned.model) == start["parameter_table"]
