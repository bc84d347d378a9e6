"""NF4, FP4 and 8-bit codes of values, in torch alone: what a value is rounded to, and what comes back.

The codes, scales and values are those of bitsandbytes on a CPU, bit for bit (docs/quantisation.md): two 4-bit codes a
byte, the first in the high half; values in stored order, in blocks that run on over the ends of rows, each block scaled
by its largest magnitude. Sources: QLoRA (arXiv:2305.14314, NF4 in appendix E, double quantisation in § 3), dynamic 8-bit
codes (arXiv:2110.02861), LLM.int8() (arXiv:2208.07339).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from deltune.errors import DeltuneError

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # of 12, by bit pattern: two bits of exponent, one of mantissa
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALES_BLOCK = 256  # scales that share a scale of their own in double quantisation
CHUNK_VALUES = 1 << 18  # at a time, so that what is between stays in the cache
CELLS = 2048  # of the grid over 0 to 1 (and as many below 0) by which a value's code is found: no cell has two bounds
GRID_8BIT = 32767.5  # the 8-bit code of a scaled value is that of the nearest of 65,536 points


@cache
def levels(kind: str, device: torch.device | str = "cpu") -> Tensor:
    """The values of the sixteen codes [16] in float32, between -1 and 1. FP4 has its zero twice, as codes 0 and 8."""
    if kind == "nf4":
        return torch.tensor(NF4, dtype=torch.float32, device=device)
    above = torch.tensor(FP4, dtype=torch.float32, device=device)
    return torch.cat([above, 0.0 - above]) / 12.0


@cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """The two values of every byte [256], each pair's bits as one int64."""
    table = levels(kind, device)
    byte = torch.arange(256, device=device)
    return torch.stack([table[byte >> 4], table[byte & 15]], 1).contiguous().view(torch.int64).flatten()


