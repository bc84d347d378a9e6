"""The loss: summed cross-entropy over the trained tokens; whoever sums micro-batches and ranks divides by their count.

Shapes: input_ids, labels [batch, seq]. The label of position t is the token at t + 1; -100 is not trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deltune.models.head import Head, summed_loss, trained_rows

# A step's work on one micro-batch: (model, batch) -> summed loss, or (summed loss, {"name": number} to log).
ForwardStep = Callable[[torch.nn.Module, Any], "torch.Tensor | tuple[torch.Tensor, dict[str, float]]"]


class LossStep:
    """The ForwardStep of a Hugging Face causal language model whose head is described (`models.head.describe`), so that
    logits need not be made whole; without a description they are, of all trained positions at once."""

    def __init__(self, head: Head | None):
        self.head = head

    def __call__(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return summed_loss(model, self.head, batch.inputs(), *trained_rows(batch.labels))


causal_lm_step = LossStep(None)  # the plain one
