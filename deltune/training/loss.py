"""The loss: summed cross-entropy over the trained tokens; whoever sums micro-batches and ranks divides by their count.

Shapes: input_ids, labels [batch, seq]; logits [batch, kept, vocab]. The label of position t is the token at t + 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

IGNORE = -100

# A step's work on one micro-batch: (model, batch) -> summed loss, or (summed loss, {"name": number} to log).
ForwardStep = Callable[[torch.nn.Module, Any], "torch.Tensor | tuple[torch.Tensor, dict[str, float]]"]


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of −log p(target) over targets that are not −100, in float32. logits [..., vocab], targets [...]."""
    return cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def causal_lm_logits(model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [batch, kept, vocab], targets [batch, kept]) at the positions where any row of the batch is trained.

    The output head is by far the widest layer, so models that can leave out positions (`logits_to_keep`) are asked
    for the trained ones only; the kept numbers are the same.
    """
    targets = batch.labels[:, 1:]
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if not takes_logits_to_keep(model):
        return model(**inputs, use_cache=False).logits[:, :-1], targets
    kept = (targets != IGNORE).any(dim=0).nonzero().squeeze(1)
    logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits
    return logits, targets[:, kept]


def takes_logits_to_keep(model: torch.nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def causal_lm_step(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """The default ForwardStep: summed cross-entropy of a Hugging Face causal language model."""
    return summed_cross_entropy(*causal_lm_logits(model, batch))
