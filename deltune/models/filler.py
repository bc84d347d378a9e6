"""Numbers of rows rounded up where a product's kernel is made for its shape, so that kernels are found again.

oneDNN, which multiplies short types on CPUs, makes a kernel for each shape that it meets. A step of packed rows, whose
number of tokens is a new one nearly every time, would make some 60 of them, a tenth of its time in a 120 M model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

SHORT = (torch.bfloat16, torch.float16)
MOST = 64  # rows to whose multiples numbers are rounded


def makes_kernels(device: str, dtype: torch.dtype) -> bool:
    """Whether products of this type are of kernels made for their shapes, on this type of device."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return device == "cpu" and dtype in SHORT


def rounded(rows: int) -> int:
    """Up to the next multiple of 64, or of the power of two that is at most a sixteenth of them: by 6 % at the most."""
    step = min(MOST, 1 << max(0, (rows // 16).bit_length() - 1))
    return -(-rows // step) * step


def filled(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model's inputs; those of a packed row [1, tokens] with a last document more, of the tokens that are missing to a
    rounded number. No other document sees it, and nobody reads what becomes of it."""
    borders, positions = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
    if borders is None or positions is None or positions.ndim != 2:
        return inputs
    tokens = positions.shape[1]
    missing = rounded(tokens) - tokens
    if not missing:
        return inputs
    longer = F.pad(borders, (0, 1), value=tokens + missing)
    starts = vars(borders).get("starts")
    if starts is not None:
        longer.starts = (*starts, tokens + missing)  # for models.attention, as Batch.inputs has it
    longest = max(inputs["max_length_q"], missing)
    return {
        **inputs, "input_ids": F.pad(inputs["input_ids"], (0, missing)), "cu_seq_lens_q": longer, "cu_seq_lens_k": longer,
        "position_ids": torch.cat([positions, torch.arange(missing, device=positions.device)[None]], dim=1),
        "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip
