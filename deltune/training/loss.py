"""The loss: summed cross-entropy over the trained tokens; whoever sums micro-batches and ranks divides by their count.

Shapes: input_ids, labels [batch, seq]; logits [.., vocab]. The label of position t is the token at t + 1.
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
    """(logits [1, trained, vocab], targets [1, trained]), or of all positions [batch, seq - 1, ...] where that cannot be.

    The output head is by far the widest layer, so only the positions whose next token is trained enter it: prompts
    and padding do not. Each kept row is computed as before, whatever the model does to its logits afterwards.
    """
    targets = batch.labels[:, 1:]
    inputs = batch.inputs()
    head = output_head(model)
    if head is None:
        return model(**inputs).logits[:, :-1], targets
    kept = torch.nn.functional.pad(targets != IGNORE, (0, 1))  # the last position predicts nothing
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][kept].unsqueeze(0), *args[1:]))
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    return logits, targets[kept[:, :-1]].unsqueeze(0)


def output_head(model: torch.nn.Module) -> torch.nn.Module | None:
    """The layer from hidden states to logits, if the model applies it to a choice of positions (`logits_to_keep`)."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return None
    return model.get_output_embeddings()


def causal_lm_step(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """The default ForwardStep: summed cross-entropy of a Hugging Face causal language model."""
    return summed_cross_entropy(*causal_lm_logits(model, batch))
