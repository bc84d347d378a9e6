"""PEFT under transformers' Trainer; a callback paces the steps, a step lasts from its begin to the next one's."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.candidates.peft_loop import load, num_tokens, padded
from benchmarks.work import LR, read_rows


def paced(pacer: Any, began: float, losses: list[float], tokens: list[int]) -> Any:
    """A TrainerCallback that lets each step begin when it is asked for."""
    from transformers import TrainerCallback

    class Paced(TrainerCallback):
        started = False

        def on_step_begin(self, args, state, control, **kwargs):
            if not self.started:
                self.started = True
                pacer.ready(before_first_step=time.process_time() - began)
            else:
                pacer.ended(losses.pop(), tokens.pop(0) if tokens else 0)

    return Paced()


def arguments(spec: dict[str, Any]) -> dict[str, Any]:
    """What the Trainer and TRL are told alike."""
    cuda = spec.get("device") == "cuda"
    return dict(
        output_dir=tempfile.mkdtemp(), max_steps=10_000, per_device_train_batch_size=spec["micro_batch"], learning_rate=LR,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_strategy="no", save_strategy="no",
        report_to=[], optim="adamw_torch_fused", disable_tqdm=True, use_cpu=not cuda, seed=0, dataloader_pin_memory=cuda,
    )  # fmt: skip


def train(pacer: Any, spec: dict[str, Any], began: float) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    losses: list[float] = []
    tokens: list[int] = []
    rows = read_rows(Path(spec["rows"]))

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(rows)

        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            losses[:] = [float(loss.detach())]
            return loss

    def collate(batch):
        tokens.append(num_tokens(batch))
        return padded(batch)

    trainer = InOrder(
        model=load(spec), args=TrainingArguments(**arguments(spec), remove_unused_columns=False), train_dataset=rows,
        data_collator=collate, callbacks=[paced(pacer, began, losses, tokens)],
    )  # fmt: skip
    trainer.train()
