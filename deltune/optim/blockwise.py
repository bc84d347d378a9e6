"""Numbers in 8 bits: block-wise dynamic quantisation (arXiv:2110.02861), in plain torch.

A block of 256 consecutive values is divided by its largest magnitude, and each value becomes the index of the nearest of
256 levels. These lie close together near zero: a decimal exponent in unary, and a fraction in the bits that are left.

n: values, b = ceil(n / 256): blocks; the last one may be short.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltune.weights.codes import dynamic_levels

BLOCK = 256
KEPT_BITS = 17  # of a float32: sign, exponent and 8 of the fraction. Two numbers alike in them are nearer than any two borders


def num_blocks(num_values: int) -> int:
    return -(-num_values // BLOCK)


def quantise(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes uint8 [n], largest magnitude of each block float32 [b]) of float32 values [n].

    A value half way between two levels takes the lower one. A block of zeros has magnitude 0.
    """
    blocks = pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    scaled = blocks.mul((1 / largest).nan_to_num_(posinf=0.0)[:, None]).view(-1)
    borders, firsts = _borders(signed, values.device), _firsts(signed, values.device)
    kept = scaled.view(torch.int32).bitwise_right_shift(32 - KEPT_BITS).bitwise_and_((1 << KEPT_BITS) - 1)
    codes = firsts.index_select(0, kept)
    codes += scaled > borders.index_select(0, codes)  # one border at most lies among the numbers that share these bits
    return codes[: len(values)].to(torch.uint8), largest


def dequantise(codes: Tensor, largest: Tensor, signed: bool) -> Tensor:
    """float32 values [n] of codes [n] and their blocks' magnitudes [b]."""
    values = dynamic_levels(codes.device, signed).index_select(0, codes.int())
    whole = len(codes) // BLOCK
    values[: whole * BLOCK].view(whole, BLOCK).mul_(largest[:whole, None])
    values[whole * BLOCK :].mul_(largest[whole:])
    return values


@cache
def _borders(signed: bool, device: torch.device) -> Tensor:
    """Half way from each level to the next, and no border after the last [256]."""
    levels = dynamic_levels(device, signed)
    return torch.cat([(levels[1:] + levels[:-1]) / 2, levels.new_tensor([torch.inf])])


@cache
def _firsts(signed: bool, device: torch.device) -> Tensor:
    """The code of the least number with given KEPT_BITS [2^17], int32. That of a NaN is any."""
    rest = 32 - KEPT_BITS
    kept = torch.arange(1 << KEPT_BITS, device=device)
    negative = kept >= 1 << (KEPT_BITS - 1)
    bits = (kept << rest) + torch.where(negative, (1 << rest) - 1, 0)  # of negative numbers the least has the largest fraction
    least = torch.where(negative, bits - (1 << 32), bits).to(torch.int32).view(torch.float32).nan_to_num()
    return torch.bucketize(least, _borders(signed, device)[:-1], out_int32=True)
