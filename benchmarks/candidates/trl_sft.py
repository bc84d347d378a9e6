"""TRL's SFTTrainer on tokenised rows: its defaults (checkpointing on), without checkpointing, or with its packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.candidates.peft_loop import load
from benchmarks.candidates.peft_trainer import arguments, paced
from benchmarks.work import read_rows


def train(pacer: Any, spec: dict[str, Any], began: float) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    losses: list[float] = []
    tokens: list[int] = []
    rows = read_rows(Path(spec["rows"]))

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def compute_loss(self, model, inputs, *args, **kwargs):
            mask = inputs.get("attention_mask")
            tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
            result = super().compute_loss(model, inputs, *args, **kwargs)
            losses[:] = [float((result[0] if isinstance(result, tuple) else result).detach())]
            return result

    data = Dataset.from_dict({
        "input_ids": [ids for ids, _ in rows],
        "labels": [labels for _, labels in rows],
        "completion_mask": [[int(label != -100) for label in labels] for _, labels in rows],
    })
    if spec.get("packing"):  # its packing takes rows of ids, all trained
        data = data.remove_columns(["labels", "completion_mask"])
    extra = {} if spec.get("default") else {"gradient_checkpointing": bool(spec.get("checkpointing"))}
    if spec["dtype"] == "float32":
        extra["bf16"] = False
    config = SFTConfig(**arguments(spec), max_length=spec["length"], packing=bool(spec.get("packing")), **extra)
    trainer = InOrder(
        model=load(spec), args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(spec["folder"]),
        callbacks=[paced(pacer, began, losses, tokens)],
    )  # fmt: skip
    trainer.train()