@cache
def _search(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each cell of the grid the one bound in it, or infinity [cells], and the codes not above and above it [cells · 2]."""
    table = levels(kind, device)
    order = torch.argsort(table, stable=True)
    bounds = (table[order[:-1]] + table[order[1:]]) / 2
    cells = _cells(bounds.clone())
    bound = torch.full((2 * CELLS + 1,), torch.inf, dtype=torch.float32, device=device)
    bound[cells.long()] = bounds
    below = torch.bucketize(torch.arange(2 * CELLS + 1, device=device), cells.long())  # bounds in lower cells
    codes = torch.stack([order[below], order[(below + 1).clamp(max=15)]], 1)
    return bound, codes.flatten().to(torch.uint8)


def _cells(scaled: Tensor) -> Tensor:
    return scaled.mul(CELLS).add_(CELLS).int()


@torch.no_grad()
def quantise_4bit(values: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes, two a byte (uint8 [⌈n / 2⌉]), and the scale of each block (float32 [⌈n / block_size⌉]) of values [n].

    A value between two levels goes to the nearer one, half-way to the lower one. Raises DeltuneError for a value that is
    not finite.
    """
    values = values.reshape(-1)
    n, device = values.numel(), values.device
    bound, code = _search(kind, device)
    codes = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(-(-n // block_size), dtype=torch.float32, device=device)
    if values.is_meta:
        return codes, scales
    for start in range(0, n, CHUNK_VALUES):  # a multiple of every block size
        chunk = values[start : start + CHUNK_VALUES].float()
        whole = chunk.numel() // block_size * block_size
        largest = scales[start // block_size : -(-(start + chunk.numel()) // block_size)]
        blocks = chunk[:whole].view(-1, block_size)
        if whole:
            torch.amax(blocks.abs(), 1, out=largest[: whole // block_size])
        scaled = (blocks * (1.0 / largest[: whole // block_size, None].clamp(min=1e-38))).view(-1)
        if whole < chunk.numel():  # a last short block is divided by its scale, not multiplied by the inverse
            largest[-1] = chunk[whole:].abs().max().clamp(min=1e-38)
            scaled = torch.cat([scaled, chunk[whole:] / largest[-1]])
        if not torch.isfinite(largest).all():
            raise DeltuneError("a weight to be quantised has values that are not finite")
        scaled.clamp_(-1, 1)
        cells = _cells(scaled)
        above = scaled > bound.index_select(0, cells)
        found = code.index_select(0, cells.mul_(2).add_(above))
        if found.numel() % 2:
            found = torch.cat([found, code.index_select(0, _cells(scaled.new_zeros(1)) * 2)])
        torch.add(found[1::2], found[::2], alpha=16, out=codes[start // 2 : (start + chunk.numel() + 1) // 2])
    return codes, scales


@torch.no_grad()
def dequantise_4bit(codes: Tensor, scales: Tensor, kind: str, block_size: int, out: Tensor) -> Tensor:
    """Fill `out` [n], whatever its type, with level · scale: formed in float32, rounded once."""
    pairs, n = _pairs(kind, codes.device), out.numel()
    for start in range(0, n, CHUNK_VALUES):
        size = min(CHUNK_VALUES, n - start)
        values = pairs.index_select(0, codes[start // 2 : (start + size + 1) // 2].int()).view(torch.float32)[:size]
        scale = scales[start // block_size : -(-(start + size) // block_size)]
        whole = size // block_size
        values[: whole * block_size].view(whole, block_size).mul_(scale[:whole, None])
        values[whole * block_size :].mul_(scale[whole:])
        out[start : start + size] = values
    return out


@cache
def dynamic_levels(device: torch.device | str = "cpu", signed: bool = True) -> Tensor:
    """The values of the 256 dynamic 8-bit codes [256] in float32, rising: sign, a decimal exponent, and a fraction whose
    bits are those that the exponent leaves. Without a sign the fraction has its bit."""
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        positive += (10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    negative = [-value for value in positive] if signed else []
    return torch.tensor(sorted([0.0, 1.0, *positive, *negative]), dtype=torch.float32, device=device)


@cache
def _points(device: torch.device) -> Tensor:
    """The 8-bit code of each point of the grid [65536]."""
    table = dynamic_levels(device)
    point = torch.arange(65536, dtype=torch.float32, device=device) / GRID_8BIT - 1
    return torch.bucketize(point, (table[1:] + table[:-1]) / 2).to(torch.uint8)


@torch.no_grad()
def quantise_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: codes (uint8 [n]), the scale of each 256 of them (float32), and the mean that was taken off first."""
    mean = scales.mean()
    if scales.is_meta:
        return torch.empty_like(scales, dtype=torch.uint8), scales.new_empty(-(-scales.numel() // SCALES_BLOCK)), mean
    blocks = torch.nn.functional.pad(scales - mean, (0, -scales.numel() % SCALES_BLOCK)).view(-1, SCALES_BLOCK)
    largest = blocks.abs().amax(1)
    scaled = blocks * torch.where(largest > 0, 1.0 / largest, 0.0)[:, None]
    codes = _points(scales.device)[((scaled.clamp_(-1, 1) + 1) * GRID_8BIT + 0.5).long()]
    codes[largest == 0] = 0
    return codes.view(-1)[: scales.numel()].clone(), largest, mean


@torch.no_grad()
def dequantise_scales(codes: Tensor, largest: Tensor, mean: Tensor) -> Tensor:
    """The scales [n] in float32."""
    values = dynamic_levels(codes.device).index_select(0, codes.int())
    whole = codes.numel() // SCALES_BLOCK
    values[: whole * SCALES_BLOCK].view(whole, SCALES_BLOCK).mul_(largest[:whole, None])
    values[whole * SCALES_BLOCK :].mul_(largest[whole:])
    return values.add_(mean)


@torch.no_grad()
def quantise_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (int8 [out, in]) from -127 to 127 and the largest magnitude of each row (float32 [out]). Half goes to even.

    Raises DeltuneError for a value that is not finite.
    """
    largest = weight.abs().amax(1).float()
    if weight.is_meta:
        return torch.empty_like(weight, dtype=torch.int8), largest
    if not torch.isfinite(largest).all():
        raise DeltuneError("a weight to be quantised has values that are not finite")
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    factor = torch.where(largest > 0, 127.0 / largest, 0.0)[:, None]
    step = max(1, CHUNK_VALUES // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        codes[rows] = (weight[rows] * factor[rows]).round_()
    return codes, largest


@torch.no_grad()
def dequantise_int8(codes: Tensor, largest: Tensor, out: Tensor) -> Tensor:
    """Fill `out` [out, in], whatever its type, with code · largest / 127: formed in float32, rounded once."""
    step = max(1, CHUNK_VALUES // max(1, codes.shape[1]))
    for start in range(0, codes.shape[0], step):
        rows = slice(start, start + step)
        out[rows] = (codes[rows] * largest[rows, None]).mul_(1.0 / 127.0)
    return out
