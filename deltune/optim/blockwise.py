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

from deltune.weights.codes import dynamic_levels

BLOCK = 256


@cache
def _borders(signed: bool, device: torch.device) -> Tensor:
    """Half way from each code value to the next [255]."""
    values = dynamic_levels(device, signed)
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
    values = dynamic_levels(codes.device, signed)[codes.int()]
    return values * largest.repeat_interleave(BLOCK)[: len(codes)]
