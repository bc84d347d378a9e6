"""From examples to a batch of tensors: padding carries no label and no attention, and every count is taken from the real tokens.

Shapes: batch = examples, seq = the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from deltune.data.dataset import IGNORED, Example


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Labels stand at their own token (the loss shifts); -100 is not trained."""

    input_ids: torch.Tensor  # int64 [batch, seq]
    labels: torch.Tensor  # int64 [batch, seq]
    attention_mask: torch.Tensor  # int64 [batch, seq], 1 on tokens, 0 on padding
    rows: list[str]  # file:line of each example
    num_tokens: int  # without padding
    num_trained_tokens: int  # labels that the loss sees: those from the second column on

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            labels=self.labels.to(device),
            attention_mask=self.attention_mask.to(device),
        )


def pad(examples: Sequence[Example], pad_id: int) -> Batch:
    """Right padding to the longest example. The mask comes from the lengths, so that a pad token which is also the
    EOS token (many models have no other) is attended to where it is text."""
    seq = max(len(example.ids) for example in examples)
    ids = np.full((len(examples), seq), pad_id, dtype=np.int64)
    labels = np.full((len(examples), seq), IGNORED, dtype=np.int64)
    mask = np.zeros((len(examples), seq), dtype=np.int64)
    for i, example in enumerate(examples):
        n = len(example.ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = example.ids, example.labels, 1
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        attention_mask=torch.from_numpy(mask),
        rows=[example.row for example in examples],
        num_tokens=int(mask.sum()),
        num_trained_tokens=int((labels[:, 1:] != IGNORED).sum()),
    )
