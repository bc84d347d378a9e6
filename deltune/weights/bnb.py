"""bitsandbytes, where it is installed and is faster: 4-bit codes turned into values by its kernels. Only this file of the
room knows it, and where it is not, or would be slower or wrong, the room's own codes.py gives the same values."""

from __future__ import annotations

import ctypes
import logging
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


def dequantise_4bit(codes: Tensor, scales: Tensor, kind: str, block_size: int, out: Tensor) -> bool:
    """Fill `out` [rows, columns]; False, and nothing done, where `codes.dequantise_4bit` is to do it.

    On a CPU that is: without AVX-512, for which there is a kernel; rows that are not whole blocks, for which that kernel
    takes the scales of others (bitsandbytes 0.50.2); blocks from 2048 on, for which it calls the compiler instead.
    """
    if out.dtype == torch.float64 or codes.device.type not in ("cpu", "cuda"):
        return False
    if codes.device.type == "cpu" and (out.shape[1] % block_size or block_size >= 2048 or not _has_kernel()):
        return False
    if kernels() is None:
        return False
    _fill(codes, scales, kind, block_size, out)
    return True


def _fill(codes: Tensor, scales: Tensor, kind: str, block_size: int, out: Tensor) -> None:
    """Their operator cannot write to memory that is there on a CPU, and new memory takes three times as long as the values:
    so the function under it is called, in the releases in which it is known to be this."""
    if codes.device.type == "cuda":
        kernels().dequantize_4bit.out(codes, scales, block_size, kind, list(out.shape), out.dtype, out=out)
        return
    function = _function(kind, out.dtype)
    if function is None:
        out.copy_(kernels().dequantize_4bit.default(codes, scales, block_size, kind, list(out.shape), out.dtype))
        return
    tensors = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (codes, scales, out))
    function(*tensors, *map(ctypes.c_longlong, (block_size, *out.shape)))


@cache
def _function(kind: str, dtype: torch.dtype) -> Any:
    """Of (codes, scales, out, values a block, rows, columns), all contiguous and the scales float32; None in other releases."""
    import bitsandbytes
    from bitsandbytes.cextension import lib

    known = bitsandbytes.__version__.startswith("0.50.")
    return getattr(lib, f"cdequantize_blockwise_cpu_{kind}_{SHORT[dtype]}") if known else None


SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@cache
def _has_kernel() -> bool:
    """Whether the kernel of this CPU gives the values of codes.py: asked of it once."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or kernels() is None:
        return False
    values = torch.linspace(-1, 1, 256).view(2, 128)
    for kind in ("nf4", "fp4"):
        codes, scales = coding.quantise_4bit(values, kind, 64)
        own, theirs = torch.empty(256, dtype=torch.bfloat16), torch.empty(2, 128, dtype=torch.bfloat16)
        _fill(codes, scales, kind, 64, theirs)
        if not torch.equal(coding.dequantise_4bit(codes, scales, kind, 64, own), theirs.view(-1)):
            return False
    return True
