"""Memory for what lives within one call: fresh memory is given page by page, which takes longer than to fill it, so every
thread keeps what it had. Whoever asks must be done with what the same name gave before."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor

_HELD = threading.local()


def scratch(name: str, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """An unfilled tensor on the device of `like`; what `name` gave before may be the same memory."""
    # an account of memory must not depend on earlier ones, and a compiler plans memory by itself
    if like.is_meta or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=like.device)
    held: dict[Any, Tensor] = vars(_HELD)
    key, size = f"{name} {dtype} {like.device}", math.prod(shape)
    if key not in held or held[key].numel() < size:
        with torch.inference_mode(False):  # training may come after an evaluation
            held[key] = torch.empty(size, dtype=dtype, device=like.device)
    return held[key][:size].view(shape)


def copied(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy, in `dtype`, in memory of that name."""
    return scratch(name, tensor, dtype or tensor.dtype, *tensor.shape).copy_(tensor)
