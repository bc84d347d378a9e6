"""The loss: summed cross-entropy over the trained tokens; whoever sums micro-batches and ranks divides by their count.

Shapes: input_ids, labels [batch, seq]. The label of position t is the token at t + 1; -100 is not trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deltune.models import head

# A step's work on one micro-batch: (model, batch) -> summed loss, or (summed loss, {"name": number} to log).
ForwardStep = Callable[[torch.nn.Module, Any], "torch.Tensor | tuple[torch.Tensor, dict[str, float]]"]


def causal_lm_step(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """The plain ForwardStep of a Hugging Face causal language model: the logits of all trained positions at once."""
    return head.summed_loss(model, None, batch.inputs(), *head.trained_rows(batch.labels))


class LossStep:
    """The same number without logits: a ForwardStep for one model, whose head is described once (`models/head.py`).

    Build it when adapters are attached and weights are where they stay.
    """

    def __init__(self, model: torch.nn.Module):
        self.head = head.describe(model)

    def __call__(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return head.summed_loss(model, self.head, batch.inputs(), *head.trained_rows(batch.labels))
