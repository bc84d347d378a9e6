"""Numbers in 8 bits: block-wise dynamic quantisation (arXiv:2110.02861), in plain torch.

A block of 256 consecutive values is divided by its largest magnitude, and each value becomes the index of the nearest of
256 code values. These lie close together near zero: a decimal exponent in unary, and a fraction in the bits that are left.

n: values, b = ceil(n / 256): blocks; the last one may be short.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 256
DECADES = 7


@cache
def code_values(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers that codes stand for, rising, float32: of either sign up to 1, or (not `signed`) 0 and above.

    Decade i of seven, from 10^(i-6) down to a tenth of it, is cut into 2^i equal parts (twice as many without a sign),
    of which each gives its middle; 0 and 1 complete the set.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(DECADES):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + (not signed)) + 1)
        middles = 10.0 ** (decade + 1 - DECADES) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values.to(device)


@cache
def _borders(signed: bool, device: torch.device) -> Tensor:
    """Half way from each code value to the next [255]."""
    values = code_values(signed, device)
    return (values[1:] + values[:-1]) / 2


def num_blocks(num_values: int) -> int:
    return -(-num_values // BLOCK)


def quantise(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes uint8 [n], largest magnitude of each block float32 [b]) of float32 values [n].

    A block of zeros has code 0 and magnitude 0, which is zero again.
    """
    blocks = pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    scaled = blocks * (1 / largest).nan_to_num_(posinf=0.0)[:, None]
    codes = torch.bucketize(scaled, _borders(signed, values.device), out_int32=True).to(torch.uint8)
    return codes.view(-1)[: len(values)], largest


def dequantise(codes: Tensor, largest: Tensor, signed: bool) -> Tensor:
    """float32 values [n] of codes [n] and their blocks' magnitudes [b]."""
    values = code_values(signed, codes.device)[codes.int()]
    return values * largest.repeat_interleave(BLOCK)[: len(codes)]
