"""From examples to a batch of tensors: padded into rows, or joined into one row without padding; every count is of real tokens.

Shapes: batch = rows; seq = the longest example where padded, all tokens where packed (batch is 1 then).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from deltune.data.dataset import IGNORED, Example
from deltune.errors import DataError


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Labels stand at their own token (the loss shifts); -100 is not trained.

    A packed batch has documents instead of padding: `segments` are their borders, `position_ids` restart at each, and
    no first token of a document is trained, so that the usual shift never crosses a border.
    """

    input_ids: torch.Tensor  # int64 [batch, seq]
    labels: torch.Tensor  # int64 [batch, seq]
    attention_mask: torch.Tensor | None  # int64 [batch, seq], 1 on tokens, 0 on padding; None where packed
    rows: list[str]  # file:line of each example
    num_tokens: int  # without padding
    num_trained_tokens: int  # labels that the loss sees: those from the second token of each example on
    position_ids: torch.Tensor | None = None  # packed: int64 [1, seq], from 0 in each document
    segments: tuple[int, ...] | None = None  # packed: 0 = s0 < s1 < ... = seq; document i is [s(i), s(i + 1))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device; from page-locked memory the copy does not wait for the device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pinned(self) -> Batch:
        """The same batch in page-locked memory."""
        return self._with(torch.Tensor.pin_memory)

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        names = ("input_ids", "labels", "attention_mask", "position_ids")
        return replace(self, **{name: change(getattr(self, name)) for name in names if getattr(self, name) is not None})

    def inputs(self) -> dict[str, Any]:
        """What a Hugging Face model's forward is given. Where packed, the documents' borders by the names of transformers'
        FlashAttentionKwargs besides, which every attention function is handed (int32 [documents + 1], and the longest)."""
        given: dict[str, Any] = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "use_cache": False}
        if self.segments is not None:
            borders = torch.tensor(self.segments, dtype=torch.int32, device=self.input_ids.device)
            borders.starts = self.segments  # for models.attention, which need not read them back from the device then
            longest = max(stop - start for start, stop in pairwise(self.segments))
            given |= {
                "position_ids": self.position_ids, "cu_seq_lens_q": borders, "cu_seq_lens_k": borders,
                "max_length_q": longest, "max_length_k": longest,
            }  # fmt: skip
        return given

    def row_of_tokens(self) -> torch.Tensor:
        """int64 [batch, seq]: to which of `rows` each position belongs, padding too."""
        device = self.input_ids.device
        if self.segments is None:
            return torch.arange(len(self.rows), device=device)[:, None].expand(self.input_ids.shape)
        lengths = torch.tensor([stop - start for start, stop in pairwise(self.segments)], device=device)
        return torch.arange(len(self.rows), device=device).repeat_interleave(lengths, output_size=self.segments[-1])[None]


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


def join(examples: Sequence[Example]) -> Batch:
    """All examples in one row, one after another. The first token of each is predicted from nothing, so its label is -100.

    Raises DataError for an example without tokens, which would have no place in the row.
    """
    lengths = [len(example.ids) for example in examples]
    if not all(lengths):
        raise DataError(f"{examples[lengths.index(0)].row}: the example has no token, so it cannot be packed")
    borders = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([example.ids for example in examples]).astype(np.int64)
    labels = np.concatenate([example.labels for example in examples]).astype(np.int64)
    labels[borders[:-1]] = IGNORED
    positions = np.arange(borders[-1]) - np.repeat(borders[:-1], lengths)
    return Batch(
        input_ids=torch.from_numpy(ids)[None],
        labels=torch.from_numpy(labels)[None],
        attention_mask=None,
        rows=[example.row for example in examples],
        num_tokens=len(ids),
        num_trained_tokens=int((labels != IGNORED).sum()),
        position_ids=torch.from_numpy(positions)[None],
        segments=tuple(borders.tolist()),
    )
