"""PEFT in a plain training loop, fed padded or packed batches; options: checkpointing, compile, dropout, bf16 adapters, Liger."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.work import LR, PAD, Row, adapter_folder, read_rows


def padded(rows: list[Row]) -> dict[str, Any]:
    """A batch padded to its longest row, int64 [batch, seq]."""
    import torch

    width = max(len(ids) for ids, _ in rows)

    def pad(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (width - len(values))

    return {
        "input_ids": torch.tensor([pad(ids, PAD) for ids, _ in rows]),
        "labels": torch.tensor([pad(labels, -100) for _, labels in rows]),
        "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids, _ in rows]),
    }


def packed(rows: list[Row]) -> dict[str, Any]:
    """A batch as one row, told apart by its positions, int64 [1, tokens]."""
    import torch

    return {
        "input_ids": torch.tensor([[i for ids, _ in rows for i in ids]]),
        "labels": torch.tensor([[x for _, labels in rows for x in [-100, *labels[1:]]]]),
        "position_ids": torch.tensor([[p for ids, _ in rows for p in range(len(ids))]]),
    }


def num_tokens(rows: list[Row]) -> int:
    return sum(len(ids) for ids, _ in rows)


def in_order(rows: list[Row], micro_batch: int) -> Iterator[list[Row]]:
    """Micro-batches round and round."""
    at = 0
    while True:
        yield [rows[(at + i) % len(rows)] for i in range(micro_batch)]
        at += micro_batch


def preload() -> None:
    """Import what every peer has imported before its first step; Trainer, TRL and litgpt come in processes of their own."""
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401


def load(spec: dict[str, Any]) -> Any:
    """The model with the adapter that every candidate starts from. `quant`: bitsandbytes' NF4 with quantised scales;
    `prepared`: then as PEFT's prepare_model_for_kbit_training leaves it, all but codes in float32."""
    import torch
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype, quantised = getattr(torch, spec["dtype"]), {}
    if spec.get("quant"):
        quantised["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=spec["quant"], bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=dtype, **quantised)
    model.config.use_cache = False
    if spec.get("prepared"):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(spec.get("checkpointing")))
    if spec.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if spec.get("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    model = PeftModel.from_pretrained(
        model, adapter_folder(Path(spec["folder"]), spec["adapter"], spec["rank"]), is_trainable=True,
        autocast_adapter_dtype=spec.get("autocast_adapters", True),
    )
    for module in model.modules():
        if spec.get("dropout") and isinstance(getattr(module, "lora_dropout", None), torch.nn.ModuleDict):
            module.lora_dropout["default"] = torch.nn.Dropout(spec["dropout"])
    return (model if spec.get("quant") else model.to(spec.get("device", "cpu"))).train()  # codes are where they were read to


def train(pacer: Any, spec: dict[str, Any], began: float) -> None:
    import torch

    model = load(spec)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if spec.get("compile") else model
    batches = in_order(read_rows(Path(spec["rows"])), spec["micro_batch"])
    collate = packed if spec.get("packed") else padded
    pacer.ready(before_first_step=time.process_time() - began)
    while True:
        rows = next(batches)
        batch = {name: value.to(model.device) for name, value in collate(rows).items()}
        loss = forward(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pacer.ended(loss.item(), num_tokens(rows))
