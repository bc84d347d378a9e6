"""FLOPs per token against torch's own counter and published shapes, and the table of devices."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deltune.adapters.attach import attach
from deltune.adapters.methods.lora import LoraConfig
from deltune.models.cost import (
    KNOWN_DEVICES,
    Speed,
    attention_flops_per_token,
    device_peak_flops,
    device_speed,
    flops_per_token,
    measured_matmul_flops,
)
from deltune.models.dry_run import Kernel
from deltune.models.select import select_trainable
from tests.tiny import tiny_config, tiny_model

BATCH, SEQ = 2, 64


def counted(model):
    """FLOPs of a step by torch's counter; attention is eager, since the counter knows no fused kernel of the CPU."""
    ids = torch.arange(BATCH * SEQ).reshape(BATCH, SEQ) % 200
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.float().sum().backward()
    return counter.get_total_flops()


def model_of(**changes):
    model = tiny_model(num_hidden_layers=6, **changes)
    model.set_attn_implementation("eager")
    return model


CHANGES = {
    "full": lambda m: None,
    "lora": lambda m: attach(m, LoraConfig(rank=4)),
    "lora of the upper half": lambda m: attach(m, LoraConfig(rank=4, targets=r".*layers\.[345]\..*_proj")),
    "head frozen": lambda m: select_trainable(m, disable=["lm_head*"]),
    "last block": lambda m: select_trainable(m, enable=["*layers.5.*"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_closed_form_is_what_torch_counts(change):
    model = model_of()
    CHANGES[change](model)
    lowest = {"lora of the upper half": 3, "last block": 5}.get(change, 0)
    other_half = attention_flops_per_token(model.config, SEQ) * (1 + 2 * (6 - lowest) / 6)  # torch counts the whole square
    expected = counted(model) / (BATCH * SEQ)
    assert flops_per_token(model, SEQ) + other_half == pytest.approx(expected, rel=0.03)


def test_a_tied_head_counts_and_the_embedding_lookup_does_not():
    tied, apart = model_of(tie_word_embeddings=True), model_of()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert flops_per_token(tied, SEQ) == flops_per_token(apart, SEQ)


def llama_3_8b():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM._from_config(config)


def test_llama_3_8b_costs_what_its_shape_says():
    """6.979 G weights in blocks, 0.525 G in the head, 41.9 M of LoRA; 4,096 tokens: 33.5 GFLOP a token, full tuning 48.2."""
    model = llama_3_8b()
    assert flops_per_token(model, 4096) == pytest.approx(48.2e9, rel=2e-3)
    attach(model, LoraConfig(rank=16))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 41_943_040
    assert flops_per_token(model, 4096) == pytest.approx(33.5e9, rel=2e-3)


def test_of_a_mixture_only_the_experts_that_a_token_visits_count():
    from transformers import MixtralConfig, MixtralForCausalLM

    dense = tiny_config(num_hidden_layers=2)
    config = MixtralConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    with torch.device("meta"):
        found = flops_per_token(MixtralForCausalLM._from_config(config), SEQ)
    one_expert, routers = 3 * 32 * 64, 8 * 32
    assert found == flops_per_token(tiny_model(), SEQ) + 6 * dense.num_hidden_layers * (one_expert + routers)


@pytest.mark.parametrize(("name", "entry"), [
    ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"), ("NVIDIA L40S", "L40S"),
    ("NVIDIA L4", "L4"), ("NVIDIA A10G", "A10G"), ("NVIDIA A10", "A10"), ("NVIDIA A100-SXM4-80GB", "A100"), ("Tesla T4", "T4"),
    ("Tesla V100-SXM2-16GB", "V100"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA RTX A6000", "RTX A6000"),
    ("NVIDIA GH200 480GB", "GH200"), ("AMD Instinct MI300X", "MI300X"),
])  # fmt: skip
def test_a_device_is_known_by_its_name(monkeypatch, name, entry):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    single, brain, half, _ = KNOWN_DEVICES[entry]
    device = torch.device("cuda")
    assert device_peak_flops(device, torch.float32) == single * 1e12 == device_peak_flops(device, "fp32")
    assert device_peak_flops(device, torch.bfloat16) == brain * 1e12
    assert device_peak_flops(device, torch.float16) == half * 1e12
    speed = device_speed(device, [torch.bfloat16])
    assert speed.flops[torch.bfloat16] < brain * 1e12 and speed.overlaps and name in speed.origin


def test_a_product_is_timed_where_no_table_helps():
    speed = device_speed(torch.device("cpu"), [torch.float32])
    assert speed.flops[torch.float32] > 1e8 and speed.bytes_per_second > 1e7 and not speed.overlaps
    assert measured_matmul_flops(torch.device("cpu"), torch.float32, size=64, seconds=0) > 0


def test_a_kernel_takes_the_longer_of_arithmetic_and_traffic():
    kernels = [Kernel(1000, torch.float32, 10), Kernel(0, torch.int64, 300), Kernel(1000, torch.bfloat16, 10)]
    flops = {torch.float32: 100.0, torch.bfloat16: 200.0}
    assert Speed(flops, 30.0, 1.0, False, "").seconds(kernels) == pytest.approx(10 + 10 + 5 + 3)
    assert Speed(flops, 30.0, 1.0, True, "").seconds(kernels) == pytest.approx(25)
    assert Speed(flops, 30.0, 20.0, True, "").seconds(kernels) == pytest.approx(60)
