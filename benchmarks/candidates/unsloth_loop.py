"""Unsloth's model and LoRA in a plain loop. It draws its own start, so its losses are not held to be equal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.candidates.peft_loop import in_order, num_tokens, padded
from benchmarks.work import LR, read_rows


def train(pacer: Any, spec: dict[str, Any], began: float) -> None:
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        spec["folder"], max_seq_length=spec["length"], dtype=getattr(torch, spec["dtype"]), load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model, r=spec["rank"], lora_alpha=2 * spec["rank"], lora_dropout=0.0, bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth" if spec.get("checkpointing") else False,
    )  # fmt: skip
    FastLanguageModel.for_training(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    batches = in_order(read_rows(Path(spec["rows"])), spec["micro_batch"])
    pacer.ready(before_first_step=time.process_time() - began)
    while True:
        rows = next(batches)
        loss = model(**{name: value.to(model.device) for name, value in padded(rows).items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pacer.ended(loss.item(), num_tokens(rows))
