"""Random starts, drawn on the CPU in float32 from a generator, so that every device and number type starts alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DRAWN = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


def kaiming(shape: tuple[int, ...] | torch.Size, generator: torch.Generator, fan: int | None = None) -> Tensor:
    """kaiming_uniform with a = √5: uniform within ±1/√fan, the fan being the second dimension unless given."""
    bound = 1 / math.sqrt(shape[1] if fan is None else fan)
    return uniform(shape, bound, generator)


def uniform(shape: tuple[int, ...] | torch.Size, bound: float, generator: torch.Generator) -> Tensor:
    """Uniform within ±bound."""
    return torch.empty(shape, **DRAWN).uniform_(-bound, bound, generator=generator)


def normal(shape: tuple[int, ...] | torch.Size, std: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, **DRAWN).normal_(std=std, generator=generator)


def orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A [rows, columns] matrix with orthonormal rows, or columns where there are more rows; uniform over all of them."""
    tall = torch.empty(max(rows, columns), min(rows, columns), **DRAWN).normal_(generator=generator)
    q, r = torch.linalg.qr(tall)
    q = q * torch.sign(torch.diagonal(r))
    return q if rows >= columns else q.T.contiguous()
