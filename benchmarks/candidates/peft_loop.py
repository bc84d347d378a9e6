"""PEFT in a plain training loop, fed padded or packed batches; options: checkpointing, compile, dropout, bf16 adapters, Liger."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.work import LR, PAD, Row, read_rows


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


def load(spec: dict[str, Any]) -> Any:
    """The model with the adapter that every candidate starts from."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec["folder"], dtype=getattr(torch, spec["dtype"]))
    model.config.use_cache = False
    if spec.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if spec.get("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    model = PeftModel.from_pretrained(
        model, Path(spec["folder"]) / f"adapter-{spec['adapter']}", is_trainable=True,
        autocast_adapter_dtype=spec.get("autocast_adapters", True),
    )
    for module in model.modules():
        if spec.get("dropout") and isinstance(getattr(module, "lora_dropout", None), torch.nn.ModuleDict):
            module.lora_dropout["default"] = torch.nn.Dropout(spec["dropout"])
    return model.to(spec.get("device", "cpu")).train()


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
