"""bitsandbytes, where it is installed and is faster: 4-bit codes turned into values by its kernels. Only this file of the
room knows it, and where it is not, or would be slower or wrong, the room's own codes.py gives the same values."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from deltune.weights import codes as coding


@cache
def kernels() -> Any:
    """bitsandbytes' operators, or None where it is not installed. Its import takes seconds, so it is made when first needed."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it tells of an optional package that has no part in this
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return None
    finally:
        log.setLevel(level)
    return torch.ops.bitsandbytes


def ready(device: torch.device) -> None:
    """Import bitsandbytes and try its kernel now, if values on this device are to come from it: while a compiler looks on it
    could not be tried."""
    if device.type == "cpu":
        _has_kernel()
    elif device.type == "cuda":
        kernels()


def dequantise_4bit(codes: Tensor, scales: Tensor, kind: str, block_size: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """Values of the shape in fresh memory; None where `codes.dequantise_4bit` is to do it.

    On a CPU that is: without AVX-512, for which there is a kernel; rows that are not whole blocks, for which that kernel
    takes the scales of others (bitsandbytes 0.50.2); blocks from 2048 on, for which it calls the compiler instead.
    """
    if dtype == torch.float64 or codes.device.type not in ("cpu", "cuda"):
        return None
    if codes.device.type == "cpu" and (shape[1] % block_size or block_size >= 2048 or not _has_kernel()):
        return None
    found = kernels()
    if found is None:
        return None
    return found.dequantize_4bit.default(codes, scales, block_size, kind, list(shape), dtype)


@cache
def _has_kernel() -> bool:
    """Whether the kernel of this CPU gives the values of codes.py: asked of it once."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or kernels() is None:
        return False
    values = torch.linspace(-1, 1, 256).view(2, 128)
    for kind in ("nf4", "fp4"):
        codes, scales = coding.quantise_4bit(values, kind, 64)
        own = coding.dequantise_4bit(codes, scales, kind, 64, torch.empty(256, dtype=torch.bfloat16))
        if not torch.equal(own, kernels().dequantize_4bit.default(codes, scales, 64, kind, [2, 128], torch.bfloat16).view(-1)):
            return False
    return True
