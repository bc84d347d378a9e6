"""NF4 (arXiv:2305.14314): a weight rounded to sixteen levels of a normal distribution, in blocks with a scale each.

Only the round trip: what the rounded weight's values are. How it would be stored is not this file's concern.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltune.weights import row_blocks

BLOCK = 64  # values that share one scale, along the stored rows
OFFSET = 0.9677083  # the outermost quantile: the mean of 1 - 1/30 and 1 - 1/32


def levels() -> Tensor:
    """The sixteen values, from -1 to 1 with an exact 0: quantiles of N(0, 1), eight above zero and seven below."""
    above = torch.special.ndtri(torch.linspace(OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    return torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above[0]


def round_trip(W: Tensor) -> Tensor:
    """W as it comes back from NF4, each block of 64 in a row (the last may be shorter) scaled by its largest value."""
    table = levels().to(W)
    between = (table[1:] + table[:-1]) / 2
    result = torch.empty_like(W)
    pad = -W.shape[1] % BLOCK
    for rows in row_blocks(W):
        blocks = torch.nn.functional.pad(W[rows], (0, pad)).unflatten(1, (-1, BLOCK))
        scale = blocks.abs().amax(2, keepdim=True)
        places = torch.bucketize(blocks / scale.clamp_min(torch.finfo(W.dtype).tiny), between)
        result[rows] = (table[places] * scale).flatten(1)[:, : W.shape[1]]
    return result
